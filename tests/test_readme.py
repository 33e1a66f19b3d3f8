"""The README is in step with the code: the generated reference, the file list, the two commands."""

import re
import subprocess
from pathlib import Path

from ds_recsys.config import reference_markdown
from ds_recsys.models.hf_private import CAUSAL_LM_CLASSES
from ds_recsys.models.tensor.families import UNSHARDED
from ds_recsys.models.unsupported import UNSUPPORTED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_reference_is_generated():
    assert reference_markdown().strip() in README, "run `python -m ds_recsys.config` and put its output into README.md"


def test_every_file_is_listed():
    listing = README.split("## Files")[1].split("## ")[0]
    for path in [*(ROOT / "launch").iterdir(), *(ROOT / "ds_configs").iterdir(), *(ROOT / "ds_recsys").glob("*.py")]:
        if path.is_file() and path.name != "__init__.py":
            assert f"{path.parent.name}/{path.name} " in listing, path
    for path in (ROOT / "ds_recsys").glob("*/*.py"):
        if not path.name.startswith("__"):
            assert re.search(rf"\b{path.stem}\b", listing), path
    for path in re.findall(r"^(\S+\.(?:py|sh|json)) ", listing, flags=re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_types_on_a_tensor_axis_are_listed():
    listed = set(re.findall(r"`([\w.-]+)`", README.split("<!-- tensor-types -->")[1]))
    assert listed == CAUSAL_LM_CLASSES.keys() - UNSUPPORTED.keys() - UNSHARDED.keys()


def test_no_placeholder_is_left():
    assert not re.search(r"@[A-Z]+@", README)


def test_shell_scripts_parse():
    for script in (ROOT / "launch").glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
