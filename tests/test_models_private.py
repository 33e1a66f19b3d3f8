"""The private names of transformers and DeepSpeed that models/ leans on are still there and still take what we give."""

import inspect

import pytest
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.activation_checkpointing import checkpointing
from transformers import PreTrainedModel, conversion_mapping, core_model_loading
from transformers.models.auto import modeling_auto


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (PreTrainedModel, "_init_weights", ["self", "module"]),
        (PreTrainedModel, "tie_weights", ["self"]),
        (conversion_mapping, "get_model_conversion_mapping", ["model"]),
        (
            core_model_loading,
            "rename_source_key",
            ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"],
        ),
        (core_model_loading, "dot_natural_key", []),
        (core_model_loading.WeightConverter, "add_tensor", ["target_key", "source_key", "source_pattern", "future"]),
        (core_model_loading.WeightConverter, "convert", ["self", "layer_name", "model", "config"]),
        (PipelineModule, "_count_layer_params", ["self"]),
        (PipelineModule, "_partition_layers", ["self", "method"]),
        (PipelineModule, "_is_checkpointable", ["self", "funcs"]),
        (PipelineModule, "_set_bounds", ["self", "start", "stop"]),
        (checkpointing, "non_reentrant_checkpoint", []),
    ],
)
def test_private_name_is_there(owner, name, parameters):
    where = f"{owner.__name__}.{name}"
    assert hasattr(owner, name), f"{where} is gone: see ds_recsys/models/hf_private.py, initialise.py and pipeline.py"
    have = list(inspect.signature(getattr(owner, name)).parameters)
    absent = [p for p in parameters if p not in have]
    assert not absent, f"{where} no longer takes {absent}, but {have}"


def test_the_table_of_types_is_there():
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"] == "LlamaForCausalLM"
