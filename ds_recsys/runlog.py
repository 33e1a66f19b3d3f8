"""log.jsonl of a run: a line per optimizer step and per validation."""

import json
import time
from pathlib import Path

import torch


class RunLog:
    """Losses are written twenty at a time, for reading one waits for the device; `flush` before anything that counts.

    Args:
        path: the file.
        keep_until_step: what a resumed run keeps of it; 0 starts anew.
    """

    def __init__(self, path: Path, keep_until_step: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(path) if record["step"] <= keep_until_step] if keep_until_step else []
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file, self._pending, self._started = open(path, "a"), [], time.monotonic()

    def step(self, step: int, loss: torch.Tensor) -> None:
        """{"step", "loss": in nats per item, "seconds": since this start of the run}."""
        self._pending.append((step, loss, round(time.monotonic() - self._started, 3)))
        if len(self._pending) == 20:
            self.flush()

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """{"step", "valid": {...}}."""
        self.flush()
        self._file.write(json.dumps({"step": step, "valid": metrics}) + "\n")
        self._file.flush()

    def flush(self) -> None:
        for step, loss, seconds in self._pending:
            self._file.write(json.dumps({"step": step, "loss": loss.item(), "seconds": seconds}) + "\n")
        self._pending.clear()
        self._file.flush()


def read_log(path: Path) -> list[dict]:
    """The records of a log; a last line that a kill tore is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
