"""The config of a run: the grid, the engine and the model it must fit, and what each "auto" becomes."""

import json
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import block, refused, resolved

from ds_recsys.config import Recsys, check_bounds, check_pipeline_engine, load_config
from ds_recsys.config.resolve import resolve_batch, usable_cpus
from ds_recsys.errors import UserError

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


# ---- the grid, the engine, the model


def test_world_size_must_fit_the_grid():
    refused(lambda: resolved(block(pipe=2), 5), "5 rank", '"recsys.pipe" 2')
    refused(lambda: resolved(block(pipe=2, data=3), 4), '"recsys.data" 3', "= 6", "4 rank")
    assert resolved(block(pipe=2), 4).recsys.data == 2


def test_world_size_comes_from_the_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_SIZE", "3")
    config = load_config({**block(pipe=2), "train_batch_size": 24}).resolve()
    assert config.recsys.data == 3 and config.recsys.threads_per_rank == max(1, usable_cpus() // 3)


def test_a_head_needs_a_rank_at_most():
    refused(
        lambda: resolved(block(tensor=4), 4, model_config={"num_attention_heads": 3}), "3 heads", '"recsys.tensor" 4'
    )
    assert resolved(block(tensor=2), 4, model_config={"num_attention_heads": 9}).recsys.data == 2


def test_sequence_parallelism_needs_ranks_to_split_over():
    refused(lambda: resolved(block(sequence_parallel=True)), '"recsys.sequence_parallel"', '"recsys.tensor"')
    values = block(tensor=2, sequence_parallel=True, dataset={"max_length": 5})
    refused(lambda: resolved(values, 2), '"recsys.dataset.max_length" 5', '"recsys.tensor" 2')
    values["recsys"]["dataset"]["max_length"] = 6
    assert resolved(values, 2).deepspeed["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}
    values["pipeline"] = {"grad_partitioned": True}
    refused(lambda: resolved(values, 2), '"pipeline.grad_partitioned" true', '"recsys.sequence_parallel" true')
    assert "pipeline" not in resolved(block(tensor=2), 2, model_config={"hidden_size": 32}).deepspeed
    odd = resolved(block(tensor=2), 2, model_config={"hidden_size": 33}).deepspeed
    assert odd["pipeline"] == {"pipe_partitioned": False, "grad_partitioned": False}


def test_row_sparse_gradients_where_deepspeed_lets_them_be():
    sampled = block(head={"loss": "sampled"})
    assert resolved(sampled).recsys.head.sparse_gradients is True
    for key, value, words in (
        ("zero_optimization", {"stage": 1}, '"zero_optimization.stage" 1'),
        ("bf16", {"enabled": True}, '"bf16.enabled"'),
        ("optimizer", {"type": "SGD", "params": {"lr": 1.0}}, '"SGD"'),
    ):
        assert resolved({**sampled, key: value}).recsys.head.sparse_gradients is False
        forced = {**block(head={"loss": "sampled", "sparse_gradients": True}), key: value}
        refused(lambda forced=forced: resolved(forced), '"recsys.head.sparse_gradients"', words)


def test_head_options_that_do_not_fit():
    refused(lambda: load_config(block(head={"negatives": 7})), "negatives", '"full"')
    refused(lambda: load_config(block(head={"sparse_gradients": True})), "sparse_gradients", '"sampled"')
    refused(lambda: load_config(block(head={"loss": "sampled", "kernel": "auto"})), "kernel", '"sampled"')
    values = block(head={"loss": "gbce"}, training={"label_smoothing": 0.1})
    refused(lambda: resolved(values), '"recsys.training.label_smoothing"', '"gbce"')


def test_heads_with_a_size_of_their_own_need_not_divide_the_width():
    model = {"hidden_size": 10, "num_attention_heads": 4}
    refused(lambda: resolved(block(), model_config=model), "10", "4 heads")
    assert resolved(block(), model_config={**model, "head_dim": 8})


def test_model_checks_read_config_objects():
    from transformers import GPT2Config

    model = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=101)
    refused(lambda: resolved(block(pipe=3), 3, model_config=model), "2 decoder layer", '"recsys.pipe" 3')
    assert resolved(block(), model_config=model).recsys.evaluation.batch_size == 128


@pytest.mark.parametrize("pipe", [1, 2])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_only_on_the_users_own_engine(stage, pipe):
    config = {**block(pipe=pipe), "zero_optimization": {"stage": stage}}
    refused(
        lambda: resolved(config, 2), f'"zero_optimization.stage" {stage}', f'"recsys.pipe" {pipe}', "PipelineEngine"
    )
    assert (
        load_config(config).resolve_for_engine(world_size=2, pipe=pipe).deepspeed["zero_optimization"]["stage"] == stage
    )


def test_keys_of_deepspeed_that_contradict_the_block():
    recsys = Recsys(pipe=2)
    refused(lambda: check_pipeline_engine({"pipeline": {"stages": 4}}, recsys, "f"), '"pipeline.stages" 4', "2")
    refused(lambda: check_pipeline_engine({"tensor_parallel": {"autotp_size": 2}}, recsys, "f"), "autotp_size")
    refused(lambda: check_pipeline_engine({"sequence_parallel_size": 2}, recsys, "f"), "sequence_parallel_size")
    check_pipeline_engine({"pipeline": {"stages": 2}, "zero_optimization": True}, recsys, "f")


def test_bounds_end_at_the_last_layer():
    check_bounds([0, 2, 5], 2, 5, "f")
    refused(lambda: check_bounds([0, 2, 5], 2, 6, "f"), "ends at 5", "6 pipeline layers")


def test_engine_of_the_user_keeps_its_config():
    given = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "Adam", "params": {"lr": 1}},
    }
    assert load_config(given).resolve_for_engine(world_size=2).deepspeed == given
    auto = {**given, "train_micro_batch_size_per_gpu": "auto"}
    assert load_config(auto).resolve_for_engine(world_size=4, pipe=2).deepspeed["gradient_accumulation_steps"] == 4
    refused(
        lambda: load_config(block(pipe=2)).resolve_for_engine(world_size=4, pipe=4), '"recsys.pipe" is 2', "4 stage"
    )
    refused(
        lambda: load_config(block(tensor=2)).resolve_for_engine(world_size=4, pipe=2), '"recsys.tensor" is 2', "1 rank"
    )
    two = load_config(block(tensor=2)).resolve_for_engine(world_size=4, pipe=2, tensor=2)
    assert two.recsys.data == 1
    refused(lambda: load_config({"gradient_clipping": "auto"}).resolve_for_engine(world_size=1), '"gradient_clipping"')


