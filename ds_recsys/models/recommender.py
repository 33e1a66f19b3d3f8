"""The config of a recommender: an HF causal LM whose tokens are items."""

import copy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from ds_recsys.errors import UserError
from ds_recsys.models.hf_private import CAUSAL_LM_CLASSES
from ds_recsys.models.unsupported import check_supported, refuse


def recommender_config(
    base: PreTrainedConfig | dict[str, Any], num_items: int, *, num_layers: int | None = None, tie: bool | None = None
) -> PreTrainedConfig:
    """The config of `base` with one token per item.

    Args:
        base: an HF config, or its fields as a dict with `model_type`.
        num_items: size of the catalogue I; `vocab_size` becomes I + 1, token 0 is padding.
        num_layers: keep the first so many decoder layers (None: all); per-layer lists are cut to match.
        tie: share the item table with the head; None keeps what `base` says.

    Raises:
        UserError: no causal LM of that type, too many layers, or a type that cannot be cut into stages.
    """
    if isinstance(base, dict):
        fields = dict(base)
        model_type = fields.pop("model_type", None)
        if model_type not in CAUSAL_LM_CLASSES:
            raise UserError(f"model_type {model_type!r} is no causal LM of the installed transformers")
        check_supported(model_type)
        config = AutoConfig.for_model(model_type, **fields)
    else:
        config = copy.deepcopy(base)
    check_supported(config.model_type)
    text = config.get_text_config(decoder=True)
    if type(text) is not type(config):  # the language half of a multimodal model
        if text.model_type not in CAUSAL_LM_CLASSES:
            refuse(
                config.model_type, f"its language half, {text.model_type!r}, is no causal LM of its own in transformers"
            )
        config = text
    if config.model_type not in CAUSAL_LM_CLASSES:
        raise UserError(f"model_type {config.model_type!r} is no causal LM of the installed transformers")
    check_supported(config.model_type)
    for name in ("quantization_config", "gguf_file"):
        if hasattr(config, name):
            delattr(config, name)
    config.vocab_size = num_items + 1
    config.pad_token_id = 0
    for name in ("bos_token_id", "eos_token_id"):
        try:
            setattr(config, name, None)
        except (
            TypeError,
            ValueError,
            StrictDataclassError,
        ):  # a few configs insist on a number; it is never generated from
            setattr(config, name, 0)
    config.use_cache = False
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True  # encoders (BERT) attend both ways otherwise
    for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            setattr(config, name, False)
    if tie is not None:
        config.tie_word_embeddings = tie
    if num_layers is not None:
        _keep_layers(config, num_layers)
    config.architectures = [CAUSAL_LM_CLASSES[config.model_type]]
    return config


def _keep_layers(config: PreTrainedConfig, num_layers: int) -> None:
    total = config.num_hidden_layers
    if not 1 <= num_layers <= total:
        raise UserError(f"num_layers is {num_layers}, but {config.model_type!r} has {total} layers: give 1 to {total}")
    for name, value in list(config.__dict__.items()):
        if isinstance(value, list) and len(value) == total and total > 1:
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers
