"""What the rows of bench.py modes show: speeds against sync and the ideal, losses, ranking figures."""

import statistics
from collections.abc import Callable

from benchmarks.harness import markdown
from benchmarks.modes_arms import AHEAD, ALONE, METHODS, MODES, SYNC, arm, title
from benchmarks.modes_speed import CELLS, EVEN, HALF, LINKS, STOP
from benchmarks.repeats import groups, median

_DENSE = (SYNC, "none")


def figures(rows: list[dict]) -> dict:
    """The claims, None where rows lack, with those of int8; then every arm's, by its name.

    delayed_hidden: (t_sync - t_delayed) / min(communication, compute) on link 1x, with t_alone, of replicas that do not
    communicate, as compute, and t_sync - t_alone as communication. diloco_speedup_4x: samples/s over dense sync's.
    diloco_ndcg_ratio: mean over the seeds, to dense sync of the same seed. async_share_of_ideal: samples/s with one replica
    at half speed over those of replicas alone, times the share of the speed that is left. Speeds are compared within a round.
    """
    trained, found = by_seed(rows), {}
    for method in METHODS:
        suffix = "" if method == "none" else f"_{method}"
        found[f"delayed_hidden{suffix}"] = hidden(rows, "delayed", method)
        found[f"delayed_hidden_{AHEAD}{suffix}"] = hidden(rows, AHEAD, method)
        found[f"diloco_speedup_4x{suffix}"] = speed_ratio(rows, "diloco", method, 4)
        found[f"diloco_ndcg_ratio{suffix}"] = _mean(_paired(trained, ("diloco", method), "ndcg"))
        found[f"async_share_of_ideal{suffix}"] = share_of_ideal(rows, "async", method, HALF)
    for link, situation in CELLS:
        if situation == EVEN:
            found[f"samples_per_s_ratio_{link}x"] = _of_arms(lambda *a, link=link: speed_ratio(rows, *a, link))
        else:
            found[f"{situation}_share_of_ideal"] = _of_arms(lambda *a, s=situation: share_of_ideal(rows, *a, s))
    found["ndcg_ratio"] = _of_arms(lambda *a: _mean(_paired(trained, a, "ndcg")))
    found["loss_ratio"] = _of_arms(lambda *a: _mean(_paired(trained, a, "loss")))
    noise = [row["ndcg"] for row in trained.get(_DENSE, {}).values()]
    found["ndcg_seed_noise"] = statistics.stdev(noise) if len(noise) > 1 else None
    return found


def table(rows: list[dict]) -> str:
    """A line per arm: its speeds, bytes, losses and ranking figures."""
    cells, trained = windows(rows), by_seed(rows)
    known = list(dict.fromkeys([*((key[0], key[1]) for key in cells), *trained]))
    lines = [_line(rows, cells, trained, mode, method) for mode, method in known]
    links = [f"samples/s at {link}x (of sync)" for link, situation in CELLS if situation == EVEN]
    speeds = [*links, "one at half speed (of ideal)", "one stopped (of ideal)", "busy at 1x", "kB sent per sample"]
    header = ["", *speeds, "validation loss", "to sync", "NDCG@10", "to sync"]
    texts = _caption(rows), markdown(header, lines) + _notes(rows), _at_equal_time(rows, trained)
    return "\n\n".join(text for text in texts if text)


def curve(seeds: list[dict], step_seconds: float, name: str = "valid") -> tuple[list[float], list[float]]:
    """(seconds, values of the validations, the mean over the seeds); validations are equally many steps apart."""
    values = [statistics.mean(same) for same in zip(*(row[name] for row in seeds), strict=True)]
    apart = seeds[0]["steps"] / len(values) * step_seconds
    return [apart * number for number in range(1, len(values) + 1)], values


def step_seconds(rows: list[dict], mode: str, method: str, link: int) -> float | None:
    """Dense sync's, over the speed to it in the same rounds: groups are measured at different times."""
    ratio, dense = speed_ratio(rows, mode, method, link), windows(rows).get((*_DENSE, link, EVEN))
    return median(row["step_seconds"] for row in dense) / ratio if ratio and dense else None


