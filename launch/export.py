"""A run's model as a normal Hugging Face folder: safetensors, config.json and the item catalogue (items.parquet).

python launch/export.py RUN_DIR OUT                  the best validation's weights, or else the newest checkpoint's
python launch/export.py RUN_DIR OUT --checkpoint     the newest checkpoint's; --checkpoint step_00000120: that one's
"""

import shutil
from pathlib import Path

from command import arguments, run


def main(options) -> None:
    from ds_recsys import UserError, checkpoint
    from ds_recsys.models.convert import convert_checkpoint
    from ds_recsys.models.folder import put_in_place

    run_dir, out = Path(options.run_dir), Path(options.out)
    if not (run_dir / "model").exists():
        raise UserError(
            f"{run_dir}: no model/ in it, so not the folder of a run; give the --run_dir of launch/train.py"
        )
    if options.checkpoint or not (run_dir / "best").exists():
        tag = options.checkpoint if isinstance(options.checkpoint, str) else None
        convert_checkpoint(checkpoint.find(run_dir / "checkpoints", tag), run_dir / "model", out)
    else:
        partial = out.parent / f".{out.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(run_dir / "best", partial)
        put_in_place(partial, out)
    print(out)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("run_dir", help="folder of a run")
    parser.add_argument("out", help="folder to write; replaced when the new one is whole")
    parser.add_argument("--checkpoint", nargs="?", const=True, help="take a checkpoint in place of the best validation")
    run(main, parser)
