"""A head in several pipeline layers: the same training, figures and exports as in one, wherever its blocks are."""

import json
from itertools import chain
from unittest.mock import patch

import pytest
import torch
from distributed import run_on_grid
from logs import config, write_log
from safetensors.torch import load_file

import ds_recsys
from ds_recsys import UserError, compat
from ds_recsys.balance.migrate import migrate
from ds_recsys.head import split
from ds_recsys.head.split import SplitHead
from ds_recsys.models import ModelBuilder, recommender_config
from ds_recsys.models.convert import convert_checkpoint
from ds_recsys.models.slices import joined

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "tie_word_embeddings": False, "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    write_log(folder / "log.csv")
    return folder


def _values(pipe=1, data=1, zero=0, bf16=False, model=None, clip=1.0, **recsys):
    training = {"epochs": 2, "keep_best": False, **recsys.pop("training", {})}
    values = config(pipe=pipe, data=data, training=training, **recsys)
    values["optimizer"]["params"]["weight_decay"] = 0.0  # a stage of rows alone has no vectors to spare
    values["zero_optimization"]["stage"] = zero
    values["bf16"] = {"enabled": bf16}
    values["gradient_clipping"] = clip
    values["recsys"]["model"] = {"config": model or LLAMA}
    return values


def _train(folder, name, values, **options):
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name, **options)
    trainer.train()
    figures = trainer.evaluate("test")
    trainer.export(folder / f"{name}-export")
    return figures


def _losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def _tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def _compare(folder, name, cut, tolerance=1e-5, figures_tolerance=1e-4, **options):
    """Train unsplit on one stage (data 1) and split as `cut` says; everything must be equal."""
    blocks, bounds, data = cut
    whole = run_on_grid(_train, 1, folder=folder, name=f"{name}-whole", values=_values(**options))
    options["head"] = {**options.get("head", {}), "blocks": blocks}
    pipe = len(bounds) - 1
    values = _values(pipe, data, partition={"bounds": bounds}, **options)
    parts = run_on_grid(_train, pipe * data, folder=folder, name=name, values=values)
    losses = _losses(folder / f"{name}-whole")
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.2
    assert _losses(folder / name) == pytest.approx(losses, abs=tolerance)
    assert all(figures == parts[0] for figures in parts)
    assert parts[0] == pytest.approx(whole[0], abs=figures_tolerance)
    exported, expected = _tensors(folder / f"{name}-export"), _tensors(folder / f"{name}-whole-export")
    assert exported.keys() == expected.keys()
    for key, value in exported.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=100 * tolerance, msg=key)
    return exported


def test_on_one_stage(folder):
    _compare(folder, "one", (4, [0, 9], 1))


def test_blocks_on_two_stages(folder):
    _compare(folder, "two", (4, [0, 6, 9], 1), zero=1, training={"label_smoothing": 0.1})


def test_begins_on_a_stage_without_data(folder):
    _compare(folder, "three", (4, [0, 2, 6, 9], 1), training={"activation_checkpoint_interval": 1})


def test_recomputed_in_groups_on_four_stages(folder):
    """The group of the last decoder layer, the norm and the entry is kept: it would take the next targets."""
    bounds, options = [0, 1, 7, 8, 10], {"activation_checkpoint_interval": 4}
    _compare(folder, "four", (5, bounds, 1), zero=1, training=options)


def test_two_replicas(folder):
    _compare(folder, "replicas", (3, [0, 6, 8], 2), zero=1)


def test_bf16(folder):
    _compare(folder, "bf16", (4, [0, 3, 7, 9], 1), 5e-3, 5e-2, zero=1, bf16=True)


def test_cosine_scores(folder):
    _compare(folder, "cosine", (4, [0, 6, 9], 1), head={"cosine_scale": 8.0})


def test_transform_and_bias_of_the_head(folder):
    """BERT's head: a transform, whose parameters stay with the entry, and a bias, which is cut like the rows."""
    exported = _compare(folder, "bert", (4, [0, 2, 6, 9], 1), model=BERT)
    assert {"cls.predictions.decoder.bias", "cls.predictions.transform.dense.weight"} <= exported.keys()


