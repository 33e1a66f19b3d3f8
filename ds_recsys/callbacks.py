"""What a Trainer calls as it goes: subclass `Callback` and override what you need."""

import sys
import time
from collections import deque

import torch
from tqdm import tqdm


class Callback:
    """Every method is called on every rank; the engine is `trainer.engine`, the counters are in `trainer.state`."""

    def on_train_begin(self, trainer) -> None:
        """Before the first step, after a resume."""

    def on_step_end(self, trainer, loss) -> None:
        """After each optimizer step. `loss` is a 0-d tensor on the device: reading it waits for the device."""

    def on_validation(self, trainer, metrics: dict[str, float]) -> None:
        """After each validation, with its figures."""

    def on_train_end(self, trainer) -> None:
        """After the last step."""


class Progress(Callback):
    """Rank 0: a bar with loss, samples/s and time left on a terminal; elsewhere one line per validation."""

    def on_train_begin(self, trainer) -> None:
        self._bar, self._losses = None, deque(maxlen=500)  # since the last validation: one batch says little
        self._started, self._from_step = time.monotonic(), trainer.state["step"]
        if trainer.is_main and sys.stderr.isatty():
            samples = trainer.engine.train_batch_size()
            self._bar = tqdm(
                total=trainer.total_steps * samples, initial=self._from_step * samples, unit="sample", unit_scale=True
            )

    def on_step_end(self, trainer, loss) -> None:
        if trainer.is_main:
            self._losses.append(loss)
        if self._bar is not None:
            self._bar.update(trainer.engine.train_batch_size())
            if trainer.state["step"] % 10 == 0:
                self._bar.set_postfix(loss=f"{loss.item():.3f}")

    def on_validation(self, trainer, metrics) -> None:
        if not trainer.is_main:
            return
        step, seconds = trainer.state["step"], time.monotonic() - self._started
        done = max(step - self._from_step, 1)
        left = seconds / done * (trainer.total_steps - step)
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        mean = torch.stack(list(self._losses)).mean().item()
        line = (
            f"step {step}/{trainer.total_steps}  training loss {mean:.4f}  |  {figures}  |  "
            f"{done * trainer.engine.train_batch_size() / seconds:.0f} samples/s  {left:.0f} s left"
        )
        self._losses.clear()
        tqdm.write(line) if self._bar is not None else print(line, flush=True)

    def on_train_end(self, trainer) -> None:
        if self._bar is not None:
            self._bar.close()


def standard_callbacks(recsys) -> list[Callback]:
    """What a Trainer brings by itself: the progress bar, and what the config's "recsys" block switches on."""
    callbacks: list[Callback] = [Progress()]
    if recsys.timeline.enabled:
        from ds_recsys.timeline.callback import TimelineCallback  # reads this file

        callbacks.append(TimelineCallback())
    if recsys.data_parallel.mode != "sync":
        from ds_recsys.comm.modes.callback import ModeCallback

        callbacks.append(ModeCallback())
    elif recsys.compression.method != "none":
        from ds_recsys.comm.callback import CompressionCallback

        callbacks.append(CompressionCallback())
    if recsys.partition.measured:
        from ds_recsys.balance.callback import PartitionCallback

        callbacks.append(PartitionCallback())
    return callbacks
