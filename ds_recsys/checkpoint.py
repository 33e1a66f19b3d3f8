"""Atomic save, verified load: a checkpoint either is whole or does not exist.

    run_dir/checkpoints/
        step_00000120/          DeepSpeed's own files, plus state.json (ours) and manifest.json (size and CRC of every file)
        latest                  the name of the newest whole checkpoint, replaced atomically
        .writing/               a save in progress; a kill leaves it behind and the previous checkpoint untouched

All ranks must see one file system, as DeepSpeed itself requires.
"""

import json
import os
import shutil
import zlib
from pathlib import Path

import torch

from ds_recsys.comm.groups import survivors
from ds_recsys.errors import UserError

_WRITING, _LATEST, _STATE, _MANIFEST = ".writing", "latest", "state.json", "manifest.json"


def save(
    engine,
    folder: str | Path,
    step: int,
    state: dict,
    *,
    client_state: dict | None = None,
    keep_last: int | None = None,
) -> Path:
    """Save the engine and `state` as `folder/step_XXXXXXXX`. Collective: every rank calls it.

    Args:
        engine: a DeepSpeed engine.
        step: optimizer steps taken; names the checkpoint.
        state: JSON-able, read back by `read_state` before the engine is built.
        client_state: kept in DeepSpeed's file of each pipeline stage and tensor rank.
        keep_last: delete all but this many newest checkpoints afterwards; None keeps all.

    Returns:
        The folder of the new checkpoint, visible only once it is whole.
    """
    folder, rank, world = Path(folder), torch.distributed.get_rank(), survivors(engine)
    writing, final = folder / _WRITING, folder / f"step_{step:08d}"
    if rank == 0:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    torch.distributed.barrier(world)
    engine.save_checkpoint(str(folder), tag=_WRITING, client_state=client_state or {}, save_latest=False)
    if rank == 0:
        (writing / _STATE).write_text(json.dumps(state))
    torch.distributed.barrier(world)
    manifest = _fingerprint(writing, world)
    if rank == 0:
        (writing / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (writing / _MANIFEST, writing / _STATE, writing):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(writing, final)
        _write_atomically(folder / _LATEST, final.name)
        if keep_last:
            # by age and not by step: after --resume step_X the newest need not have the most steps
            for old in sorted(folder.glob(f"step_*/{_MANIFEST}"), key=lambda path: path.stat().st_mtime_ns)[
                :-keep_last
            ]:
                shutil.rmtree(old.parent, ignore_errors=True)
    torch.distributed.barrier(world)
    return final


def find(folder: str | Path, tag: str | None = None) -> Path:
    """The checkpoint `tag` in `folder`, or the newest whole one.

    Raises:
        UserError: there is nothing to resume, or `tag` names no checkpoint.
    """
    folder = Path(folder)
    whole = sorted(path.parent.name for path in folder.glob(f"step_*/{_MANIFEST}"))
    if not whole:
        raise UserError(f"{folder}: no checkpoint to resume from; start without --resume, or name the right --run_dir")
    if tag is None:
        latest = folder / _LATEST
        tag = latest.read_text().strip() if latest.exists() else whole[-1]
    if tag not in whole:
        raise UserError(f"{folder}: no whole checkpoint {tag!r}; there are {', '.join(whole)}")
    return folder / tag


def read_state(checkpoint: Path) -> dict:
    """What `save` was given as `state`."""
    return json.loads((checkpoint / _STATE).read_text())


def check_identity(checkpoint: Path, saved: dict, wanted: dict) -> None:
    """Raise `UserError` unless a checkpoint of a run that was `saved` can go on as `wanted`."""
    for key, value in wanted.items():
        if saved.get(key) != value:
            raise UserError(
                f"{checkpoint}: saved with {key} {saved.get(key)}, this run has {key} {value}; make them equal, "
                "or start without --resume in another --run_dir"
            )


def verify(checkpoint: Path) -> None:
    """Check every file against the manifest. Collective: the ranks share the reading.

    Raises:
        UserError: on every rank alike, naming the damaged files.
    """
    expected = json.loads((checkpoint / _MANIFEST).read_text())
    found = _fingerprint(checkpoint)
    damaged = sorted(name for name, entry in expected.items() if found.get(name) != entry)
    if damaged:
        others = sorted(path.name for path in checkpoint.parent.glob("step_*") if path != checkpoint)
        hint = f"resume from another one: --resume {others[-1]}" if others else "there is no other one"
        raise UserError(f"{checkpoint}: damaged or missing: {', '.join(damaged)}; {hint}")


def load(engine, checkpoint: Path) -> dict:
    """Verify `checkpoint`, load it into an engine of the same grid and return its state. Collective."""
    verify(checkpoint)
    loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    assert loaded is not None, f"DeepSpeed did not load {checkpoint}"
    return read_state(checkpoint)


def _fingerprint(folder: Path, world=None) -> dict[str, list[int]]:
    """{file name: [bytes, CRC-32]} of the files in `folder`, read once each, shared out over the ranks and flushed."""
    rank, world_size = torch.distributed.get_rank(world), torch.distributed.get_world_size(world)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST)
    mine = {name: list(_size_and_crc(folder / name)) for name in names[rank::world_size]}
    parts = [None] * world_size
    torch.distributed.all_gather_object(parts, mine, group=world)
    return {name: entry for part in parts for name, entry in part.items()}


def _size_and_crc(path: Path) -> tuple[int, int]:
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
        os.fsync(file.fileno())
    return size, crc


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    _flush(beside)
    os.replace(beside, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