@pytest.mark.parametrize("model", [LLAMA, BERT], ids=["llama", "bert"])
def test_the_random_rows_are_the_unsplit_heads_cut(model):
    model = recommender_config(model, 40)
    whole = {n: p for spec in ModelBuilder(model, seed=3).specs() for n, p in spec.build().named_parameters()}
    builder = ModelBuilder(model, seed=3, split_head=SplitHead(4))
    layers = [spec.build() for spec in builder.specs()]
    found = joined(
        {
            name: value
            for layer in layers
            for name, value in layer.state_dict().items()
            if name in dict(layer.named_parameters())
        }
    )
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    counted = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert builder.parameter_counts() == counted and builder.tail() == 1
    assert max(counted[-4:]) - min(counted[-4:]) in (32, 33)  # one row, and its bias


def _stream(folder, name, values, moves):
    """Steps over one iterator that goes on from step to step, and after the moves; losses and weights of every stage."""
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name)
    epochs = chain.from_iterable(trainer.batches.epoch_iterator(epoch, 0) for epoch in (0, 1))
    stream, losses = chain.from_iterable(epochs), []
    for step in range(10):
        trainer.engine.reset_activation_shape()
        compat.seed_dropout(trainer.engine, step)
        losses.append(trainer.engine.train_batch(stream).item())
        if step in moves:
            migrate(trainer.engine, moves[step])
    return losses, {name: value.clone() for name, value in trainer.pipe.hf_state_dict().items()}, trainer.evaluate()


@pytest.mark.parametrize("mode", [{}, {"zero": 1, "bf16": True}], ids=["fp32", "bf16"])
def test_blocks_move_while_training(folder, mode):
    moves = {2: [0, 3, 5, 9], 4: [0, 3, 4, 9], 6: [0, 1, 8, 9], 8: [0, 6, 7, 9]}  # the entry: stage 1, 2, 1, 0
    values = _values(3, head={"blocks": 4}, partition={"bounds": [0, 2, 6, 9]}, clip=0.0, **mode)
    name = f"moved-{len(mode)}"
    still = run_on_grid(_stream, 3, folder=folder, name=f"{name}-still", values=values, moves={})
    moved = run_on_grid(_stream, 3, folder=folder, name=name, values=values, moves=moves)
    assert moved[0][0] == still[0][0]
    assert all(rank[2] == pytest.approx(still[0][2], abs=1e-5) for rank in moved)
    weights = [{name: value for rank in ranks for name, value in rank[1].items()} for ranks in (moved, still)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert sum("lm_head" in name for name in moved[0][1]) == 1  # [0, 6, 7, 9]: the first block on stage 0


def _run(folder, name, values, steps, resume=False):
    values["recsys"]["training"] = {"steps": 8, "eval_every_epochs": 0, "keep_best": False}
    values["recsys"]["checkpoint"] = {"every_steps": 4, "every_epochs": 0}
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name, resume=resume)
    trainer.total_steps = steps
    trainer.train()


SPLIT, WHOLE, OTHER = (4, 2), (1, 1), (3, 2)  # (blocks, stages)
MODES = {"zero0": {}, "zero1": {"zero": 1}, "bf16": {"zero": 1, "bf16": True}}


@pytest.mark.parametrize(
    "there, back, mode",
    [
        (SPLIT, SPLIT, "bf16"),
        (SPLIT, WHOLE, "zero0"),
        (SPLIT, WHOLE, "zero1"),
        (WHOLE, SPLIT, "zero0"),
        (WHOLE, SPLIT, "bf16"),
        (SPLIT, OTHER, "zero1"),
    ],
)
def test_a_run_goes_on_with_another_split(folder, there, back, mode):
    name = f"resumed-{there[0]}-{back[0]}-{mode}"
    mode = MODES[mode]
    values = {cut: _values(cut[1], head={"blocks": cut[0]}, **mode) for cut in (there, back)}
    run_on_grid(_run, there[1], folder=folder, name=f"{name}-whole", values=values[there], steps=8)
    run_on_grid(_run, there[1], folder=folder, name=name, values=values[there], steps=4)
    run_on_grid(_run, back[1], folder=folder, name=name, values=values[back], steps=8, resume=True)
    losses = _losses(folder / f"{name}-whole")
    assert len(losses) == 8
    assert _losses(folder / name) == pytest.approx(losses, abs=4e-3 if "bf16" in mode else 1e-5)
    if there == back:
        assert _losses(folder / name) == losses


