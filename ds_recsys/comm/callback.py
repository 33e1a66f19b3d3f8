"""The Trainer's report of what compression saves, for `recsys.compression`."""

import json

from ds_recsys.callbacks import Callback

_EVERY = 50  # steps between events


class CompressionCallback(Callback):
    """Figures to DeepSpeed's monitor as the run goes; at its end the summary, and compression.json in the run's folder."""

    def on_step_end(self, trainer, loss) -> None:
        reducer, monitor = trainer.engine.gradient_compression.reducer, trainer.engine.monitor
        if reducer is None or not trainer.is_main or not monitor.enabled or trainer.state["step"] % _EVERY:
            return
        samples, totals = trainer.engine.global_samples, reducer.totals
        events = {"sent_bytes": totals.sent_bytes, "dense_bytes": totals.dense_bytes, "seconds": totals.seconds}
        if totals.errors:
            events["error"] = totals.errors[-1]
        monitor.write_events([(f"Compression/{name}", value, samples) for name, value in events.items()])

    def on_train_end(self, trainer) -> None:
        compression = trainer.engine.gradient_compression
        if trainer.is_main:
            print(compression.summary(), flush=True)
            figures = json.dumps(compression.as_dict(), indent=1)
            (trainer.run_dir / "compression.json").write_text(figures + "\n")
