"""Files of a row of files that stay open between reads."""

import collections
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

OPEN = 64
"""That are kept."""

_File = TypeVar("_File")


class KeptOpen(Generic[_File]):
    """What `opened` makes of a number, for many threads: those used last are kept.

    One that is let go must close with whoever has it last, and not before: a thread may be reading
    it.
    """

    def __init__(self, opened: Callable[[int], _File]):
        self._opened = opened
        self._kept = collections.OrderedDict[int, _File]()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, number: int) -> _File:
        """Hold it until it is read. Raises what `opened` raises."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        file = self._opened(number)  # which may take a while
        with self._lock:
            file = self._kept.setdefault(number, file)  # another thread may have been faster
            while len(self._kept) > OPEN:
                self._kept.popitem(last=False)
        return file
