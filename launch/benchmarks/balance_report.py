"""What the rows of bench.py balance show: steps per second that come back, ratios of steps, idle shares, and what it costs."""

from statistics import mean, stdev

from benchmarks.balance_costs import PATTERN
from benchmarks.harness import markdown
from benchmarks.repeats import groups, median, spread

_TITLES = {
    "straggler": "a device at half speed",
    "hardware": "half of the devices at half speed",
    "head": "head of half of the compute",
    "split head": "the same, split",
}


def figures(rows: list[dict]) -> dict:
    """Of the most stages that were measured; those of fewer, and what has no claim of its own, under names of their own."""
    pipes = sorted({row["pipe"] for row in rows}, reverse=True)
    first = {name: value for pipe in pipes[:1] for name, value in _straggler(rows, pipe).items()}
    found = {
        "straggler_recovered": None,
        "straggler_speedup": None,
        "steps_to_act": None,
        "head_speedup": None,
        **_head_speedups(rows, pipes),
        "split_head_imbalance": _imbalance(rows),
        **_nothing(rows),
        "migration_vs_reload": None,
        **first,
        **_pause(rows),
        **_solver(rows),
    }
    for pipe in pipes[1:]:
        found |= {f"{name}_pipe{pipe}": value for name, value in _straggler(rows, pipe).items()}
    for part in ("hardware", "head", "split head"):
        for pipe in pipes:
            if ratios := _ratios(rows, part, pipe):
                found[f"{part.replace(' ', '_')}_pipe{pipe}"] = ratios
    shares = groups([row for row in rows if row["kind"] == "share"], "part", "pipe")
    found["head_share"] = {f"{part}, pipe {pipe}": cell[0]["head_share"] for (part, pipe), cell in shares.items()}
    return found


def table(rows: list[dict]) -> str:
    """Steps of every cut in every situation, what was lost to waiting, then the costs."""
    parts = [_cuts(rows), _trials(rows), _costs(rows), _failures(rows)]
    return "\n\n".join(part for part in parts if part)


def cells(rows: list[dict], part: str, pipe: int, when: str | None = None) -> dict[str, list[dict]]:
    """Name of a static cut -> its repeats."""
    own = [row for row in rows if (row["part"], row["pipe"], row["kind"]) == (part, pipe, "cut")]
    return {key[0]: cell for key, cell in groups([row for row in own if row.get("when") == when], "cut").items()}


def trials(rows: list[dict], pipe: int) -> list[dict]:
    return [row for row in rows if row["kind"] == "trial" and row["pipe"] == pipe]


def seconds(cell: list[dict]) -> float:
    """Of a step, median over the repeats."""
    return median(row["seconds"] for row in cell)


def steps_to_act(trial: dict) -> int | None:
    """Steps from the change to the end of the first move after it, which is part of the last of them."""
    after = [step for step in trial["moved"] if step >= trial["change"]]
    return after[0] - trial["change"] + 1 if after else None


def _straggler(rows: list[dict], pipe: int) -> dict:
    """recovered: of the throughput between the static cut and the best one; of_before: of what the change took away.

    By the cut that a trial reached, "adaptive" below, in turns with the others: its own steps are minutes before theirs.
    """
    found, after = [], cells(rows, "straggler", pipe, "after")
    if not after:
        return {}
    for trial in trials(rows, pipe):
        now = {name: next(r for r in cell if r["repeat"] == trial["repeat"]) for name, cell in after.items()}
        names = ("parameters", "uniform", "best", "reached")
        static, uniform, best, adaptive = (1 / now[name]["seconds"] for name in names)
        before = 1 / trial["before"]["seconds"]
        found.append(
            {
                "straggler_recovered": (adaptive - static) / (best - static),
                "straggler_recovered_of_before": (adaptive - static) / (before - static),
                "straggler_best_of_before": (best - static) / (before - static),
                "straggler_speedup": adaptive / static,
                "straggler_speedup_over_uniform": adaptive / uniform,
            }
        )
    acted = [steps_to_act(trial) for trial in trials(rows, pipe)]
    ratios = {name: median(one[name] for one in found) for name in found[0]} if found else {}
    return {**ratios, "steps_to_act": None if None in acted else max(acted, default=None)}


