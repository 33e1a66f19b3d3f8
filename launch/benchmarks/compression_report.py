"""What the rows of compression_links.py show: times as a share of the dense one, of the wire's limit, and errors."""

from pathlib import Path

from benchmarks import plots
from benchmarks.compression_links import FAST, LINKS
from benchmarks.compression_methods import DENSE, PEERS, title
from benchmarks.harness import markdown
from benchmarks.repeats import groups, median, spread

_NAMES = {"100mbit": "100 Mbit/s", "1gbit": "1 Gbit/s", "10gbit": "10 Gbit/s", "loopback": "loopback"}
_FLAT, _HIERARCHICAL = "_flat", "_hierarchical"


def figures(rows: list[dict]) -> dict:
    """Shares of the dense time (lower is better), fractions of the wire's limit, the hierarchical form's speed-up."""
    if not any(row["kind"] in ("run", "kernel") for row in rows):
        return {}
    ratio, fraction = ratios(rows), _fractions(rows)
    forms = [name.removesuffix(_FLAT) for place, link, name in ratio if place == "2x2" and name.endswith(_FLAT)]
    speedups = [
        ratio["2x2", "1gbit", name + _FLAT] / ratio["2x2", "1gbit", name + _HIERARCHICAL]
        for name in forms
        if ("2x2", "1gbit", name + _HIERARCHICAL) in ratio
    ]
    speeds = kernel_speeds(rows)
    return {
        "int8_vs_dense_1gbit": ratio.get(("4x1", "1gbit", "int8")),
        "int4_vs_dense_1gbit": ratio.get(("4x1", "1gbit", "int4")),
        "int8_wire_fraction_1gbit": fraction.get(("4x1", "1gbit", "int8")),
        "int4_wire_fraction_1gbit": fraction.get(("4x1", "1gbit", "int4")),
        "int4_vs_dense_100mbit": ratio.get(("4x1", "100mbit", "int4")),
        "hierarchical_speedup": min(speedups, default=None),
        "auto_vs_dense_fast": max(
            (ratio[key] for link in FAST if (key := ("4x1", link, "auto")) in ratio), default=None
        ),
        "quantise_gb_per_s": min((speeds[name] for name in ("int8", "int4") if name in speeds), default=None),
    }


def table(rows: list[dict]) -> str:
    """Times and wire fractions of four hosts, of two hosts with two ranks each, and the speed of the kernels."""
    if not any(row["kind"] in ("run", "kernel") for row in rows):
        return ""
    parts = [_hosts(rows, "4x1"), _hosts(rows, "2x2"), _kernels(rows), _choices(rows), _failures(rows)]
    return "\n\n".join(part for part in parts if part)


def plot(rows: list[dict], path: Path) -> None:
    """A panel per cluster and link: seconds of each method, and the least that its bytes take on the wire."""
    cells = _runs(rows)
    places = list(dict.fromkeys(key[:2] for key in cells))
    with plots.drawing(path, 1, len(places), width=3.2, height=3.6) as axes:
        palette = plots.colours(["dense", "torch's hooks", "ds_recsys"])
        for axis, place in zip(axes[0], places, strict=True):
            names = list(dict.fromkeys(key[2] for key in cells if key[:2] == place))[::-1]
            for y, name in enumerate(names):
                found = cells[(*place, name)]
                kind = "dense" if name == DENSE else "torch's hooks" if name in PEERS else "ds_recsys"
                axis.barh(y, median(row["seconds"] for row in found), color=palette[kind], height=0.7)
                if found[0]["wire_seconds"]:
                    bound = median(row["wire_seconds"] for row in found)
                    axis.plot([bound, bound], [y - 0.35, y + 0.35], color="black", linewidth=1.5)
            axis.set_yticks(range(len(names)), [title(name) for name in names], fontsize=7)
            axis.set_title(_title(*place), fontsize=9)
            axis.set_xlabel("seconds; black: its bytes on the wire", fontsize=8)


