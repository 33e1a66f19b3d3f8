"""HF causal-LM types that are known not to convert, each with the reason, and the error that names it."""

from typing import NoReturn

from ds_recsys.errors import UserError

# Found by tests/test_models_conversion.py on transformers 5.23, where all other types convert exactly.
UNSUPPORTED: dict[str, str] = {
    "blt": "reads bytes and cuts them into patches; layers of three transformers exchange cross-attention states",
    "cpmant": "puts prompt tokens before the embeddings, so that the length changes on the way",
    "deepseek_v4": "decoder layers read token ids (hash routing)",
    "emu3": "its language half, 'emu3_text_model', is no causal LM of its own in transformers",
    "gemma3n": "give its text half, 'gemma3n_text': four streams of hidden states run side by side, fed with token ids",
    "gemma3n_text": "four streams of hidden states run side by side, and layers are fed with token ids",
    "gemma4_assistant": "drafts for another model, whose hidden states and keys it needs",
    "gemma4_unified_assistant": "drafts for another model, whose hidden states and keys it needs",
    "glm_moe_dsa": "layers pass the indices chosen by sparse attention on to the next layer",
    "hrm_text": "runs the same layers several times per forward",
    "hy_v4": "layers pass the indices chosen by sparse attention on to the next layer",
    "inkling2_text": "every layer reads an n-gram embedding computed beside the token embedding",
    "mllama": "its language half, 'mllama_text_model', is no causal LM of its own in transformers",
    "musicgen": "its language half, 'musicgen_decoder', is no causal LM of its own in transformers",
    "musicgen_melody": "its language half, 'musicgen_melody_decoder', is no causal LM of its own in transformers",
    "prophetnet": "predicts several tokens at once from streams that run side by side",
    "qwen4_exp": "layers read n-gram embeddings of the token ids",
    "qwen4_exp_text": "layers read n-gram embeddings of the token ids",
    "reformer": "reversible layers pass two streams of hidden states",
    "roformer": "layers read a position table that the model keeps as a parameter outside them",
    "rwkv": "layers pass a recurrent state on to the next layer",
    "xlm": "keeps attention, norm and feed-forward of a layer in separate lists",
    "xlnet": "hidden states are laid out [length, batch, hidden], in two streams",
    "zamba": "one transformer layer's weights are shared between layers of the pipeline",
    "zamba2": "layers read the embedding's output again",
    "zaya": "layers pass the router's state on to the next layer",
}


def refuse(model_type: str, reason: str) -> NoReturn:
    """Raise the one error for a model that cannot be cut into pipeline stages."""
    raise UserError(f"model type {model_type!r} cannot be cut into pipeline stages: {reason}")


def check_supported(model_type: str) -> None:
    """Raise `UserError` for a type of the table; types not in it are tried."""
    if model_type in UNSUPPORTED:
        refuse(model_type, UNSUPPORTED[model_type])