def _ratios(rows: list[dict], part: str, pipe: int) -> dict:
    """How many times as fast as each other static cut the profile's is, by the medians."""
    own = cells(rows, part, pipe)
    if "profile" not in own:
        return {}
    return {f"over {name}": seconds(cell) / seconds(own["profile"]) for name, cell in own.items() if name != "profile"}


def _head_speedups(rows: list[dict], pipes: list[int]) -> dict:
    """head: of the same layers on the fewest stages, where a cut can give half of the compute a stage of its own. split_head:
    `parameters` with a whole head on the most stages over the profile's cut with a split one."""
    if not pipes:
        return {}
    whole, split = cells(rows, "head", pipes[0]), cells(rows, "split head", pipes[0])
    measured = "parameters" in whole and "profile" in split
    return {
        "head_speedup": _ratios(rows, "head", pipes[-1]).get("over parameters"),
        "split_head_speedup": seconds(whole["parameters"]) / seconds(split["profile"]) if measured else None,
    }


def _imbalance(rows: list[dict]) -> float | None:
    """Slowest stage over the mean stage of the profile's cut with the head split."""
    found = []
    for row in rows:
        if (row["part"], row["kind"], row.get("cut")) == ("split head", "cut", "profile") and "error" not in row:
            found.append(max(row["stage_seconds"]) / mean(row["stage_seconds"]))
    return median(found) if found else None


def _nothing(rows: list[dict]) -> dict:
    """Of four steps in a row, the two that the partition looked at over the others, minus 1; mean, and its standard error."""
    found: dict = {"overhead": None, "overhead_noise": None, "false_moves": None}
    for suffix, key in (("", "seconds"), ("_cpu", "cpu_seconds")):
        ratios = [ratio for row in rows if row["kind"] == "overhead" for ratio in _on_over_off(row, key)]
        if len(ratios) > 1:
            found[f"overhead{suffix}"] = mean(ratios) - 1
            found[f"overhead_noise{suffix}"] = stdev(ratios) / len(ratios) ** 0.5
            found["overhead_steps"] = len(PATTERN) * len(ratios)
            found["overhead_moves"] = sum(len(row["moved"]) for row in rows if row["kind"] == "overhead")
    jittered = [row for row in rows if row["kind"] == "jitter"]
    if sum(row["changes"] for row in jittered):  # speeds that stand still would show nothing
        found["false_moves"] = sum(len(row["moved"]) for row in jittered)
        found["jittered_steps"] = sum(len(row["seconds"]) for row in jittered)
    return found


def _on_over_off(row: dict, key: str) -> list[float]:
    """Of each four steps; a move in one of them is not what watching costs."""
    ratios, length = [], len(PATTERN)
    for start in range(0, len(row[key]) - length + 1, length):
        if not any(start <= step < start + length for step in row["moved"]):
            four = list(zip(row[key][start : start + length], PATTERN, strict=True))
            ratios.append(sum(one for one, on in four if on) / sum(one for one, on in four if not on))
    return ratios


def _pause(rows: list[dict]) -> dict:
    arms = groups([row for row in rows if row["kind"] == "pause"], "arm")
    if ("reload",) not in arms or ("migrate",) not in arms:
        return {}
    there, back, reload = (seconds(arms[(name,)]) for name in ("migrate", "migrate back", "reload"))
    one = arms[("migrate",)][0]
    return {
        "migration_vs_reload": 2 * reload / (there + back),
        "migration_seconds": (there + back) / 2,
        "reload_seconds": reload,
        "migration_mb": one["bytes"] / 1e6,
        "migration_busiest_mb": one["busiest_bytes"] / 1e6,
    }


def _solver(rows: list[dict]) -> dict:
    seconds = [row["seconds"] for row in rows if row["kind"] == "solver"]
    return {"solver_ms": 1e3 * median(seconds), "solver_ms_worst": 1e3 * max(seconds)} if seconds else {}