# ---- "auto"


@pytest.mark.parametrize(
    "given, pipe, data, expected",
    [
        ((16, None, None), 1, 1, (16, 16, 1)),
        ((16, None, None), 1, 4, (16, 4, 1)),
        ((64, "auto", "auto"), 2, 2, (64, 4, 8)),  # the largest divisor of 32 up to 4 x 2
        ((60, None, None), 2, 1, (60, 10, 6)),
        ((14, None, None), 2, 1, (14, 2, 7)),
        ((None, 4, None), 2, 3, (96, 4, 8)),
        ((None, 4, None), 1, 3, (12, 4, 1)),
        (("auto", "auto", "auto"), 1, 2, (16, 8, 1)),
        ((None, 4, 3), 2, 2, (24, 4, 3)),
        ((24, 4, None), 2, 2, (24, 4, 3)),
        ((24, None, 3), 2, 2, (24, 4, 3)),
    ],
)
def test_batch_sizes(given, pipe, data, expected):
    config = {key: value for key, value in zip(BATCH, given, strict=True) if value is not None}
    resolve_batch(config, pipe, data, "f", lambda *_: None)
    assert tuple(config[key] for key in BATCH) == expected


@given(
    st.tuples(*[st.none() | st.integers(1, 40)] * 3).filter(lambda sizes: any(sizes[:2])),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(max_examples=300, deadline=None)
def test_batch_sizes_agree_or_are_refused(sizes, pipe, data):
    config = {key: value for key, value in zip(BATCH, sizes, strict=True) if value is not None}
    given_sizes = dict(config)
    try:
        resolve_batch(config, pipe, data, "f", lambda *_: None)
    except UserError as error:
        assert "\n" not in str(error) and sizes[0] is not None  # without a batch size everything fits
        return
    assert config[BATCH[0]] == prod(config[key] for key in BATCH[1:]) * data
    assert given_sizes.items() <= config.items()


def test_batch_sizes_that_cannot_be():
    refused(lambda: resolved({"train_batch_size": 6}, 4), '"train_batch_size" 6', '"recsys.data" 4')
    three = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}
    refused(lambda: resolved(three), '"train_batch_size" 8', "3", "= 6")
    refused(lambda: resolved({}), "no batch size")


