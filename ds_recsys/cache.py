"""Where everything that can be made again is kept: windows, packaged data, converted weights."""

import os
from pathlib import Path


def default_cache() -> Path:
    """`$DS_RECSYS_CACHE`, or `ds_recsys` below `$XDG_CACHE_HOME` or `~/.cache`."""
    if named := os.environ.get("DS_RECSYS_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_recsys"