def test_checkpoints_become_folders_and_the_best_weights_are_loaded(folder):
    training = {"keep_best": True, "epochs": 2}
    values = _values(2, head={"blocks": 4}, partition={"bounds": [0, 6, 9]}, training=training)
    figures = run_on_grid(_train, 2, folder=folder, name="kept", values=values)
    best = _tensors(folder / "kept" / "best")
    exported = _tensors(folder / "kept-export")
    assert best.keys() == exported.keys() and all(torch.equal(best[name], exported[name]) for name in best)
    checkpoint = max((folder / "kept" / "checkpoints").glob("step_*"))
    out = convert_checkpoint(checkpoint, folder / "kept" / "model", folder / "kept-converted")
    converted = _tensors(out)
    assert converted.keys() == exported.keys()
    assert all(converted[name].shape == exported[name].shape for name in exported)
    again = run_on_grid(_evaluate, 2, folder=folder, values=values, model=str(folder / "kept-export"))
    assert again[0] == pytest.approx(figures[0], abs=1e-6)


def _evaluate(folder, values, model):
    """A split head from an exported folder, on other bounds."""
    values["recsys"]["partition"] = {"bounds": [0, 7, 9]}
    return ds_recsys.Trainer(values, data=folder / "log.csv", model=model, run_dir=None).evaluate("test")


def _misuse(folder, values):
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "misuse")
    micro_batches = next(iter(trainer.batches.epoch_iterator(0, 0)))
    engine, found = trainer.engine, []

    def attempt(action):
        with pytest.raises(UserError) as error:
            action()
        found.append(str(error.value))

    attempt(lambda: trainer.pipe.logits(torch.zeros(1, 32)))
    attempt(lambda: engine.train_batch())
    expected = engine.eval_batch(iter(micro_batches)).item()
    trained = engine.train_batch(iter(micro_batches)).item()
    assert trained == pytest.approx(expected, rel=1e-6)  # eval_batch computes the loss that train_batch does
    attempt(lambda: trainer.pipe.train()(micro_batches[0][0]))
    (targets, scale), builder = micro_batches[0][1], trainer.pipe.builder
    carried = split.begin(torch.zeros(*targets.shape, 32), targets, builder.split_head)
    attempt(lambda: trainer.pipe.loss_fn(carried, (targets.clone().fill_(7), scale)))
    return found


def test_what_cannot_be_is_refused(folder):
    found = run_on_grid(_misuse, 1, folder=folder, values=_values(head={"blocks": 4}))[0]
    for line, words in zip(
        found, ("rank with pipe.head()", "give train_batch and eval_batch the data", "pipeline_engine", "different targets"),
        strict=True,
    ):  # fmt: skip
        assert words in line and "\n" not in line
    tied = recommender_config({**LLAMA, "tie_word_embeddings": True}, 40)
    with pytest.raises(UserError, match=r'set recsys.model.tie to false, or "tie_word_embeddings": false'):
        ModelBuilder(tied, split_head=SplitHead(4)).specs()
    with pytest.raises(UserError, match="the table has 41 rows"):
        ModelBuilder(recommender_config(LLAMA, 40), split_head=SplitHead(42)).specs()
    with (
        patch("ds_recsys.head.split.LARGEST_TABLE", 40),
        pytest.raises(UserError, match="41 rows are more than the 40"),
    ):
        ModelBuilder(recommender_config(LLAMA, 40), split_head=SplitHead(4)).specs()
    for changes, words in (
        ({"head": {"blocks": 4, "loss": "sampled"}}, 'blocks 4 needs loss "full"'),
        ({"head": {"blocks": 4, "kernel": "liger"}}, 'kernel "torch", not "full" and "liger"'),
        ({"head": {"blocks": 4}, "tensor": 2}, '"recsys.tensor" 2, whose ranks share the head'),
        ({"head": {"blocks": 4}, "model": {"config": LLAMA, "tie": True}}, '"recsys.model.tie" is true'),
    ):
        with pytest.raises(UserError, match=words):
            ds_recsys.load_config({"train_batch_size": 16, "recsys": changes})