def test_optimizer_defaults():
    params = resolved(block()).deepspeed["optimizer"]
    assert params == {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}}
    assert resolved(block(model={"path": "x"})).deepspeed["optimizer"]["params"]["lr"] == 3e-4
    assert resolved(block(model={"path": "x", "weights": "random"})).deepspeed["optimizer"]["params"]["lr"] == 1e-3
    auto = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    filled = resolved({**block(), "optimizer": auto, "gradient_clipping": "auto"}).deepspeed
    expected = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True}
    assert filled["optimizer"]["params"] == expected and filled["gradient_clipping"] == 1.0
    own = {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": False}}
    assert resolved({**block(), "optimizer": own}).deepspeed["optimizer"] == own
    refused(
        lambda: resolved({**block(), "optimizer": {"type": "AdamW", "params": {"foo": "auto"}}}), "optimizer.params.foo"
    )
    refused(lambda: resolved({**block(), "steps_per_print": "auto"}), '"steps_per_print"')


def test_schedule_waits_for_the_length_of_the_run():
    scheduler = {"type": "WarmupDecayLR", "params": dict.fromkeys(("warmup_num_steps", "total_num_steps"), "auto")}
    scheduler["params"] |= {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}
    config = load_config({**block(training={"epochs": 2}), "scheduler": scheduler})
    early = config.resolve(world_size=1)
    assert early.deepspeed["scheduler"]["params"]["total_num_steps"] == "auto"
    late = early.resolve(world_size=1, windows=161)  # 16 a step: 11 steps an epoch
    expected = {"warmup_num_steps": 2, "total_num_steps": 22, "warmup_min_lr": 0.0, "warmup_max_lr": 1e-3}
    assert late.deepspeed["scheduler"]["params"] == expected
    assert late == config.resolve(world_size=1, steps_per_epoch=11)
    assert "scheduler.params.total_num_steps: 22 (auto)" in late.describe()
    steps = load_config({**block(training={"steps": 5}), "scheduler": scheduler}).resolve(world_size=1)
    assert steps.deepspeed["scheduler"]["params"]["total_num_steps"] == 5
    assert steps.deepspeed["scheduler"]["params"]["warmup_num_steps"] == 1  # DeepSpeed refuses 0


def test_a_schedule_that_overrides_the_learning_rate_warns():
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 5}}
    optimizer = {"type": "AdamW", "params": {"lr": 3e-4}}
    assert "warmup_max_lr" in load_config({"scheduler": scheduler, "optimizer": optimizer}).warnings[0]


def test_everything_is_resolved_and_described(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = resolved(block(pipe=2), 4)
    assert config.recsys.dataset.cache_dir == str(tmp_path / "ds_recsys")
    assert config.recsys.evaluation.batch_size == 128
    later = {"dataset": {"format", "titles"}, "compression": {"hierarchical"}}  # found out where they are used
    assert '"auto"' not in json.dumps(config.recsys.model_dump(exclude=later))
    lines = config.describe()
    assert "recsys.data: 2 (auto)" in lines and "gradient_accumulation_steps: 8 (auto)" in lines
    assert config.train_batch_size == 16 and not any(line.startswith("train_batch_size") for line in lines)


def test_deepspeed_accepts_the_result():
    from deepspeed.runtime.config import DeepSpeedConfig

    given = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    }
    accepted = DeepSpeedConfig(resolved(given, steps_per_epoch=10).deepspeed)
    assert (accepted.train_batch_size, accepted.train_micro_batch_size_per_gpu) == (32, 32)
    assert accepted.optimizer_name == "adamw" and accepted.gradient_clipping == 1.0
    assert accepted.scheduler_params == {"warmup_num_steps": 2}
