"""Compiles this folder's C files with the system's compiler, once per machine type, into a shared library."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

# Nothing that lets the compiler change a result: no -ffast-math, no contraction of a * b + c.
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-fvisibility=hidden"),
)
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT = 120  # seconds


class BuildError(Exception):
    """One line on why there is no library."""


def build(folder: Path, again: bool = False) -> Path:
    """The library below `folder`, compiled if it is not there yet, or in any case with `again`.

    Its name is a hash of sources, flags and CPU, so that machines with different CPUs may share the folder. It is
    compiled under a name of its own and moved into place, without a lock: of several processes that build at once the
    last one wins, with the same content, and one that is killed leaves nothing that another would wait for.

    Raises:
        BuildError: no compiler, or none that succeeds, or a folder that cannot be written.
    """
    here = Path(__file__).parent
    sources = sorted(here.glob("*.c"))
    if not sources:
        raise BuildError(f"no C files in {here}")
    texts = [path.read_bytes() for path in sorted(here.glob("*.[ch]"))]
    key = hashlib.sha256("\0".join([*FLAGS, _cpu()]).encode() + b"\0".join(texts)).hexdigest()[:16]
    library = folder / f"compress_{key}.so"
    if library.exists() and not again:
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=library.stem, suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror}") from error
    try:
        _compile(sources, temporary)
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return library


def _compile(sources: list[Path], target: str) -> None:
    found = [path for name in COMPILERS if (path := shutil.which(name))]
    if not found:
        raise BuildError(f"no C compiler: none of {', '.join(COMPILERS)}")
    for compiler in found:
        command = [compiler, *FLAGS, *map(str, sources), "-o", target]
        try:
            outcome = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
            continue
        if outcome.returncode == 0:
            return
        lines = [line for line in outcome.stderr.splitlines() if "error" in line] or outcome.stderr.splitlines()
        reason = f"{compiler} failed ({outcome.returncode}): {lines[0] if lines else 'no message'}"
    raise BuildError(reason)


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer", "isa", "cpu\t")
    named = {line.partition(":")[0]: line for line in lines if line.startswith(wanted)}
    return "\n".join([platform.machine(), *sorted(named.values())])
