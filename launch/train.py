"""Fine-tune a Hugging Face LLM as a recommender, evaluate it, compare it with the baselines and write the report.

deepspeed launch/train.py --deepspeed_config ds_configs/quickstart.json --data ml-100k --run_dir runs/quickstart
(the same under torchrun and accelerate launch; alone, `python launch/train.py ...` is a world of one rank)
"""

import time

from command import arguments, run


def main(options) -> None:
    from ds_recsys import load_config

    config = load_config(options.deepspeed_config, overrides=options.set)
    config.resolve()  # a mistake shows at once; what is imported below takes seconds
    from ds_recsys import Trainer, report

    trainer = Trainer(
        config,
        data=options.data,
        model=options.model,
        run_dir=options.run_dir,
        resume=options.resume or False,
        overwrite=options.overwrite,
    )
    if trainer.is_main:
        print(trainer.describe(), flush=True)
    seconds, state = {}, trainer.state
    started = time.monotonic()
    if "untrained" not in state:
        state["baselines"] = report.baselines(trainer, options.baselines) if trainer.is_main else {}
        state["untrained"] = trainer.evaluate("test")
    seconds["before training"] = time.monotonic() - started

    started = time.monotonic()
    trainer.train()
    seconds["train"] = time.monotonic() - started

    started = time.monotonic()
    trained = trainer.evaluate("test")
    seconds["evaluate"] = time.monotonic() - started
    trainer.export(trainer.run_dir / "export")
    if trainer.is_main:
        results = {**state["baselines"], "untrained": state["untrained"], "trained": trained}
        protocol = trainer.protocol("test")
        report.write(trainer.run_dir, results, protocol, seconds)
        k = trainer.config.recsys.evaluation.k[0]
        print(f"\n{protocol}\n{report.table(results, k)}\n")
        print(f"training curve: {report.plot(trainer.run_dir, k)}\nmodel: {trainer.run_dir / 'export'}")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--deepspeed_config", required=True, help="ds_config JSON with a recsys block")
    parser.add_argument("--data", help="interaction log; in place of recsys.dataset.path")
    parser.add_argument("--model", help="hub id or folder; in place of recsys.model.path")
    parser.add_argument("--run_dir", default="runs/train", help="checkpoints, best model, log, report (runs/train)")
    parser.add_argument(
        "--resume", nargs="?", const=True, help="continue from the newest checkpoint, or from the one named"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew in a --run_dir that holds a run")
    parser.add_argument(
        "--baselines", nargs="*", choices=("popularity", "item_knn"), default=["popularity", "item_knn"],
        help="what to compare with (both); ItemKNN's cost grows with the square of the history lengths",
    )  # fmt: skip
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. recsys.pipe=4")
    run(main, parser)
