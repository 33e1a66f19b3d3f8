"""What one rank does during a step, as a list of marks, from which self times and spans are read afterwards."""

import threading
from dataclasses import dataclass

from ds_recsys import compat
from ds_recsys.timeline.step_times import CATEGORIES

LEAVE = None  # in place of the category: the innermost open span ends here


class Marks:
    """Moments of a step: where a span begins, or, with LEAVE for its category, where the innermost one ends.

    Three lists of equal length rather than one of tuples, which the garbage collector would have to walk.
    """

    def __init__(self):
        self.moments: list = []
        self.categories: list[str | None] = []
        self.labels: list[tuple | None] = []


@dataclass(frozen=True)
class Span:
    """A stretch of the step, in seconds from its begin; spans nest and do not otherwise overlap."""

    label: tuple
    category: str
    start: float
    end: float


class Recorder:
    """Marks of the step that is running. Entering and leaving cost one reading of the clock each."""

    def __init__(self, clock):
        self.clock = clock
        self.running = False
        self.marks = Marks()
        self.payload: dict[str, int] = {}
        self._open: list[str] = []
        self._thread = None

    def begin(self) -> None:
        self.clock.begin()
        self.running, self._thread = True, threading.get_ident()
        self.marks, self._open, self.payload = Marks(), [], {}
        self.enter("other", ("step",))

    def end(self) -> tuple[Marks, dict[str, int]]:
        """Marks and payload of the step, which is over."""
        self.leave()
        self.running = False
        return self.marks, self.payload

    def drop(self) -> None:
        """Forget a step that broke off."""
        self.running = False

    @property
    def category(self) -> str:
        """Of the innermost open span."""
        return self._open[-1]

    def enter(self, category: str, label: tuple) -> None:
        marks = self.marks
        marks.moments.append(self.clock.now())
        marks.categories.append(category)
        marks.labels.append(label)
        self._open.append(category)

    def leave(self) -> None:
        marks = self.marks
        marks.moments.append(self.clock.now())
        marks.categories.append(LEAVE)
        marks.labels.append(None)
        self._open.pop()

    def listens(self) -> bool:
        """Whether this thread is the step's: the one that began it, or one in which autograd runs its backward.

        What another thread sends meanwhile costs the step nothing by itself.
        """
        return threading.get_ident() == self._thread or compat.inside_backward()


def self_times(marks: Marks, seconds: list[float]) -> dict[str, float]:
    """Seconds of each category without what is nested in it. They add up to the last of `seconds`, the marks' times."""
    times, open_categories, before = dict.fromkeys(CATEGORIES, 0.0), [], 0.0
    for category, now in zip(marks.categories, seconds, strict=True):
        if open_categories:
            times[open_categories[-1]] += now - before
        if category is LEAVE:
            open_categories.pop()
        else:
            open_categories.append(category)
        before = now
    return times


def spans(marks: Marks, seconds: list[float]) -> list[Span]:
    """The spans in the order they began, the whole step first."""
    found, open_spans = [], []
    for category, label, now in zip(marks.categories, marks.labels, seconds, strict=True):
        if category is LEAVE:
            place, *begun = open_spans.pop()
            found[place] = Span(*begun, now)
        else:
            open_spans.append((len(found), label, category, now))
            found.append(None)
    return found
