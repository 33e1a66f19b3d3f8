"""The trainer on small grids: the same run whatever the cut, evaluation against brute force, divergence, monitor, API."""

import csv
import json

import pytest
import torch
from distributed import run_on_grid
from logs import config, write_log
from transformers import AutoModelForCausalLM

import ds_recsys
from ds_recsys import UserError
from ds_recsys.data import EvalBatches
from ds_recsys.metrics import RankingMetrics, seen_items, target_rank, top_k


def _config(**recsys):
    values = config(**recsys)
    values["recsys"]["dataset"]["shuffle_ties"] = True
    values["recsys"]["model"]["embedding_dropout"] = 0.2
    return values


def _losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def _train(folder, name, values):
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name)
    trainer.train()
    figures = trainer.evaluate("test")
    trainer.export(folder / f"{name}-export")
    return figures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    write_log(folder / "log.csv")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """Two epochs with every kind of dropout on pipe 2 x data 1: the figures on each rank."""
    return run_on_grid(
        _train, 2, folder=folder, name="pipe2", values=_config(training={"epochs": 2, "keep_best": False})
    )


def test_dropout_and_batches_do_not_depend_on_the_cut(folder, whole):
    values = _config(pipe=1, training={"epochs": 2, "keep_best": False})
    one = run_on_grid(_train, 1, folder=folder, name="pipe1", values=values)
    assert _losses(folder / "pipe1") == pytest.approx(_losses(folder / "pipe2"), abs=1e-5)
    assert one[0] == pytest.approx(whole[0], abs=1e-4)


def test_every_rank_has_the_same_figures(whole):
    assert whole[0] == whole[1]


@pytest.mark.parametrize("filter_seen", [True, False])
def test_evaluation_under_a_grid_equals_brute_force(folder, whole, filter_seen):
    found = run_on_grid(_evaluate, 4, folder=folder, filter_seen=filter_seen)
    model = AutoModelForCausalLM.from_pretrained(folder / "pipe2-export").eval()
    trainer = _open(folder)
    metrics = RankingMetrics([10], trainer.interactions.num_items)
    loss = 0.0
    for ids, (position, target, user) in EvalBatches(
        trainer.interactions, trainer.split, "test", max_length=16, batch_size=1
    ):
        with torch.no_grad():
            scores = model(ids[:, : int(position) + 1]).logits[:, -1]
        seen = seen_items(trainer.interactions, trainer.split, "test", user.numpy()) if filter_seen else None
        metrics.update(target_rank(scores, target, seen), top_k(scores, 10, seen))
        loss += torch.nn.functional.cross_entropy(scores, target).item() / 60
    expected = {**metrics.compute(), "loss": loss}
    for figures in found:
        assert figures == pytest.approx(expected, abs=1e-5)


class _open:
    """The log and its split, as a Trainer would read them."""

    def __init__(self, folder):
        from ds_recsys.assemble import load_interactions, split_interactions, with_sources

        dataset = with_sources(ds_recsys.load_config(_config()), data=folder / "log.csv").recsys.dataset
        self.interactions = load_interactions(dataset, folder / "cache")
        self.split = split_interactions(self.interactions, dataset)


def _evaluate(folder, filter_seen):
    values = _config(evaluation={"filter_seen": filter_seen, "batch_size": 7})
    export = str(folder / "pipe2-export")
    del values["recsys"]["model"]["config"]
    return ds_recsys.Trainer(values, data=folder / "log.csv", model=export, run_dir=None).evaluate("test")


def _evaluate_with_the_config_of_its_training(folder):
    values = _config()
    values["recsys"]["model"] = {"path": "smollm2-135m", "item_init": "titles", "weights": "random"}
    export = str(folder / "pipe2-export")
    return ds_recsys.Trainer(values, data=folder / "log.csv", model=export, run_dir=None).evaluate("test")


def test_an_export_is_evaluated_as_it_is(folder, whole):
    found = run_on_grid(_evaluate_with_the_config_of_its_training, 2, folder=folder)
    assert found[0] == pytest.approx(whole[0], abs=1e-6)


