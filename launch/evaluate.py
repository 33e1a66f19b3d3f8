"""Full-ranking evaluation of an exported model, under any grid.

deepspeed --num_gpus 4 launch/evaluate.py runs/quickstart/export --deepspeed_config ds_configs/quickstart.json
"""

import json

from command import arguments, run


def main(options) -> None:
    from ds_recsys import load_config

    config = load_config(options.deepspeed_config, overrides=options.set)
    config.resolve()  # a mistake shows at once; what is imported below takes seconds
    from ds_recsys import Trainer, report

    trainer = Trainer(config, data=options.data, model=options.model, run_dir=None)
    figures = trainer.evaluate(options.which)
    if trainer.is_main:
        print(f"\n{trainer.protocol(options.which)}\n{report.table({'model': figures}, config.recsys.evaluation.k[0])}")
        if options.json:
            with open(options.json, "w") as file:
                json.dump({"protocol": trainer.protocol(options.which), **figures}, file, indent=2)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("model", help="exported folder")
    parser.add_argument("--deepspeed_config", required=True, help="ds_config JSON with a recsys block")
    parser.add_argument("--data", help="interaction log; in place of recsys.dataset.path")
    parser.add_argument("--which", choices=("valid", "test"), default="test", help="held-out items (test)")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. recsys.evaluation.filter_seen=false"
    )
    run(main, parser)
