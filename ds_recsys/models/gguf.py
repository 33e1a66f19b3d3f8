"""GGUF files -> a normal HF folder of safetensors, once.

transformers can only read a GGUF file whole and de-quantised, which is no way to load one stage. So it is converted
into a cache folder by one process while the others wait on a file lock, in a child process so that the caller's
memory never holds the model, and from then on it is sliced like any other checkpoint.
"""

import copy
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from ds_recsys.cache import default_cache
from ds_recsys.errors import UserError

FINGERPRINT_BYTES = 1 << 20


def gguf_folder(path: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> Path:
    """HF folder (config, fp32 safetensors, tokenizer) made of the GGUF file `path`; converted at the first call.

    Raises:
        UserError: no such file, or transformers cannot read its architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    folder = cache / f"{path.stem}-{_fingerprint(path)}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            command = [
                sys.executable,
                "-c",
                "from ds_recsys.models.gguf import convert; convert()",
                str(path),
                str(partial),
            ]
            root = str(Path(__file__).parents[2])
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"{path} could not be converted: {last}")
            partial.rename(folder)
    return folder


def convert() -> None:
    """Body of the child process: argv holds the GGUF file and the folder to write."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    files = {"gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **files)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # the tensors are de-quantised, yet transformers would refuse to save them
    with init_empty_weights(include_buffers=False):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, **files).save_pretrained(target)


def _fingerprint(path: Path) -> str:
    """Of the size, the first and the last MiB: enough to tell two model files apart without reading them through."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read())
    return digest.hexdigest()[:12]
