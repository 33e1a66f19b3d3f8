"""The Trainer's report of a mode, for `recsys.data_parallel`."""

import json

from ds_recsys.callbacks import Callback


class ModeCallback(Callback):
    """At the end of a run the mode's summary, and data_parallel.json in the run's folder."""

    def on_train_end(self, trainer) -> None:
        if trainer.is_main:
            print(trainer.mode.summary(), flush=True)
            figures = json.dumps(trainer.mode.as_dict(), indent=1)
            (trainer.run_dir / "data_parallel.json").write_text(figures + "\n")
