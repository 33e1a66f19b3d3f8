"""The "data_parallel" block: which keys belong to which mode, and what is refused with what, each in one line."""

import pytest
from test_config import refused

from ds_recsys.config import load_config
from ds_recsys.config.data_parallel import DataParallel

_BLOCKS = {
    "every of sync": ({"every": 4}, ('"every"', "local_sgd", '"sync"')),
    "dense_until of delayed": ({"mode": "delayed", "dense_until": 4}, ('"dense_until"', '"delayed"')),
    "ahead of diloco": ({"mode": "diloco", "look_ahead": True}, ('"look_ahead"', "delayed")),
    "ahead and correction": (
        {"mode": "delayed", "look_ahead": True, "delay_correction": 0.1},
        ('"look_ahead"', '"delay_correction"'),
    ),
    "correction of diloco": ({"mode": "diloco", "delay_correction": 0.1}, ('"delay_correction"', "delayed")),
    "outer of local_sgd": ({"mode": "local_sgd", "outer_lr": 0.5}, ('"outer_lr"', "diloco")),
    "momentum of local_sgd": ({"mode": "local_sgd", "outer_momentum": 0.5}, ('"outer_momentum"', "diloco")),
    "fragments of local_sgd": ({"mode": "local_sgd", "fragments": 2}, ('"fragments"', "diloco")),
    "overlap of async": ({"mode": "async", "overlap_steps": 2}, ('"overlap_steps"', "diloco")),
    "mixing of delayed": ({"mode": "delayed", "mixing": 0.5}, ('"mixing"', "diloco")),
    "staleness of diloco": ({"mode": "diloco", "max_staleness": 5}, ('"max_staleness"', "async")),
    "send_every of diloco": ({"mode": "diloco", "send_every": 2}, ('"send_every"', "async")),
    "send_every": ({"mode": "async", "send_every": 100}, ('"send_every" 100', '"max_staleness" 100', "lower it")),
    "on_lost of local_sgd": ({"mode": "local_sgd", "on_lost": "continue"}, ('"on_lost"', "async")),
    "on_lost of diloco": ({"mode": "diloco", "on_lost": "continue"}, ('"on_lost"', "every average", '"stop"')),
    "overlap": ({"mode": "diloco", "every": 4, "overlap_steps": 4}, ('"overlap_steps" 4', '"every" 4')),
    "fragments": ({"mode": "diloco", "every": 4, "fragments": 5}, ('"fragments" 5', '"every" 4')),
    "mixing": ({"mode": "diloco", "mixing": 1.0}, ("mixing", "less than 1")),
    "no mode": ({"mode": "hogwild"}, ("mode", "hogwild", "diloco")),
}


@pytest.mark.parametrize("case", _BLOCKS)
def test_a_key_without_meaning_is_one_line(case):
    block, words = _BLOCKS[case]
    refused(lambda: load_config({"train_batch_size": 8, "recsys": {"data_parallel": block}}), "data_parallel", *words)


def _config(mode, recsys=None, **deepspeed):
    values = {"train_batch_size": 8, **deepspeed, "recsys": {"data_parallel": {"mode": mode}, **(recsys or {})}}
    return lambda: load_config(values)


@pytest.mark.parametrize("mode", ["delayed", "local_sgd", "diloco", "async"])
@pytest.mark.parametrize(
    "recsys, deepspeed, words",
    [
        ({}, {"zero_optimization": {"stage": 1}}, ('"zero_optimization.stage" 1', "stage 0")),
        ({}, {"fp16": {"enabled": True}}, ('"fp16.enabled"', "loss scale")),
        ({}, {"communication_data_type": "bf16"}, ('"communication_data_type" "bf16"', "remove")),
        ({"pipe": 2, "partition": {"method": "adaptive"}}, {}, ('"recsys.partition.method" "adaptive"', "uniform")),
        ({"head": {"loss": "sampled", "sparse_gradients": True}}, {}, ("sparse_gradients", '"auto"')),
        ({"compression": {"method": "topk", "momentum": 0.9}}, {}, ("recsys.compression.momentum", "remove")),
    ],
    ids=["ZeRO", "fp16", "communication dtype", "partition", "rows", "momentum"],
)
def test_what_no_mode_can_do_is_one_line(mode, recsys, deepspeed, words):
    refused(_config(mode, recsys, **deepspeed), f'"recsys.data_parallel.mode" "{mode}"', *words)
    load_config({"train_batch_size": 8, **deepspeed, "recsys": recsys})


@pytest.mark.parametrize("mode", ["local_sgd", "diloco", "async"])
def test_bf16_is_for_modes_with_equal_replicas(mode):
    refused(_config(mode, bf16={"enabled": True}), f'"{mode}"', '"bf16.enabled"', "fp32")
    _config("delayed", bf16={"enabled": True})()
    ahead = {"data_parallel": {"mode": "delayed", "look_ahead": True}}
    refused(_config("delayed", ahead, bf16={"enabled": True}), '"look_ahead"', '"bf16.enabled"', "fp32")


def test_row_gradients_become_dense_by_themselves():
    for mode, rows in (("sync", True), ("delayed", False), ("diloco", False)):
        config = _config(mode, {"head": {"loss": "sampled"}})().resolve(world_size=1, local_world_size=1)
        assert config.recsys.head.sparse_gradients is rows


def test_sync_is_the_default():
    assert DataParallel() == DataParallel(mode="sync") and not DataParallel().local
    assert DataParallel(mode="diloco").local and not DataParallel(mode="delayed").local
