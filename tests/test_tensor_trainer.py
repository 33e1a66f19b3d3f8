"""Runs on a tensor axis: the same losses, figures and exports as without one, whatever the loss of the head."""

import json

import pyarrow.parquet
import pytest
import torch
from distributed import run_on_grid
from logs import config, write_log
from transformers import AutoModelForCausalLM

import ds_recsys
from ds_recsys.serving.recommender import Recommender

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,  # 6 + 3 on two ranks, and 2 + 1 key-value heads
    "num_key_value_heads": 3,
    "head_dim": 4,
    "initializer_range": 0.1,
}
_GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "initializer_range": 0.1,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor")
    write_log(folder / "log.csv")
    return folder


def _values(model, pipe, tensor, **recsys):
    values = config(pipe=pipe, tensor=tensor, training={"epochs": 2, "keep_best": False}, **recsys)
    values["recsys"]["model"] = {"config": model}
    return values


def _train(folder, name, values):
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name)
    trainer.train()
    figures = trainer.evaluate("test")
    trainer.export(folder / f"{name}-export")
    parts = {name: value.clone() for name, value in trainer.pipe.hf_state_dict().items()}
    axis = trainer.pipe.builder.tensor
    return {"figures": figures, "tensor": axis.rank, "parts": parts, "shards": trainer.pipe.builder.shards()}


def _losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("model", [_LLAMA, _GPT2], ids=["llama", "gpt2"])
def test_a_tensor_axis_changes_no_figure(folder, model):
    name = model["model_type"]
    (one,) = run_on_grid(_train, 1, folder=folder, name=name, values=_values(model, 1, 1))
    for pipe, tensor, options in ((1, 2, {}), (2, 2, {}), (1, 2, {"sequence_parallel": True})):
        if options and name == "gpt2":
            continue  # its plan is our own: refused, see test_tensor_plan.py
        values = _values(model, pipe, tensor, **options)
        run = f"{name}-{pipe}-{tensor}-{len(options)}"
        results = run_on_grid(_train, pipe * tensor, folder=folder, name=run, values=values)
        assert _losses(folder / run) == pytest.approx(_losses(folder / name), abs=1e-4)
        for result in results:
            assert result["figures"] == pytest.approx(one["figures"], abs=2e-3)


@pytest.fixture(scope="module")
def exported(folder):
    """What the ranks of pipe 2 x tensor 2 return; the export is in export-export."""
    return run_on_grid(_train, 4, folder=folder, name="export", values=_values(_LLAMA, 2, 2))


def test_an_export_holds_the_gathered_weights_bit_by_bit(folder, exported):
    model = AutoModelForCausalLM.from_pretrained(folder / "export-export")
    shards = exported[0]["shards"]
    parts = [{n: v for r in exported if r["tensor"] == rank for n, v in r["parts"].items()} for rank in (0, 1)]
    state = model.state_dict()
    assert state.keys() == parts[0].keys() == parts[1].keys() and shards.keys() < state.keys()
    for name, value in state.items():
        both = [part[name] for part in parts]
        assert torch.equal(shards[name].merge(both) if name in shards else both[0], value), name


def _evaluate(folder, export, values):
    del values["recsys"]["model"]
    values["recsys"]["evaluation"] = {"batch_size": 7}  # several lengths in one pass through the pipeline
    return ds_recsys.Trainer(values, data=folder / "log.csv", model=str(export), run_dir=None).evaluate("test")


def test_an_export_of_a_grid_is_evaluated_on_others(folder, exported):
    figures = [
        run_on_grid(
            _evaluate, pipe * tensor, folder=folder, export=folder / "export-export", values=_values({}, pipe, tensor)
        )[0]
        for pipe, tensor in ((1, 1), (2, 2), (1, 2), (1, 3))
    ]
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], abs=1e-6)


@pytest.mark.parametrize(
    "head, zero",
    [
        ({"loss": "sampled", "negatives": 16}, 0),
        ({"loss": "sampled", "negatives": 16}, 1),
        ({"loss": "sampled", "negatives": 16, "sampling": "popularity"}, 0),
        ({"loss": "sampled", "sampling": "in_batch"}, 0),
        ({"loss": "gbce", "negatives": 16}, 0),
        ({"cosine_scale": 8.0}, 1),
    ],
    ids=["uniform", "uniform-zero1", "popularity", "in_batch", "gbce", "cosine"],
)
def test_other_heads_learn_on_a_full_grid(folder, head, zero):
    name = f"{'-'.join(map(str, head.values()))}-{zero}"
    values = _values(_LLAMA, 2, 2, head=head)
    values["zero_optimization"]["stage"] = zero
    first, last = run_on_grid(_learn, 4, timeout=240, folder=folder, name=name, values=values)[0]
    losses = _losses(folder / name)
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    if head.get("loss") != "gbce":  # which needs more steps than these to rank well
        assert last["NDCG@10"] > first["NDCG@10"] + 0.05, (first, last)


