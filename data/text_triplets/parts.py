"""A text file that grows by blocks, each of which is whole or not there after a kill."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError


class Growing:
    """`path`, and beside it `path.journal` with a line per block: {"bytes": its end, ...}.

    blocks: the journal's lines, without that which says that the file is finished.
    Raises DataError when the file is shorter than its journal says.
    """

    def __init__(self, path: Path):
        self.path, self._journal = path, path.with_name(path.name + ".journal")
        stored = self._journal.read_bytes() if self._journal.is_file() else b""
        *lines, rest = stored.split(b"\n")
        if rest:  # cut off by a kill
            os.truncate(self._journal, len(stored) - len(rest))
        try:
            self.blocks: list[dict[str, Any]] = [json.loads(line) for line in lines]
            ends = [0, *(block["bytes"] for block in self.blocks)]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self._journal}: damaged ({error}). Delete {path.parent} to begin again."
            ) from error
        self.finished = bool(self.blocks) and "finished" in self.blocks[-1]
        if self.finished:
            self.blocks.pop()
        self._end = ends[-1]

    @property
    def length(self) -> int:
        """Bytes of all blocks."""
        return self._end

    def add(self, lines: Iterable[str], note: dict[str, Any]) -> None:
        """Appends a block. note: what the journal keeps about it."""
        data = "".join(f"{line}\n" for line in lines).encode()
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            self._check(os.fstat(file.fileno()).st_size)
            file.truncate(self._end)
            file.seek(self._end)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(data)
        self._note({"bytes": self._end, **note})
        self.blocks.append({"bytes": self._end, **note})

    def finish(self, final: Path | None = None) -> None:
        """Says that there are no more blocks; the file gets its final name. May be called again."""
        if not self.finished:
            if not self.path.exists():
                self.path.touch()  # without a block
            self._check(self.path.stat().st_size)
            os.truncate(self.path, self._end)
            self._note({"bytes": self._end, "finished": True})
            self.finished = True
        if final is None:
            return
        if self.path.exists():
            os.replace(self.path, final)
        elif not final.exists():
            raise DataError(
                f"{final}: was written, and is gone. Delete {self.path.parent} to make it again."
            )

    def read(self, block: int) -> Iterator[str]:
        """The lines of a block."""
        start = self.blocks[block - 1]["bytes"] if block else 0
        with self.path.open("rb") as file:
            self._check(os.fstat(file.fileno()).st_size)
            file.seek(start)
            data = file.read(self.blocks[block]["bytes"] - start)
        yield from data.decode().split("\n")[:-1]

    def _check(self, size: int) -> None:
        if size < self._end:
            raise DataError(
                f"{self.path}: has {size:,} bytes, its journal says {self._end:,}: it was changed "
                f"or damaged. Delete {self.path.parent} to begin again."
            )

    def _note(self, line: dict[str, Any]) -> None:
        with self._journal.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
