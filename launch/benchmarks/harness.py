"""What every benchmark shares: measure, keep the rows, and show them as table, figures, plot and a block of the README.

Only `measure` is slow. All that is shown is a function of the rows, so a kept result can be shown anew: --from FILE.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from ds_recsys.errors import UserError

ROOT = Path(__file__).parents[2]
RESULTS = Path("launch/benchmarks/results")  # below the root: what the README shows


class Benchmark(Protocol):
    """A module of this package. `rows` is a list of JSON objects with at least one that was measured."""

    HELP: str  # one line

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Options of its own, beside --json, --from, --readme and --quick."""

    def measure(self, options: argparse.Namespace) -> Iterable[dict]:
        """The rows. As a generator, so that the rows so far outlive a Ctrl-C. `options.quick`: well under a minute."""

    def figures(self, rows: list[dict]) -> dict:
        """What is claimed, by name."""

    def table(self, rows: list[dict]) -> str:
        """Markdown."""

    def plot(self, rows: list[dict], path: Path) -> None:
        """Write a PNG."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--json", metavar="F", help="write rows, machine, commit and figures to F, the plot beside it")
    parser.add_argument("--from", dest="source", metavar="F", help="measure nothing: show F's rows, renew its figures")
    parser.add_argument("--readme", action="store_true", help=f"keep the result in {RESULTS}, put it into README.md")
    parser.add_argument("--quick", action="store_true", help="a smoke run at small sizes; its figures mean nothing")


def run(name: str, benchmark: Benchmark, options: argparse.Namespace, root: Path = ROOT) -> dict:
    """Measure (or load) and show; the result as it stands in the file.

    Raises UserError for options that exclude each other and where no row was measured; SystemExit(130) after a Ctrl-C.
    """
    file = _file(name, options, root)
    if options.readme:
        _parts((root / "README.md").read_text(), file.stem)  # a missing marker shows before hours of measuring
    result = load(file, name) if options.source else _measure(name, benchmark, options, file)
    measured = [row for row in result["rows"] if "error" not in row and "skipped" not in row]
    if not measured:
        reasons = [row.get("error") or row.get("skipped") for row in result["rows"]]
        raise UserError(f"{name}: nothing was measured; {reasons[0] if reasons else 'there are no rows'}")
    print(f"\n{_show(benchmark, result, file)}\n", flush=True)
    if file:
        benchmark.plot(result["rows"], file.with_suffix(".png"))
        _write(file, result)
    if options.readme:
        readme = root / "README.md"
        before, after = _parts(readme.read_text(), file.stem)
        readme.write_text(before + block(file.stem, benchmark, result, root) + after)
    return result


def load(file: Path, name: str | None = None) -> dict:
    """A kept result; UserError unless it is one, of the benchmark `name` where that is given."""
    try:
        result = json.loads(Path(file).read_text())
        found = result["benchmark"]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not a result of launch/bench.py") from None
    if name not in (None, found):
        raise UserError(f"{file} holds a result of `{found}`, not of `{name}`: bench.py {found} --from {file}")
    return result


def block(stem: str, benchmark: Benchmark, result: dict, root: Path = ROOT) -> str:
    """What stands in the README between the markers of results/STEM.json."""
    image = RESULTS / f"{stem}.png"
    parts = [benchmark.table(result["rows"])]
    if (root / image).exists():
        parts.append(f"![{stem}]({image})")
    host, commit = result["machine"], (result["commit"] or "unknown")[:8]
    at = f"{host['cpu']}, {host['cores']} cores, {host['memory_gb']:.0f} GB"
    changed = " with changes" if result["dirty"] else ""
    parts.append(f"`{result['command']}` on {at}, commit {commit}{changed}.")
    return "\n\n".join(parts) + "\n"


def markdown(header: list[str], rows: Iterable[list]) -> str:
    """A table, cells as str() gives them."""
    lines = [[str(cell) for cell in row] for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> dict:
    """What the figures depend on, of this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "deepspeed")},
    }


def commit(root: Path = ROOT) -> dict:
    """{"commit": of the checkout, "dirty": whether it has changes}, both None without git or a repository.

    What this harness itself writes, kept results and README.md, is no change.
    """
    try:
        found = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", ".", f":!{RESULTS}", ":!README.md")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": found, "dirty": bool(changes)}


def _git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def _file(name: str, options, root: Path) -> Path | None:
    """Where the result is kept, or comes from."""
    kept = root / RESULTS / f"{name}.json"
    if options.source and (options.json or options.quick):
        raise UserError("--from FILE measures nothing: leave out --json and --quick")
    if options.readme and options.quick:
        raise UserError("--readme takes no quick run: its figures mean nothing; leave out --quick")
    given = options.source or options.json
    file = Path(given) if given else kept if options.readme else None
    if options.readme and file.resolve().parent != kept.resolve().parent:
        raise UserError(f"--readme shows results kept in {RESULTS}: name a file there (such as {RESULTS / kept.name})")
    if options.readme and options.source:
        result = load(file, name)
        for state, wrong in (("quick", result["quick"]), ("incomplete", not result["complete"])):
            if wrong:
                raise UserError(f"--readme takes no {state} run, as {file} is: measure anew")
    if file and not options.source:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from None
    return file


def _measure(name: str, benchmark: Benchmark, options, file: Path | None) -> dict:
    """The result of a new measurement, written to the file after every row."""
    rows, begin = [], time.monotonic()
    result = {
        "benchmark": name,
        "command": shlex.join(["python", "launch/bench.py", *sys.argv[1:]]),
        "quick": options.quick,
        "complete": False,
        "seconds": 0.0,
        **commit(),
        "machine": machine(),
        "figures": None,
        "rows": rows,
    }
    try:
        for row in benchmark.measure(options):
            rows.append(row)
            result["seconds"] = round(time.monotonic() - begin, 1)
            if file:
                _write(file, result)
    except KeyboardInterrupt:
        kept = f"kept in {file}: bench.py {name} --from {file} shows them" if file and rows else "not kept"
        print(f"\ninterrupted: {len(rows)} rows so far, {kept}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    result["complete"] = True
    return result


def _show(benchmark: Benchmark, result: dict, file: Path | None) -> str:
    """Table and figures as text; the figures are put into the result."""
    try:
        result["figures"] = benchmark.figures(result["rows"])
        table = benchmark.table(result["rows"])
    except Exception:
        if result["complete"]:
            raise
        message = f"{file} is incomplete: its {len(result['rows'])} rows do not make the table; measure anew"
        raise UserError(message) from None
    figures = [f"{name}: {_text(value)}" for name, value in result["figures"].items()]
    return "\n".join([table, "", *figures])


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(file: Path, result: dict) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, file)


def _parts(readme: str, stem: str) -> tuple[str, str]:
    """What stands before and behind a block, markers included."""
    opening, closing = f"<!-- bench:{stem} -->\n", f"<!-- /bench:{stem} -->"
    before, found, rest = readme.partition(opening)
    _, closed, after = rest.partition(closing)
    if not (found and closed):
        raise UserError(f"README.md has no {opening.strip()} with a {closing} below: add both where the table belongs")
    return before + opening, closing + after