def _learn(folder, name, values):
    values["recsys"]["training"]["epochs"] = 6
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name)
    sparse = trainer.config.recsys.head.sparse_gradients
    assert sparse is (values["zero_optimization"]["stage"] == 0 and "loss" in values["recsys"]["head"])
    before, _ = trainer.evaluate("test"), trainer.train()
    return before, trainer.evaluate("test")


@pytest.mark.parametrize("pipe, tensor, ranks", [(2, 1, 2), (1, 1, 2), (2, 2, 4)])
def test_row_sparse_gradients_train_as_dense_ones(folder, pipe, tensor, ranks):
    """With every item drawn each row is in the gradient, so the lazy Adam is Adam: tied table, clipping, data ranks."""
    name = f"rows-{pipe}-{tensor}"
    head = {"loss": "sampled", "negatives": 40}
    for sparse in (True, False):
        # GPT-2's table knows no padding index, for which torch would copy the gradient that arrives
        model = _GPT2 if (pipe, tensor) == (2, 1) else {**_LLAMA, "tie_word_embeddings": True}
        values = _values(model, pipe, tensor, head={**head, "sparse_gradients": sparse})
        values["zero_optimization"]["stage"] = 0
        values["gradient_clipping"] = 0.1
        if pipe == 2:
            layers = 6 if model is _GPT2 else 5
            values["recsys"]["partition"] = {"bounds": [0, 1, layers]}  # the first stage ends in the table
        run_on_grid(_train, ranks, folder=folder, name=f"{name}-{sparse}", values=values)
    assert _losses(folder / f"{name}-True") == pytest.approx(_losses(folder / f"{name}-False"), abs=1e-5)


def test_a_sampled_run_resumes_with_the_same_draws(folder):
    def values(epochs):
        given = _values(_LLAMA, 1, 2, head={"loss": "sampled", "negatives": 8}, checkpoint={"every_epochs": 1})
        given["recsys"]["training"]["epochs"] = epochs
        del given["scheduler"]  # which depends on the length of the run
        return given

    run_on_grid(_train, 2, folder=folder, name="draws-whole", values=values(2))
    run_on_grid(_train, 2, folder=folder, name="draws", values=values(1))
    run_on_grid(_resume, 2, folder=folder, name="draws", values=values(2))
    assert _losses(folder / "draws") == _losses(folder / "draws-whole")


def _resume(folder, name, values):
    ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name, resume=True).train()


def test_a_cosine_head_is_served_and_evaluated_as_it_was_trained(folder):
    values = _values({**_LLAMA, "tie_word_embeddings": True}, 1, 2, head={"cosine_scale": 8.0})
    trained = run_on_grid(_train, 2, folder=folder, name="cosine", values=values)[0]["figures"]
    again = run_on_grid(
        _evaluate, 1, folder=folder, export=folder / "cosine-export", values=_values({}, 1, 1)
    )[0]  # fmt: skip
    assert again == pytest.approx(trained, abs=1e-6)
    found = Recommender.from_pretrained(folder / "cosine-export").recommend(["i3", "i4"], 38)
    model = AutoModelForCausalLM.from_pretrained(folder / "cosine-export").eval()
    catalogue = pyarrow.parquet.read_table(folder / "cosine-export" / "items.parquet")["id"].to_pylist()
    rows = torch.tensor([[catalogue.index(item) + 1 for item in ("i3", "i4")]])
    with torch.no_grad():
        hidden = model.model(rows).last_hidden_state[0, -1:]
        cosines = torch.cosine_similarity(hidden, model.get_input_embeddings().weight)
    expected = {item: 8 * cosines[index + 1].item() for index, item in enumerate(catalogue)}
    assert {item.item: item.score for item in found} == pytest.approx(
        {name: score for name, score in expected.items() if name not in ("i3", "i4")}, abs=1e-5
    )