def _other_log(folder):
    write_log(folder / "other.csv", items=39)
    values = _config(pipe=1)
    del values["recsys"]["model"]["config"]
    with pytest.raises(UserError, match="knows 40 items and .* has 39"):
        ds_recsys.Trainer(values, data=folder / "other.csv", model=str(folder / "pipe2-export"), run_dir=None)


def test_export_with_another_catalogue_is_refused(folder, whole):
    run_on_grid(_other_log, 1, folder=folder)


def _run_again(folder):
    values = _config(pipe=1, training={"steps": 8}, checkpoint={"every_steps": 2, "every_epochs": 0})
    ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "again").train()
    with pytest.raises(UserError, match="again holds a run: --resume it, --overwrite it"):
        ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "again")
    values["recsys"]["training"]["steps"] = 2
    ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "again", overwrite=True).train()
    return sorted(path.name for path in (folder / "again" / "checkpoints").glob("step_*"))


def test_a_run_is_not_overwritten_by_accident(folder):
    assert run_on_grid(_run_again, 1, folder=folder) == [["step_00000002"]]


def _resume_at_bounds(folder):
    values = _config(training={"steps": 4}, checkpoint={"every_steps": 2, "every_epochs": 0})
    values["recsys"]["partition"] = {"bounds": [0, 1, 6]}
    first = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "bounds")
    assert first.pipe.parts == [0, 1, 6]
    first.train()
    learning_rate = first.engine.get_lr()
    del values["recsys"]["partition"]
    plain = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=None)
    again = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "bounds", resume=True)
    assert plain.pipe.parts != again.pipe.parts == [0, 1, 6]
    assert again.state["step"] == 4 and again.engine.get_lr() == learning_rate


def test_stage_bounds_and_schedule_are_restored(folder):
    run_on_grid(_resume_at_bounds, 2, folder=folder)


def _pretrained_learning_rate(folder):
    values = _config(pipe=1)
    values["optimizer"]["params"]["lr"] = values["scheduler"]["params"]["warmup_max_lr"] = "auto"
    model = str(folder / "pipe2-export")
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", model=model, run_dir=None)
    return trainer.config.deepspeed["optimizer"]["params"]["lr"]


def test_a_model_from_the_command_line_counts_as_pretrained(folder, whole):
    assert run_on_grid(_pretrained_learning_rate, 1, folder=folder) == [3e-4]


def _diverge(folder):
    values = _config(pipe=2, training={"epochs": 2})
    values["optimizer"]["params"]["lr"] = 1e30
    values["scheduler"]["params"]["warmup_max_lr"] = 1e30
    with pytest.raises(UserError, match="diverged"):
        ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "diverged").train()
    assert not list((folder / "diverged").glob("checkpoints/step_*"))


def test_divergence_stops_every_rank_and_saves_nothing(folder):
    run_on_grid(_diverge, 2, folder=folder)


def _monitored(folder):
    values = _config(training={"steps": 3, "eval_every_epochs": 1})
    values["csv_monitor"] = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "run"}
    ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "monitored").train()


def test_figures_reach_deepspeeds_monitor(folder):
    run_on_grid(_monitored, 2, folder=folder)
    rows = list(csv.reader(open(next((folder / "csv" / "run").glob("*Valid_NDCG@10*")))))
    assert len(rows) == 2 and 0 <= float(rows[1][1]) <= 1
    assert list((folder / "csv" / "run").glob("*Train_Samples_train_loss*"))


def _bf16(folder):
    values = _config(training={"epochs": 3})
    values["bf16"] = {"enabled": True}
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "bf16")
    before, _ = trainer.evaluate("test"), trainer.train()
    return before["loss"], trainer.evaluate("test")["loss"]


def test_bf16_trains_and_exports(folder):
    for before, after in run_on_grid(_bf16, 2, folder=folder):
        assert after < before - 0.1
    model = AutoModelForCausalLM.from_pretrained(folder / "bf16" / "best")
    assert model.dtype == torch.bfloat16
