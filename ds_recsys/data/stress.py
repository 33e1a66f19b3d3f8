"""Load a large synthetic log and print the peak memory: python -m ds_recsys.data.stress --rows 20000000

The log has the shape of MovieLens 20M (138,493 users, 26,744 items), its rows in the order of time, so that every
user's rows are scattered. A process of its own loads it, because the peak of a process includes all it ever did.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv

USERS, ITEMS = 138_493, 26_744


def write_log(path: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(b"userId,movieId,rating,timestamp\n")
        for first in range(0, rows, 1 << 20):
            count = min(1 << 20, rows - first)
            # Products of uniforms are skewed towards 0, as activity and popularity are.
            users, items = (1 + n * rng.random(count) * rng.random(count) for n in (USERS, ITEMS))
            columns = [users.astype(int), items.astype(int), rng.integers(1, 11, count) / 2,
                       800_000_000 + (first + np.arange(count)) // 4]  # fmt: skip
            table = pa.table(columns, names=["userId", "movieId", "rating", "timestamp"])
            arrow_csv.write_csv(table, file, arrow_csv.WriteOptions(include_header=False))


def load(path: Path) -> None:
    from ds_recsys.data.readers import read_interactions
    from ds_recsys.data.sequences import build_windows
    from ds_recsys.data.splits import leave_one_out

    start = time.perf_counter()
    interactions = read_interactions(path)
    seconds = time.perf_counter() - start
    print(f"read: {interactions.describe()} in {seconds:.1f} s, peak resident memory {peak():.2f} GB")
    start = time.perf_counter()
    windows = build_windows(interactions, leave_one_out(interactions), max_length=200, cache_dir=path.parent)
    print(f"windows: {len(windows):,} in {time.perf_counter() - start:.1f} s, peak resident memory {peak():.2f} GB")


def peak() -> float:
    """Gigabytes (1e9 bytes); Linux counts in KiB and macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="peak memory and seconds of loading a synthetic log")
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        return load(options.load)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ratings.csv")
        write_log(path, options.rows)
        print(f"wrote {path.stat().st_size / 1e6:,.0f} MB of {options.rows:,} rows", flush=True)
        command = [sys.executable, "-m", "ds_recsys.data.stress", "--load", str(path)]
        raise SystemExit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
