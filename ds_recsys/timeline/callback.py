"""The Trainer's timeline, for `recsys.timeline.enabled`."""

import json

from ds_recsys.callbacks import Callback
from ds_recsys.timeline.report import ReportedTimeline


class TimelineCallback(Callback):
    """Times every step of `train()`; at its end prints the summary.

    The run's folder gets timeline.json (`Summary.as_dict`) and trace.json (see `ds_recsys.timeline.trace`).
    """

    def on_train_begin(self, trainer) -> None:
        options = trainer.config.recsys.timeline
        self._timeline = ReportedTimeline(trainer.engine, options, trainer.run_dir / "trace.json")

    def on_train_end(self, trainer) -> None:
        summary = self._timeline.summary()
        self._timeline.close()
        if trainer.is_main:
            print(summary.describe(), flush=True)
            (trainer.run_dir / "timeline.json").write_text(json.dumps(summary.as_dict(), indent=1) + "\n")
