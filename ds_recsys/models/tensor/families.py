"""Tensor-parallel plans of families that have none in transformers, in the same language, and types left out.

Styles beside HF's: `qkv_parts`, `qkv_grouped` and `qkv_flags` (see `fused.py`); `shared_bias`, added on every rank to a
partial output; `argument NAMES`, keyword arguments with a row per head; `own_config`, a module that reads its numbers of
heads off the config. A second word names the module that computes the region where that is not the parent.
"""

LLAMA = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}
ATTENTION = {path: style for path, style in LLAMA.items() if path.startswith("self_attn")}
MLP = {path: style for path, style in LLAMA.items() if path.startswith("mlp")}
PACKED_MLP = {"mlp.gate_up_proj": "packed_colwise", "mlp.down_proj": "rowwise"}
SHARED_MLP = {"shared_mlp.input_linear": "packed_colwise", "shared_mlp.output_linear": "rowwise"}
GATED_W = {"feed_forward.w1": "colwise", "feed_forward.w3": "colwise", "feed_forward.w2": "rowwise"}
LATENT_ATTENTION = {
    "self_attn.q_proj": "colwise",
    "self_attn.q_b_proj": "colwise",
    "self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "self_attn.kv_b_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}


def below(module: str, plan: dict[str, str]) -> dict[str, str]:
    """The same plan for a module of another name."""
    return {f"{module}.{path.rpartition('.')[2]}": style for path, style in plan.items()}


FEED_FORWARD = below("feed_forward", MLP)
BART = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.out_proj": "rowwise",
    "fc1": "colwise",
    "fc2": "rowwise",
}
BERT = {
    "attention.self.query": "colwise",
    "attention.self.key": "colwise",
    "attention.self.value": "colwise",
    "attention.output.dense": "rowwise attention.self",
    "intermediate.dense": "colwise intermediate",
    "output.dense": "rowwise intermediate",
}
NEOX = {"mlp.dense_h_to_4h": "colwise", "mlp.dense_4h_to_h": "rowwise"}
GPT2 = {"attn.c_attn": "qkv_parts", "attn.c_proj": "rowwise", "mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"}

OWN_PLANS: dict[str, dict[str, str]] = {
    "bamba": {**ATTENTION, **FEED_FORWARD},
    "bloom": {
        "self_attention.query_key_value": "qkv_grouped",
        "self_attention.dense": "rowwise",
        "self_attention": "argument alibi",
        **NEOX,
    },
    "codegen": {"mlp.fc_in": "colwise", "mlp.fc_out": "rowwise"},
    "ctrl": {
        "multi_head_attention.Wq": "colwise",
        "multi_head_attention.Wk": "colwise",
        "multi_head_attention.Wv": "colwise",
        "multi_head_attention.dense": "rowwise",
        "ffn.0": "colwise",
        "ffn.2": "rowwise",
    },
    "diffllama": MLP,  # its attention takes halves of the heads apart
    "doge": MLP,  # its attention mask is made of all value heads
    "falcon": {
        "self_attention.query_key_value": "qkv_flags",
        "self_attention.dense": "rowwise",
        "self_attention": "argument alibi attention_mask",
        **NEOX,
    },
    "falcon_h1": {**ATTENTION, **FEED_FORWARD},
    "gpt2": GPT2,
    "gpt_bigcode": {**GPT2, "attn.c_attn": "qkv_flags"},
    "gpt_neo": {
        "attn.attention.q_proj": "colwise",
        "attn.attention.k_proj": "colwise",
        "attn.attention.v_proj": "colwise",
        "attn.attention.out_proj": "rowwise",
        "mlp.c_fc": "colwise",
        "mlp.c_proj": "rowwise",
    },
    "gpt_neox_japanese": {"attention.query_key_value": "qkv_grouped", "attention.dense": "rowwise", **NEOX},
    "gpt_oss": {
        **ATTENTION,
        "self_attn.sinks": "colwise",
        "mlp.experts.gate_up_proj": "rowwise",
        "mlp.experts.gate_up_proj_bias": "rowwise",
        "mlp.experts.down_proj": "colwise",
        "mlp.experts.down_proj_bias": "shared_bias",
        "mlp.experts": "moe_tp_experts",
    },
    "gptj": {
        "attn.q_proj": "colwise",
        "attn.k_proj": "colwise",
        "attn.v_proj": "colwise",
        "attn.out_proj": "rowwise",
        "mlp.fc_in": "colwise",
        "mlp.fc_out": "rowwise",
    },
    "hunyuan_v1_dense": LLAMA,
    "lfm2": {**ATTENTION, "self_attn.out_proj": "rowwise", **GATED_W},
    "lfm3": {**ATTENTION, "self_attn.g_proj": "colwise", **GATED_W},
    "modernbert-decoder": {
        "attn.q_proj": "colwise",
        "attn.k_proj": "colwise",
        "attn.v_proj": "colwise",
        "attn.Wo": "rowwise",
        "mlp.Wi": "packed_colwise",
        "mlp.Wo": "rowwise",
    },
    "moshi": {
        "self_attn.q_proj.linear": "colwise self_attn",
        "self_attn.k_proj.linear": "colwise self_attn",
        "self_attn.v_proj.linear": "colwise self_attn",
        "self_attn.o_proj.linear": "rowwise self_attn",
        "mlp.fc1": "packed_colwise",
        "mlp.fc2": "rowwise",
    },
    "mpt": {
        "attn.Wqkv": "qkv_parts",
        "attn.out_proj": "rowwise",
        "attn": "argument position_bias",
        "ffn.up_proj": "colwise",
        "ffn.down_proj": "rowwise",
    },
    "openai-gpt": GPT2,
    "persimmon": {"self_attn.query_key_value": "qkv_grouped", "self_attn.dense": "rowwise", **NEOX},
    "phi3": {
        "self_attn": "own_config",
        "self_attn.qkv_proj": "qkv_parts",
        "self_attn.o_proj": "rowwise",
        **PACKED_MLP,
    },
    "recurrent_gemma": {**below("temporal_block", ATTENTION), **below("mlp_block", MLP)},
    "stablelm": LLAMA,
    "trocr": {"fc1": "colwise", "fc2": "rowwise"},  # its attention takes its width from the input
    "xlstm": {"ffn.proj_up_gate": "colwise", "ffn.proj_up": "colwise", "ffn.proj_down": "rowwise"},
}
OWN_PLANS |= dict.fromkeys(
    "bart bigbird_pegasus biogpt blenderbot blenderbot-small marian mbart mvp opt pegasus plbart whisper xglm".split(),
    BART,
)
OWN_PLANS |= dict.fromkeys(
    "bert bert-generation big_bird camembert data2vec-text electra ernie git megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert xlm-roberta xlm-roberta-xl xmod".split(),
    BERT,
)
OWN_PLANS["phi4_multimodal"] = OWN_PLANS["phi3"]

