"""Log files of ranks: to the terminal line by line while they grow, and their last lines."""

import sys
import time
from pathlib import Path

_PROGRESS_SECONDS = 1.0  # a bar that is redrawn in place shows at most this often, as a line


class Follower:
    """Copies what a growing file gets to standard output, each line behind `prefix`."""

    def __init__(self, path: Path, prefix: str):
        self.path, self.prefix = path, prefix
        self._offset, self._rest, self._progress_at = 0, "", 0.0

    def step(self, last: bool = False) -> None:
        """Print the lines that came since the step before; `last`: also one that has no end yet."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        self._offset += len(data)
        text = self._rest + data.decode(errors="replace").replace("\r\n", "\n")
        *lines, self._rest = text.split("\n")
        printed = [self.prefix + self._latest(line) for line in lines]
        if "\r" in self._rest or (last and self._rest):
            now = time.monotonic()
            if last or now - self._progress_at >= _PROGRESS_SECONDS:
                printed.append(self.prefix + self._latest(self._rest))
                self._progress_at = now
            self._rest = "" if last else "\r" + self._rest.rpartition("\r")[2]
        shown = [line for line in printed if line != self.prefix or "\r" not in text]
        if shown:
            sys.stdout.write("\n".join(shown) + "\n")
            sys.stdout.flush()

    @staticmethod
    def _latest(line: str) -> str:
        """What a terminal would show of a line that was redrawn."""
        return next((part for part in reversed(line.split("\r")) if part.strip()), "")


def last_lines(path: Path, count: int = 5) -> list[str]:
    """The last lines of the file that are not blank; none when there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()][-count:]