def _at_equal_time(rows: list[dict], trained: dict) -> str:
    """The validations of all trainings at the moment in which the first one has taken all its steps, link by link."""
    curves, header = {}, [""]
    for link in LINKS:
        for name in ("valid", "valid_ndcg"):
            for key, seeds in trained.items():
                seconds = step_seconds(rows, *key, link)
                if seconds and all(name in row for row in seeds.values()):
                    curves[link, name, key] = curve(list(seeds.values()), seconds, name)
    if not curves:
        return ""
    ends = {link: min(times[-1] for (at, _, _), (times, _) in curves.items() if at == link) for link, _, _ in curves}
    header += [f"{what}, {link}x, {end:.0f} s" for link, end in ends.items() for what in ("loss", "NDCG@10")]
    lines = [
        [title(*key)]
        + [
            value_at(curves.get((link, name, key)), end)
            for link, end in ends.items()
            for name in ("valid", "valid_ndcg")
        ]
        for key in trained
    ]
    return f"At equal wall time: validations when the first training has ended.\n\n{markdown(header, lines)}"


def value_at(found: tuple[list[float], list[float]] | None, end: float) -> str:
    """Between the validations before and after, in a straight line; nothing before the first."""
    if found is None or found[0][0] > end:
        return ""
    times, values = found
    after = next((number for number, time in enumerate(times) if time >= end), len(times) - 1)
    before = max(0, after - 1)
    share = (end - times[before]) / (times[after] - times[before]) if after > before else 0.0
    return f"{values[before] + min(share, 1.0) * (values[after] - values[before]):.4f}"


def hidden(rows: list[dict], mode: str, method: str = "none") -> float | None:
    """See `figures`: the median over the rounds."""
    times = _by_round(rows, "step_seconds")
    shares = []
    for (group, repeat, *cell), delayed in times.items():
        if cell != [mode, method, 1, EVEN]:
            continue
        sync = times.get((group, repeat, SYNC, method, 1, EVEN))
        alone = times.get((group, repeat, ALONE, "none", 1, EVEN))
        if sync and alone and delayed and sync > alone:
            shares.append((sync - delayed) / min(sync - alone, alone))
    return median(shares) if shares else None


def speed_ratio(rows: list[dict], mode: str, method: str, link: int) -> float | None:
    """Samples per second over those of dense synchronous training on the same link, the median over the rounds."""
    return _ratio(rows, (mode, method, link, EVEN), (*_DENSE, link, EVEN))


def share_of_ideal(rows: list[dict], mode: str, method: str, situation: str) -> float | None:
    """Samples per second over what replicas alone would do in this situation, on link 1x, the median over the rounds."""
    ratio = _ratio(rows, (mode, method, 1, situation), (ALONE, "none", 1, EVEN))
    workload = next((row for row in rows if row["kind"] == "workload"), None)
    return ratio / _left(workload, situation) if ratio is not None and workload else None


