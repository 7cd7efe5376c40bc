"""Images that lie in other files than their own: what a builder needs of a path, of those."""

import bisect
import collections
import dataclasses
import functools
import itertools
import os
import threading
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError
from data import formats, tars

KEPT = 4  # row groups of a Parquet file that are kept, for threads that read a little apart


@dataclasses.dataclass(frozen=True)
class Held:
    """Row `row` of a Parquet file whose column `column` is an image, as `datasets` writes it."""

    file: Path
    row: int
    column: str = "image"

    @property
    def name(self) -> str:
        """For stamps and messages."""
        return f"{self.file.name} row {self.row}"

    def stat(self) -> os.stat_result:
        """That of the file. Raises FileNotFoundError."""
        return self.file.stat()

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError where the row has no image, as a path does."""
        image = _opened(self.file, self.column).read(self.row)
        if not image:
            raise FileNotFoundError(self.name)
        return image

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


@dataclasses.dataclass(frozen=True)
class Archived:
    """A file in a tar file."""

    member: tars.Member

    @property
    def name(self) -> str:
        """For stamps and messages."""
        return f"{self.member.archive.name} {self.member.name}"

    def stat(self) -> os.stat_result:
        """That of the tar file. Raises FileNotFoundError."""
        return self.member.archive.stat()

    def read_bytes(self) -> bytes:
        """Raises Unusable when the tar file is truncated."""
        return self.member.read()

    def __str__(self) -> str:
        return f"{self.member.archive} {self.member.name}"


Place = Path | Held | Archived
"""Where an image lies."""


class _Images:
    """The images of a Parquet file by row; the row groups read last are kept."""

    def __init__(self, file: Path, column: str):
        self._table, self._column, self._file = formats.parquet(file), column, file
        self._lock = threading.Lock()  # a ParquetFile has one position
        sizes = (
            self._table.metadata.row_group(i).num_rows
            for i in range(self._table.metadata.num_row_groups)
        )
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def read(self, row: int) -> bytes | None:
        group = bisect.bisect_right(self._starts, row) - 1
        with self._lock:
            if group not in self._kept:
                self._kept[group] = self._read_group(group)
            self._kept.move_to_end(group)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            value = self._kept[group][row - self._starts[group]].as_py()
        return value["bytes"] if value else None

    def _read_group(self, group: int) -> Any:
        try:
            found = self._table.read_row_group(group, columns=[f"{self._column}.bytes"])
            return found.column(self._column).combine_chunks()
        except Exception as error:  # pyarrow has its own hierarchy, beside OSError
            raise DataError(
                f"{self._file} row group {group}: unreadable ({error}). Get it again."
            ) from error


@functools.lru_cache(maxsize=8)
def _opened(file: Path, column: str) -> _Images:
    return _Images(file, column)
