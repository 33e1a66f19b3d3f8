"""Interleaved repeats, their median and spread.

A machine's speed drifts: repeats of one arm in a row would charge the drift to that arm. Taking turns spreads it over all.
"""

import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator


def interleaved(
    arms: dict[str, Callable[[], dict]],
    repeats: int,
    warmup: int = 1,
    budget_s: float | None = None,
    progress: str | None = None,
) -> Iterator[dict]:
    """Run A, B, C, then B, C, A, then C, A, B, ...: {"arm": name, "repeat": i, **what the arm returned} as each ends.

    warmup: rounds in front whose results are dropped. budget_s: an arm whose calls have used this many seconds is not
    called again, but every arm gets one repeat. progress: a label for stderr, where the time left is shown.

    An arm that raises an `Exception` loses only itself: {"arm", "repeat", "error": "Type: message"} is its last row, with
    a negative repeat if that was in the warm-up. A KeyboardInterrupt passes through.
    """
    names, used, lost = list(arms), dict.fromkeys(arms, 0.0), set()
    shown = _Progress(progress, (warmup + repeats) * len(arms))
    try:
        for repeat in range(-warmup, repeats):
            turn = repeat % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                spent = repeat > 0 and budget_s is not None and used[name] >= budget_s
                if name in lost or spent:
                    shown.skip()
                    continue
                begin = time.perf_counter()
                try:
                    result = arms[name]()
                except Exception as error:
                    traceback.print_exc()
                    lost.add(name)
                    yield {"arm": name, "repeat": repeat, "error": f"{type(error).__name__}: {error}"}
                else:
                    used[name] += time.perf_counter() - begin
                    if repeat >= 0:
                        yield {"arm": name, "repeat": repeat, **result}
                shown.done(name)
    finally:
        shown.close()


def groups(rows: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Values of the keys -> the rows that have them, in order; rows with an "error" or "skipped" are left out."""
    found = {}
    for row in rows:
        if "error" not in row and "skipped" not in row:
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(values: Iterable[float]) -> float:
    """Half the range over the median, so 0.05 is "within about 5 % of the median"; 0 of a single value.

    Half the range and not an interquartile one: quartiles of three or five repeats say little, and no repeat is hidden.
    """
    values = list(values)
    return (max(values) - min(values)) / 2 / abs(statistics.median(values)) if len(values) > 1 else 0.0


class _Progress:
    """A tqdm bar on a terminal; elsewhere a line, at most one in ten seconds."""

    def __init__(self, label: str | None, total: int):
        self._label, self._total, self._count = label, total, 0
        self._begin = self._last = time.monotonic()
        self._bar = None
        if label and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit="run")

    def skip(self) -> None:
        """One run less than planned."""
        self._total -= 1
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.refresh()

    def done(self, name: str) -> None:
        self._count += 1
        if self._bar is not None:
            self._bar.set_postfix_str(name, refresh=False)
            self._bar.update()
        elif self._label and time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            left = (self._last - self._begin) / self._count * (self._total - self._count)
            line = f"{self._label}: {self._count} of {self._total} runs, last {name}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