def windows(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(mode, method, link, situation) -> repeats."""
    found = [row for row in rows if row["kind"] == "window"]
    return groups(found, "mode", "method", "link", "situation")


def by_seed(rows: list[dict]) -> dict[tuple, dict[int, dict]]:
    """(mode, method) -> seed -> the row of its training, with its last validation loss as "loss"."""
    found = {}
    for row in rows:
        if row["kind"] == "quality" and "error" not in row:
            found.setdefault((row["mode"], row["method"]), {})[row["seed"]] = {**row, "loss": row["valid"][-1]}
    return found


def _left(workload: dict, situation: str) -> float:
    """The share of all replicas' work that is left when one is slow or stopped."""
    replicas, window, stop = workload["hosts"], workload["window"], workload["stop"]
    lost = {EVEN: 0.0, HALF: 0.5, STOP: stop / (window + stop)}[situation]
    return (replicas - lost) / replicas


def _by_round(rows: list[dict], key: str) -> dict[tuple, float]:
    """(group, repeat, mode, method, link, situation) -> the value."""
    names = ("group", "repeat", "mode", "method", "link", "situation")
    found = [row for row in rows if row["kind"] == "window" and "error" not in row]
    return {tuple(row[name] for name in names): row[key] for row in found}


def _ratio(rows: list[dict], cell: tuple, reference: tuple) -> float | None:
    speeds = _by_round(rows, "samples_per_s")
    pairs = [
        (value, speeds.get((group, repeat, *reference)))
        for (group, repeat, *found), value in speeds.items()
        if tuple(found) == cell
    ]
    ratios = [value / other for value, other in pairs if other]
    return median(ratios) if ratios else None


def _of_arms(value: Callable[[str, str], float | None]) -> dict[str, float]:
    """Of every arm but dense synchronous training where there is one; `value` takes mode and method."""
    values = {(mode, method): value(mode, method) for method in METHODS for mode in MODES}
    return {arm(*key): one for key, one in values.items() if one is not None}


def _paired(trained: dict, key: tuple, name: str) -> list[float]:
    """Ratios to the dense synchronous training of the same seed."""
    dense = trained.get(_DENSE, {})
    return [
        row[name] / dense[seed][name]
        for seed, row in trained.get(key, {}).items()
        if seed in dense and dense[seed][name]
    ]


def _mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def _line(rows: list[dict], cells: dict, trained: dict, mode: str, method: str) -> list[str]:
    line = [title(mode, method)]
    for link, situation in CELLS:
        cell = cells.get((mode, method, link, situation))
        if situation == EVEN:
            share = speed_ratio(rows, mode, method, link)
        else:
            share = share_of_ideal(rows, mode, method, situation)
        text = f"{median(row['samples_per_s'] for row in cell):.0f}" if cell else ""
        line.append(f"{text} ({share:.2f})" if cell and share is not None else text)
    first = cells.get((mode, method, 1, EVEN))
    line.append(f"{median(row['busy'] for row in first):.0%}" if first else "")
    line.append(f"{median(row['bytes_per_sample'] for row in first) / 1e3:.1f}" if first else "")
    seeds = list(trained.get((mode, method), {}).values())
    for name in ("loss", "ndcg"):
        values, ratio = [row[name] for row in seeds], _mean(_paired(trained, (mode, method), name))
        noise = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        line += [f"{statistics.mean(values):.4f}{noise}" if values else "", f"{ratio - 1:+.2%}" if ratio else ""]
    return line


def _caption(rows: list[dict]) -> str:
    parts = []
    for row in (row for row in rows if row["kind"] == "workload"):
        of = f" of {row['batch']} windows" if row["batch"] else ""
        parts.append(
            f"{row['parameters']:,} parameters on {row['hosts']} hosts x 1 replica of {row['speed']:g} cores, compute "
            f"{1e3 * row['compute_seconds']:.0f} ms a step{of}; at 1x dense gradients take as long on the links "
            f"({row['rate'] / 1e6:.0f} Mbit/s), at 4x four times as long. Windows of {row['window']:g} s; one replica at half "
            f"speed, or stopped for {row['stop']:g} s of {row['window'] + row['stop']:g} s, at 1x. Ideal: replicas that do not "
            f"communicate, less what the slow or stopped one lacks. Local SGD and DiLoCo average every {row['every']} steps."
        )
    trained = [row for row in rows if row["kind"] == "quality" and "error" not in row]
    if trained:
        seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in trained}))
        parts.append(
            f"Loss and NDCG@10: whole trainings of {trained[0]['steps']:,} steps on {trained[0]['ranks']} replicas without the "
            f"cluster, in async at equal speeds, seeds {seeds}: mean ± standard deviation, and the mean ratio to dense sync "
            "with the same seed."
        )
    return " ".join(parts)


def _notes(rows: list[dict]) -> str:
    """How old the weights of the others were in async, what was dropped, and what failed."""
    notes = []
    for (mode, method, link, situation), cell in windows(rows).items():
        if mode == "async":
            dropped, age = median(row["dropped"] for row in cell), median(row["staleness"] for row in cell)
            words = f"the others' weights are {age:.1f} steps old on average, {dropped:g} steps are dropped in a window"
            notes.append(f"{title(mode, method)}, {link}x, {situation}: {words}")
    for key, seeds in by_seed(rows).items():
        if key[0] == "async":
            age = statistics.mean(row["staleness"] for row in seeds.values())
            notes.append(f"{title(*key)}, whole trainings: {age:.1f} steps old")
    for row in rows:
        if "error" in row:
            notes.append(f"failed: {title(row['mode'], row['method'])}, {row['kind']}: {row['error']}")
    return "".join(f"\n- {note}" for note in notes)
