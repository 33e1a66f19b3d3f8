"""What the scripts share: the parser, quiet libraries, and one clear line in place of a traceback for a user's mistake."""

import argparse
import os
import sys
import warnings

from ds_recsys.errors import LostRank, UserError


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser that also takes what launchers append."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the deepspeed launcher
    return parser


def run(main, parser: argparse.ArgumentParser) -> None:
    """`main(options)`; a UserError is printed once per host and exits with status 2."""
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # one per rank and start
    try:
        main(options)
    except UserError as error:
        lost = isinstance(error, LostRank)
        if lost or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        if lost:
            os._exit(2)  # taking leave of a process group whose ranks are gone can wait for them
        sys.exit(2)
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
