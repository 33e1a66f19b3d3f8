"""The config: what is refused and in which words, what "auto" becomes, and that DeepSpeed takes the result."""

import json
import subprocess
import sys

import pytest

from ds_recsys.config import (
    Recsys,
    deepspeed_keys,
    load_config,
    recsys_schema,
    reference_markdown,
)
from ds_recsys.config.jsonfile import parse_json
from ds_recsys.errors import UserError


def refused(action, *words: str) -> None:
    """`action()` must raise a UserError of one line that holds all `words`."""
    with pytest.raises(UserError) as error:
        action()
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def block(**recsys) -> dict:
    return {"train_batch_size": 16, "recsys": recsys}


def resolved(config: dict, world_size: int = 1, **known):
    return load_config(config).resolve(world_size=world_size, local_world_size=1, **known)


# ---- the file


def test_comments_and_trailing_commas_are_read(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        '// run: deepspeed x\n{"train_batch_size": 8, # note\n /* a\n b */ "wandb": {"project": "a//b#c,}"},\n}'
    )
    config = load_config(path)
    assert config.deepspeed == {"train_batch_size": 8, "wandb": {"project": "a//b#c,}"}}
    assert config.recsys == Recsys()


@pytest.mark.parametrize(
    "text, words",
    [
        ('{\n  "a": 1\n  "b": 2\n}', ("f.json:3:3", "not valid JSON")),
        ('{"a": [1, 2}', ("f.json:1:12",)),
        ("// c\n", ("f.json:2:1",)),
        ('{"a": NaN}', ("f.json", "NaN")),
        ("[1]", ("f.json", "list")),
        ('{"a": 1,\n "b": {"c": 2,\n "c": 3}}', ("f.json:3", '"c"', "twice", "lines 2, 3")),
        ("[" * 100_000, ("f.json", "nested")),
    ],
)
def test_broken_files_are_refused_with_their_place(text, words):
    refused(lambda: parse_json(text, "f.json"), *words)


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "quickstart.json").write_text("{}")
    refused(lambda: load_config(tmp_path / "quikstart.json"), "no such config file", "quickstart.json")
    refused(lambda: load_config(tmp_path), "cannot read the config")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    refused(lambda: load_config(tmp_path / "latin.json"), "byte 7 is not UTF-8")


# ---- DeepSpeed's keys


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("zero_optimisation", "zero_optimization"),
        ("train_batchsize", "train_batch_size"),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("bf_16", "bf16"),
        ("Optimizer", "optimizer"),
        ("gradient-clipping", "gradient_clipping"),
        ("batch_size", "train_batch_size"),
        ("recsis", "recsys"),
    ],
)
def test_misspelt_top_level_keys_are_refused(typo, meant):
    refused(lambda: load_config({typo: 1}), f'"{typo}"', f'did you mean "{meant}"')


def test_misspelt_inner_keys_are_refused():
    refused(lambda: load_config({"zero_optimization": {"stagee": 1}}), '"stagee"', '"stage"')
    refused(lambda: load_config({"bf16": {"enable": True}}), '"enable"', '"enabled"')
    refused(lambda: load_config({"optimizer": {"typ": "AdamW"}}), '"typ"', '"type"')
    scheduler = {"type": "WarmupLR", "params": {"warmup_steps": 5}}
    refused(lambda: load_config({"scheduler": scheduler}), '"warmup_steps"', '"warmup_num_steps"', "scheduler.params")
    refused(lambda: load_config({"zero_optimization": {"mics_shard_size": 2}}), "mics_shard_size", "removed")


def test_unknown_but_unlike_keys_only_warn():
    config = load_config({"my_own_notes": 1})
    assert len(config.warnings) == 1 and "my_own_notes" in config.warnings[0]
    assert load_config({"train_batch_size": 4, "steps_per_print": 1}).warnings == ()


