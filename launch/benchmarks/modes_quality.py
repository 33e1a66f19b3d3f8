"""Part "quality" of bench.py modes: whole trainings of each mode and seed, on equally many samples, without the cluster.

Links change no result but that of `async`, whose replicas have equal speeds here and share the machine's cores: the rows
say how old the weights of the others were.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import quality
from benchmarks.modes_arms import SYNC, arm, settings

_VALIDATIONS = 10  # of a training


def trainings(config: Path, options, kept: list[dict]) -> Iterator[dict]:
    """Rows of kind "quality", seed by seed, so that a broken-off run has whole seeds; those in `kept` are taken over."""
    arms = [(SYNC, "none"), *((mode, method) for method in options.methods for mode in options.modes)]
    place = {"ranks": options.ranks, "epochs": options.epochs, "every": options.every, "batch": options.batch}
    for seed in options.seeds:
        for mode, method in dict.fromkeys(arms):
            wanted = {"kind": "quality", "mode": mode, "method": method, "seed": seed, **place}
            found = [row for row in kept if wanted.items() <= row.items() and "error" not in row]
            yield found[0] if found else train(config, wanted, options.data, Path(options.run_dir))


def train(config: Path, row: dict, data: str | None, folder: Path) -> dict:
    """`row` with the validation losses of a training, its last figures, and how old weights were (async: of replica 0)."""
    from ds_recsys.errors import UserError
    from ds_recsys.runlog import read_log

    name = f"{arm(row['mode'], row['method'])}-seed{row['seed']}"
    changes = settings(config, row["mode"], row["method"], row["ranks"], row["every"], batch=row.get("batch"))
    changes["recsys.training.eval_every_epochs"] = max(1, (row["epochs"] or 1) // _VALIDATIONS)
    if row["epochs"]:
        changes["recsys.training.epochs"] = row["epochs"]
    texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]
    print(f"\n{name}", flush=True)
    try:
        result = quality.train(config, data, row["seed"], row["ranks"], folder / name, texts)
    except UserError as error:
        return {**row, "error": str(error)}
    records, report = read_log(folder / name / "log.jsonl"), folder / name / "data_parallel.json"
    figures = json.loads(report.read_text()) if report.exists() else {}
    own = [record["loss"] for record in records if "loss" in record]
    return {
        **row,
        "steps": figures.get("progress", len(own)),
        "valid": [record["valid"]["loss"] for record in records if "valid" in record],
        "valid_ndcg": [record["valid"]["NDCG@10"] for record in records if "valid" in record],
        "ndcg": result["trained"]["NDCG@10"],
        "hit_rate": result["trained"]["HR@10"],
        "train_seconds": result["seconds"]["train"],
        "staleness": figures.get("staleness_mean"),
    }
