"""A log that was read once: its arrays are mapped by every rank of the host, its text is parsed by one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

from ds_recsys.data.interactions import Interactions, digest_of
from ds_recsys.data.report import ReadReport

# Part of the key: raise it whenever the same log would read differently.
FORMAT_VERSION = 1
_ARRAYS = ("offsets", "sequence", "timestamps")


def cached(
    read: Callable[[], Interactions], source: str | Path, options: object, cache_dir: str | Path
) -> Interactions:
    """`read()`, or what it gave the last time for the same files and `options`, with its arrays mapped from disk.

    source: file or folder of the log. The key holds name, size and time of change of every file beside it (titles
        lie there too). A source that is not on this disk, such as the name of a data set on a hub, is read each time.
    options: everything else that changes the result; its repr goes into the key.

    Built once, by whichever process takes the lock first, and there whole or not at all.
    """
    path = Path(source)
    if not path.exists():
        return read()
    around = path if path.is_dir() else path.parent
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in around.iterdir() if f.is_file())
    key = digest_of(FORMAT_VERSION, str(path.resolve()), repr(options), repr(files)).hexdigest()
    folder = Path(cache_dir) / f"log-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _write(read(), partial)
            partial.rename(folder)
    return _read(folder)


def _write(interactions: Interactions, folder: Path) -> None:
    for name in _ARRAYS:
        if (array := getattr(interactions, name)) is not None:
            np.save(folder / f"{name}.npy", array)
    rest = {name: getattr(interactions, name) for name in ("users", "items", "titles")}
    rest |= {"report": dataclasses.asdict(interactions.report), "hash": interactions.content_hash}
    (folder / "rest.json").write_text(json.dumps(rest))


def _read(folder: Path) -> Interactions:
    rest = json.loads((folder / "rest.json").read_text())
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r") if (folder / f"{name}.npy").exists() else None
        for name in _ARRAYS
    }
    known_hash = rest.pop("hash")
    interactions = Interactions(**{**rest, **arrays, "report": ReadReport(**rest["report"])})
    interactions.__dict__["content_hash"] = known_hash  # hashing reads every page that mapping avoids
    return interactions