def ratios(rows: list[dict]) -> dict[tuple, float]:
    """(topology, link, method) -> median over the repeats of its time over the dense one's of the same round."""
    dense = {
        (row["topology"], row["link"], row["group"], row["repeat"]): row["seconds"]
        for row in rows
        if row["kind"] == "run" and row["method"] == DENSE and "error" not in row
    }
    found = {}
    for key, cell in _runs(rows).items():
        pairs = [(row["seconds"], dense.get((*key[:2], row["group"], row["repeat"]))) for row in cell]
        values = [seconds / other for seconds, other in pairs if other]
        if values:
            found[key] = median(values)
    return found


def kernel_speeds(rows: list[dict]) -> dict[str, float]:
    """method -> GB/s of fp32 gradient."""
    cells = groups([row for row in rows if row["kind"] == "kernel"], "method")
    return {key[0]: median(row["gb_per_s"] for row in cell) for key, cell in cells.items()}


def _runs(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(topology, link, method) -> repeats."""
    return groups([row for row in rows if row["kind"] == "run"], "topology", "link", "method")


def _fractions(rows: list[dict]) -> dict[tuple, float]:
    cells = {key: cell for key, cell in _runs(rows).items() if cell[0]["wire_fraction"]}
    return {key: median(row["wire_fraction"] for row in cell) for key, cell in cells.items()}


def _hosts(rows: list[dict], topology: str) -> str:
    cells = {key[1:]: cell for key, cell in _runs(rows).items() if key[0] == topology}
    if not cells:
        return ""
    ratio, fraction, errors = ratios(rows), _fractions(rows), _errors(rows)
    links = [link for link in LINKS if any(key[0] == link for key in cells)]
    names = [DENSE, *dict.fromkeys(name for _, name in cells if name != DENSE)]
    lines = []
    for name in names:
        sent = [row["bytes"] for link in links for row in cells.get((link, name), []) if row["bytes"]]
        line = [title(name), f"{median(sent) / 1e6:.1f}" if sent else "", f"{errors.get(name, 0):.2g}"]
        for link in links:
            cell, key = cells.get((link, name)), (topology, link, name)
            text = f"{median(row['seconds'] for row in cell):.3f} ({ratio[key]:.3f})" if cell and key in ratio else ""
            line.append(text + (f", {fraction[key]:.2f}" if key in fraction and text else ""))
        lines.append(line)
    wide = max(spread(row["seconds"] for row in cell) for cell in cells.values())
    header = ["", "MB sent", "error", *(_NAMES[link] for link in links)]
    speed = next(row["speed"] for row in rows if row["kind"] == "run")
    caption = (
        f"{_title(topology)}, devices of {speed:g} core: seconds of the slowest rank (over the dense time of the same round), "
        f"fraction of the limit that its own bytes have on the wire. Error: relative, squared, without error feedback's help. "
        f"Median of the repeats; widest spread {wide:.0%}."
    )
    return f"{caption}\n\n{markdown(header, lines)}"


def _errors(rows: list[dict]) -> dict[str, float]:
    """method -> the largest relative squared error of a checked sum."""
    cells = groups([row for row in rows if row["kind"] == "check"], "method")
    return {key[0]: max(row["relative_error"] for row in cell) for key, cell in cells.items()}


def _kernels(rows: list[dict]) -> str:
    speeds = kernel_speeds(rows)
    if not speeds:
        return ""
    lines = [[title(name), f"{speed:.1f}"] for name, speed in speeds.items()]
    return f"Encoding with error feedback on one core.\n\n{markdown(['', 'GB/s of fp32'], lines)}"


def _choices(rows: list[dict]) -> str:
    """What "auto" took on each link."""
    made = [row for row in rows if row["kind"] == "check" and row.get("choice")]
    return "\n".join(f'- "auto" on {_title(row["topology"], row["link"])}: {row["choice"]}' for row in made)


def _failures(rows: list[dict]) -> str:
    failed = [row for row in rows if "error" in row and row["kind"] in ("check", "run")]
    return "\n".join(f"- failed: {_title(row['topology'], row['link'])}, {row['error']}" for row in failed)


def _title(topology: str, link: str | None = None) -> str:
    hosts = {"4x1": "4 hosts x 1 rank", "2x2": "2 hosts x 2 ranks"}[topology]
    return f"{hosts}, {_NAMES[link]}" if link else hosts
