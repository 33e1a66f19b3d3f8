"""The shared look of the plots: matplotlib without a display, few lines, colours that the colour-blind tell apart."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

# Okabe and Ito's palette, https://jfly.uni-koeln.de/color/, without its yellow, which is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LOOK = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@contextmanager
def drawing(
    path: str | Path, rows: int = 1, columns: int = 1, width: float = 4.0, height: float = 3.0, **keywords
) -> Iterator:
    """`with drawing(path) as axes`: rows x columns axes as an array, written to `path` (PNG) at the end.

    width, height: of one of the axes, in inches. keywords: of pyplot.subplots, such as sharey=True.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_LOOK):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(width * columns, height * rows), squeeze=False, **keywords
        )
        try:
            yield axes
            figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
        finally:
            pyplot.close(figure)


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name, the same in every plot that lists them in this order; there are seven."""
    return dict(zip(dict.fromkeys(names), cycle(_COLOURS), strict=False))