# Entries that replace or join HF's own, which leaves the attention or the shared experts of many mixtures whole.
CORRECTIONS: dict[str, dict[str, str]] = {
    "afmoe": {**ATTENTION, "self_attn.gate_proj": "colwise", **MLP, **below("mlp.shared_experts", MLP)},
    "axk1": LATENT_ATTENTION,
    "cohere2_moe": below("mlp.shared_experts", MLP),
    "deepseek_v3": LATENT_ATTENTION,
    "exaone_moe": below("mlp.shared_experts", MLP),
    "flint": {**ATTENTION, "self_attn.sinks": "colwise"},
    "glm": PACKED_MLP,
    "glm4": PACKED_MLP,
    "glm4_moe_lite": below("mlp.shared_experts", MLP),
    "gpt_neox": {"attention.query_key_value": "qkv_grouped"},
    "granitemoe": ATTENTION,
    "granitemoe_swa": SHARED_MLP,
    "granitemoehybrid": {**ATTENTION, **SHARED_MLP},
    "granitemoeshared": {**ATTENTION, **SHARED_MLP},
    "hunyuan_v1_moe": {**ATTENTION, **below("mlp.shared_mlp", MLP)},
    # HF's takes gate and up, one behind the other, for one matrix, and leaves the gradients of the router partial.
    "inkling_text": {"mlp.experts.gate_up_proj": "packed_colwise", "mlp.shared_experts": "moe_tp_experts"},
    "jamba": {**ATTENTION, **FEED_FORWARD},
    "lfm2_moe": {**ATTENTION, "self_attn.out_proj": "rowwise", **GATED_W},
    "minimax_m3_vl_text": below("mlp.shared_experts", PACKED_MLP),
    "nemotron_h": {**below("mixer", ATTENTION), **below("mixer.shared_experts", MLP)},
    "phimoe": ATTENTION,
    "qwen2_moe": below("mlp.shared_expert", MLP),
    "solar_open": below("mlp.shared_experts", MLP),
    "youtu": LATENT_ATTENTION,
}

UNSHARDED: dict[str, str] = {
    "bitnet": "its norms inside attention and feed-forward need all heads and features",
    "dbrx": "the matrices of its experts are stacked by rows",
    "falcon_mamba": "state-space mixers are all it has",
    "jetmoe": "its attention heads are experts",
    "mamba": "state-space mixers are all it has",
    "mamba2": "state-space mixers are all it has",
}