def _cuts(rows: list[dict]) -> str:
    lines = []
    for pipe in sorted({row["pipe"] for row in rows}, reverse=True):
        for part, when in (
            ("straggler", "before"),
            ("straggler", "after"),
            *((p, None) for p in _TITLES if p != "straggler"),
        ):
            own = cells(rows, part, pipe, when)
            title = "devices of one speed" if when == "before" else _TITLES[part]
            lines += [_line(f"{pipe} stages, {title}", name, cell) for name, cell in own.items()]
            if part == "straggler" and own and trials(rows, pipe):
                states = [trial[when] for trial in trials(rows, pipe)]
                lines.append(_line(f"{pipe} stages, {title}", "adaptive", states))
    if not lines:
        return ""
    header = ["", "cut", "bounds", "s a step", "spread", "idle", "waits and transfers, s a stage"]
    return markdown(header, lines)


def _line(place: str, name: str, cell: list[dict]) -> list[str]:
    bounds = "-".join(map(str, cell[0]["bounds"])) if "bounds" in cell[0] else ""
    waits = median(mean(stage["pipeline"] for stage in row["split"]) for row in cell)
    idle, wide = median(row["idle"] for row in cell), spread(row["seconds"] for row in cell)
    return [place, name, bounds, f"{seconds(cell):.2f}", f"{wide:.0%}", f"{idle:.0%}", f"{waits:.2f}"]


def _trials(rows: list[dict]) -> str:
    lines = []
    for trial in (row for row in rows if row["kind"] == "trial"):
        for step, move in zip(trial["moved"], trial["moves"], strict=True):
            since = step - trial["change"] + 1
            when = f"{since} steps after the change" if since > 0 else f"step {step + 1}, before the change"
            back = ", taken back" if move["back"] else ""
            bounds = "-".join(map(str, move["bounds"]))
            lines.append(
                f"- {trial['pipe']} stages, trial {trial['repeat'] + 1}: bounds {bounds}{back}, {when}; "
                f"{move['bytes'] / 1e6:.1f} MB in {move['seconds']:.2f} s; {move['cross_host_bytes'][0] / 1e6:.1f} -> "
                f"{move['cross_host_bytes'][1] / 1e6:.1f} MB a step across hosts"
            )
    return "\n".join(lines)


def _costs(rows: list[dict]) -> str:
    found, lines = {**_nothing(rows), **_pause(rows), **_solver(rows)}, []
    if found["overhead"] is not None:
        lines.append(
            f"- watching: {found['overhead']:+.2%} of a step, standard error {found['overhead_noise']:.2%}; of its CPU time "
            f"{found['overhead_cpu']:+.2%}, {found['overhead_noise_cpu']:.2%}; over {found['overhead_steps']} steps; "
            f"{found['overhead_moves']} moves besides"
        )
    if found["false_moves"] is not None:
        lines.append(
            f"- devices' speeds jittered by 10 %: {found['false_moves']} moves in {found['jittered_steps']} steps"
        )
    if "reload_seconds" in found:
        lines.append(
            f"- a move of {found['migration_mb']:.0f} MB: {found['migration_seconds']:.2f} s; by checkpoint: "
            f"{found['reload_seconds']:.2f} s, {found['migration_vs_reload']:.1f} times as long"
        )
    if "solver_ms" in found:
        one = next(row for row in rows if row["kind"] == "solver")
        lines.append(
            f"- the best cut of {one['layers']} layers in {one['stages']} stages is found in {found['solver_ms']:.0f} ms, "
            f"{found['solver_ms_worst']:.0f} ms at worst"
        )
    for (part, pipe), cell in groups([row for row in rows if row["kind"] == "share"], "part", "pipe").items():
        lines.append(f"- {part}, {pipe} stages: {cell[0]['head_share']:.0%} of the compute in the profile")
    return "\n".join(lines)


def _failures(rows: list[dict]) -> str:
    failed = [row for row in rows if "error" in row]
    places = [(f"{row['part']}, {row['pipe']} stages, {row.get('cut', row['kind'])}", row["error"]) for row in failed]
    return "\n".join(f"- failed: {place}: {error}" for place, error in places)
