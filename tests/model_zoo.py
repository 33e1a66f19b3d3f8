"""Tiny random configs of every causal-LM type, shrunk from the type's default config by the names of its fields."""

import re
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from ds_recsys.models.hf_private import CAUSAL_LM_CLASSES

VOCAB, LAYERS = 50, 3

# First match wins; sizes that must divide one another are kept compatible (4 heads x 8 = 32).
RULES: list[tuple[str, Any]] = [
    (r"vocab_size|vocab_size_per_layer_input", VOCAB),
    (r"num_(hidden_)?layers|n_layers?|decoder_layers|num_decoder_layers", LAYERS),
    (r"encoder_layers|num_encoder_layers", 1),
    (
        r"num_attention_heads|n_heads?|num_heads|index_n_heads|linear_num_heads|(en|de)coder_attention_heads|linear_num_value_heads",
        4,
    ),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|attention_kv_heads|linear_num_key_heads|swa_num_key_value_heads", 2),
    (r"qk_head_dim", 16),
    (
        r"(global_|swa_|v_|qk_|qk_rope_|qk_nope_|linear_key_|linear_value_|attention_|linear_)?head_dim|dim_head|d_kv|kv_channels",
        8,
    ),
    (r"rotary_dim", 4),
    (r"q_lora_rank|kv_lora_rank", 16),
    (r"(hidden|embedding|input_embedding)_size|d_model|n_embd|word_embed_proj_dim|emb_dim", 32),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|inner_dim|expert_dim)|n_inner|d_ff|d_inner|dff|dim_feedforward|mlp_hidden_size|dim_ff",
        64,
    ),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|moe_top_k|top_k_experts|experts_per_token|num_selected_experts", 2),
    (r"num_expert_group|n_shared_experts|num_shared_experts|n_group|topk_group|moe_layer_freq", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length", 64),
    (r"(local_)?sliding_window(_size)?|window_size|attention_window|attention_chunk_size", 4),
    (r"index_topk", 4),
    (r"index_head_dim", 16),
    (r"mamba_n_heads|mamba_num_heads", 4),
    (r"mamba_d_head|mamba_head_dim", 16),
    (r"(mamba_)?(d_state|state_size|ssm_state_size)", 8),
    (r"mamba_n_groups|n_groups", 1),
    (r"(mamba_)?chunk_size", 4),
    (r"mamba_dt_rank|time_step_rank", 4),
]

LAYER_KINDS = ("full_attention", "sliding_attention")
PER_TYPE: dict[str, dict[str, Any]] = {
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_head_dim": 16,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "cohere_compass_text": {"rope_parameters": {k: {"rope_type": "default", "rope_theta": 1e4} for k in LAYER_KINDS}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v4": {"num_hash_layers": 0},
    "gemma3n_text": {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "marian": {"decoder_vocab_size": VOCAB},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh", "local"]},
    "roc_bert": {
        "pronunciation_vocab_size": 9,
        "shape_vocab_size": 9,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A config of `model_type` with hidden size 32, 3 layers, 4 heads, 50 tokens and no dropout."""
    default = AutoConfig.for_model(model_type)
    text = default.get_text_config(decoder=True)
    if type(text) is not type(default) and text.model_type in CAUSAL_LM_CLASSES:
        default = text
    small = _shrunk(default)
    small.update(PER_TYPE.get(default.model_type, {}))
    return type(default)(**{**small, **changes})


def _shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    small: dict[str, Any] = {}
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in vars(config).items():
        if name.startswith("_") or isinstance(value, bool) or name in ("model_type", "architectures", "pad_token_id"):
            continue
        if isinstance(value, PreTrainedConfig):
            small[name] = {**_shrunk(value), "model_type": value.model_type} if value.model_type else _shrunk(value)
        elif isinstance(value, float) and "drop" in name:
            small[name] = 0.0
        elif isinstance(value, int) or (value is None and name in ("head_dim", "num_key_value_heads")):
            size = next((size for pattern, size in RULES if re.fullmatch(pattern, name)), None)
            if size is not None:
                small[name] = 4 if value is None and name == "num_key_value_heads" else size
        elif isinstance(value, list) and layers and len(value) == layers and layers > LAYERS:
            kinds = list({str(v): v for v in value}.values())
            small[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]  # latent attention has a key per head
    return small


class HeldWeights:
    """A state dict where the package expects weights."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.asked: list[str] = []

    def bind(self, skeleton: Any) -> "HeldWeights":
        return self

    def get(self, name, shape, optional=False, part=None) -> torch.Tensor | None:
        self.asked.append(name)
        value = self.tensors.get(name) if optional else self.tensors[name]
        return value if part is None else part[0].take(value, part[1])


def run_layers(specs: list, layers: list, hidden: torch.Tensor) -> torch.Tensor:
    """What PipelineModule does with its layers."""
    for spec, layer in zip(specs, layers, strict=True):
        tied = getattr(spec, "forward_fn", None)
        hidden = tied(layer, hidden) if tied else layer(hidden)
    return hidden
