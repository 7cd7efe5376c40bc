"""How far work has come, as whoever started it sees it."""

import io
import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 30.0
"""Seconds between two lines where nobody is watching."""
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress(tqdm):
    """tqdm's bar, as long as someone is watching. In the log of a job, where each drawing of it
    stays, a line every half minute and one at the end; none of what takes less."""

    def __init__(self, *args: Any, **options: Any):
        self._watched = sys.stderr.isatty()
        self._began = self._said = time.monotonic()
        self._said_of = None
        if not self._watched:
            options |= {"file": io.StringIO(), "bar_format": LINE}
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        if self._watched:
            return super().display(msg, pos)
        if time.monotonic() - self._said >= EVERY:
            self._say()
        return None

    def close(self) -> None:
        if not (self.disable or self._watched) and self._said > self._began:
            self._say()
        super().close()

    def _say(self) -> None:
        if self.n != self._said_of:
            print(self, file=sys.stderr, flush=True)
        self._said, self._said_of = time.monotonic(), self.n