def test_removed_keys_and_valid_keys_are_those_of_the_installed_deepspeed():
    from deepspeed.runtime import config as installed
    from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert set(deepspeed_keys.REMOVED) == set(installed._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert deepspeed_keys.REMOVED_ZERO == set(installed._REMOVED_ZERO_CONFIG_KEYS)
    for key in deepspeed_keys.REMOVED:
        refused(lambda key=key: load_config({key: {}}), f'"{key}"', "removed")

    asked = set()

    class Recorder(dict):  # every key that DeepSpeed looks for, whether the config has it or not
        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

        def keys(self):
            return self  # `key in config.keys()`

    installed.DeepSpeedConfig(Recorder(train_batch_size=1))
    assert {"train_batch_size", "optimizer", "zero_optimization", "bf16", "pipeline", "wandb"} <= asked
    assert asked - deepspeed_keys.TOP_LEVEL - set(deepspeed_keys.REMOVED) == set()

    for ours, model in (
        (deepspeed_keys.ZERO, DeepSpeedZeroConfig),
        (deepspeed_keys.BF16, DeepSpeedBF16Config),
        (deepspeed_keys.FP16, DeepSpeedFP16Config),
    ):
        names = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
        assert ours == names
    for scheduler in (WarmupLR, WarmupDecayLR, WarmupCosineLR):
        names = scheduler.__init__.__code__.co_varnames[2 : scheduler.__init__.__code__.co_argcount]
        assert deepspeed_keys.SCHEDULER_PARAMS[scheduler.__name__] == set(names)


def test_compression_is_checked_against_deepspeeds_keys():
    block = {"recsys": {"compression": {"method": "int8"}}}
    refused(lambda: load_config({**block, "zero_optimization": {"stage": 3}}), '"int8"', '"zero_optimization.stage" 3')
    refused(lambda: load_config({**block, "communication_data_type": "bf16"}), '"communication_data_type" "bf16"')
    assert load_config({**block, "zero_optimization": {"stage": 2}}).recsys.compression.method == "int8"
    block["recsys"]["compression"]["owner_shares"] = [0, 1, 1]
    refused(
        lambda: load_config({**block, "zero_optimization": {"stage": 1}}),
        '"recsys.compression.owner_shares"',
        "stage 0",
    )
    refused(
        lambda: load_config({"train_batch_size": 12, **block}).resolve(world_size=2),
        "owner_shares",
        "3 number(s)",
        "2 replica(s)",
    )


# ---- the block


@pytest.mark.parametrize(
    "recsys, words",
    [
        ({"pip": 2}, ('unknown key "pip" in "recsys"', 'did you mean "pipe"')),
        ({"dataset": {"maxlength": 3}}, ('"recsys.dataset"', '"max_length"')),
        ({"dataset": {"columns": {"usr": "a"}}}, ('"recsys.dataset.columns"', '"user"')),
        ({"max_length": 3}, ('"max_length"', 'a key of "recsys.dataset"')),
        ({"train_batch_size": 3}, ("key of DeepSpeed", "top level")),
        ({"qqq": 3}, ('"qqq"', "valid keys: parallel, pipe, data, tensor")),
        ({"pipe": 0}, ('"recsys.pipe" is 0', "greater than 0")),
        ({"pipe": "2"}, ("\"recsys.pipe\" is '2'", "integer")),
        ({"pipe": True}, ('"recsys.pipe" is True', "integer")),
        ({"data": "all"}, ("\"recsys.data\" is 'all'", "integer", '"auto"')),
        ({"compression": {"method": "int9"}}, ('"recsys.compression.method"', "'int9'", "powersgd")),
        ({"compression": {"method": "int8", "ratio": 0.1}}, ('"ratio" is for topk and randomk', '"int8"')),
        ({"compression": {"owner_shares": [1, 2]}}, ('"owner_shares" is for bf16', '"method" is "none"')),
        ({"compression": {"method": "int8", "owner_shares": [0, 0]}}, ('"owner_shares"', "nobody", "at least one")),
        ({"compression": {"method": "sign", "warmup": "ratio"}}, ('"warmup": "ratio"', '"sign"')),
        (
            {"compression": {"method": "topk", "momentum": 0.9, "error_feedback": False}},
            ('"momentum"', '"error_feedback" is false'),
        ),
        ({"partition": 3}, ('"recsys.partition" is 3', "object")),
        ({"partition": {"method": "best"}}, ("recsys.partition.method", "'best'", "uniform")),
        ({"pipe": 2, "partition": {"bounds": [0, 3]}}, ("[0, 3]", "2 values", '"recsys.pipe" 2 needs 3')),
        ({"pipe": 2, "partition": {"bounds": [1, 2, 3]}}, ("starts at 1",)),
        ({"pipe": 2, "partition": {"bounds": [0, 3, 3]}}, ("does not rise",)),
        ({"dataset": {"max_bad_fraction": float("nan")}}, ("recsys.dataset.max_bad_fraction",)),
        ({"dataset": {"valid_fraction": 0.5, "test_fraction": 0.5}}, ("0.5", "nothing to train on")),
        ({"dataset": {"max_length": 5, "stride": 6}}, ("stride 6", "max_length 5")),
        ({"model": {"path": "a", "config": {"model_type": "b"}}}, ("'a'", "both given")),
        ({"model": {"config": {"n_embd": 3}}}, ("model_type",)),
        ({"model": {"config": {"model_type": "llama"}, "item_init": "titles"}}, ("titles", "path")),
        ({"training": {"epochs": 1, "steps": 2}}, ("epochs 1", "steps 2")),
        ({"training": {"patience": 2, "eval_every_epochs": 0}}, ("patience 2", "eval_every_epochs")),
        ({"evaluation": {"k": []}}, ("recsys.evaluation.k",)),
        ({"evaluation": {"k": [10, 10]}}, ("recsys.evaluation.k", "repeated")),
        ({"checkpoint": {"every_steps": 0}}, ("recsys.checkpoint.every_steps", "0")),
        ({"pipe": 3, "model": {"path": "a", "num_layers": 2}}, ("num_layers", "2", '"recsys.pipe" 3')),
        (
            {"pipe": 3, "model": {"config": {"model_type": "gpt2", "n_layer": 2}}},
            ("2 decoder layer", '"recsys.pipe" 3'),
        ),
        ({"model": {"config": {"model_type": "gpt2", "n_embd": 10, "n_head": 3}}}, ("10", "3 heads")),
        (7, ('"recsys" is 7',)),
    ],
)
def test_mistakes_in_the_block_are_one_line(recsys, words):
    refused(lambda: load_config({"recsys": recsys}), *words)


def test_batch_sizes_and_precision():
    refused(lambda: load_config({"train_batch_size": 0}), '"train_batch_size" is 0')
    refused(lambda: load_config({"train_batch_size": "16"}), "'16'", "integer")
    both = {"fp16": {"enabled": True}, "bf16": {"enabled": True}}
    refused(lambda: load_config(both), '"fp16.enabled" and "bf16.enabled"')
    assert load_config({**both, "fp16": {"enabled": "auto"}})


def test_given_columns_tell_null_from_absent():
    columns = load_config(block(dataset={"columns": {"user": "u", "timestamp": None}})).recsys.dataset.columns
    assert columns.given() == {"user": "u", "timestamp": None}


def test_overrides_as_mapping_and_as_command_line(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(block(pipe=1, dataset={"path": "a"})))
    config = load_config(path, overrides=["recsys.pipe=2", "recsys.dataset.path=b/c", "gradient_clipping=1e-1"])
    assert (config.recsys.pipe, config.recsys.dataset.path, config.deepspeed["gradient_clipping"]) == (2, "b/c", 0.1)
    nested = load_config(path, overrides={"recsys": {"dataset": {"path": None}}, "recsys.seed": 7}).recsys
    assert (nested.dataset.path, nested.seed, nested.pipe) == (None, 7, 1)
    refused(lambda: load_config(path, overrides=["recsys.pip=2"]), str(path), "with overrides", '"pipe"')
    refused(lambda: load_config(path, overrides=["pipe"]), "key=value")
    refused(lambda: load_config(path, overrides={"train_batch_size.x": 1}), '"train_batch_size"', "not an object")


def test_config_is_frozen_and_keeps_what_it_was_given():
    given = block(pipe=2)
    config = load_config(given)
    config.deepspeed["train_batch_size"] = 1
    given["train_batch_size"] = 2
    assert config.deepspeed["train_batch_size"] == 16
    with pytest.raises(Exception, match="frozen"):
        config.recsys.pipe = 3
    assert load_config(resolved(given, 2).to_dict()).resolve(world_size=2).recsys.pipe == 2


# ---- the reference


def test_every_key_is_described():
    def descriptions(schema, definitions):
        for name, field in schema["properties"].items():
            inner = field.get("$ref") or next((o["$ref"] for o in field.get("anyOf", ()) if "$ref" in o), None)
            if inner:
                yield from descriptions(definitions[inner.split("/")[-1]], definitions)
            else:
                yield name, field.get("description")

    schema = recsys_schema()
    found = list(descriptions(schema, schema["$defs"]))
    assert len(found) > 30 and all(text and text.endswith(".") for _, text in found)
    table = reference_markdown()
    assert all(f"{name}` |" in table for name, _ in found)
    assert table.startswith("<!-- recsys-reference -->\n") and table.endswith("<!-- recsys-reference -->\n")


def test_the_module_prints_the_reference_without_torch():
    code = (
        "import runpy, sys; runpy.run_module('ds_recsys.config', run_name='__main__');"
        "heavy = {'torch', 'deepspeed', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == reference_markdown()
