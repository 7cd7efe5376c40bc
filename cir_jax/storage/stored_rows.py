"""Rows of features on disk, read one by one: memory does not grow with their number."""

import collections
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cir_jax.errors import CheckpointError

OPEN = 64
"""Files that are kept open."""


def chunk_name(index: int) -> str:
    return f"chunk_{index:05d}.npy"


class Header(NamedTuple):
    """first: byte of the numbers. size: of the file."""

    shape: tuple[int, int]
    dtype: np.dtype
    first: int
    size: int

    @property
    def whole(self) -> bool:
        """Whether the file holds all numbers and no more."""
        return self.size == self.first + self.dtype.itemsize * math.prod(self.shape)


def header(file: Path) -> Header | None:
    """Of a .npy file of [rows, dim]; None for another one, or none."""
    try:
        with file.open("rb") as stream:
            np.lib.format.read_magic(stream)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            found = Header(shape, dtype, stream.tell(), os.fstat(stream.fileno()).st_size)
    except (OSError, ValueError, EOFError):
        return None
    return None if fortran or len(shape) != 2 else found


class StoredRows(Sequence):
    """float32[rows, *shape] of a `ChunkStore`, a row of which is read when it is asked for.

    Copies for worker processes hold the place alone.
    """

    def __init__(
        self, directory: Path, rows: int, files: Header, shape: tuple[int, ...] | None = None
    ):
        """files: what the first of them begins with, and so the others. shape: of a row, None = as
        it is stored."""
        self.directory, self.files = directory, files
        self.shape = (rows, *(shape or files.shape[1:]))
        self._open = collections.OrderedDict[int, BinaryIO]()
        self._lock = threading.Lock()

    def of_shape(self, shape: tuple[int, ...]) -> "StoredRows":
        """The same rows, each of another shape."""
        assert math.prod(shape) == math.prod(self.shape[1:]), (shape, self.shape)
        return StoredRows(self.directory, len(self), self.files, shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """One row; NaN throughout where an image could not be read.

        Raises CheckpointError when the file is gone, cut off or damaged.
        """
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number, row = divmod(index, self.files.shape[0])
        path = self.directory / chunk_name(number)
        size = self.files.dtype.itemsize * math.prod(self.shape[1:])
        try:
            file = self._file(number, path)  # held: it closes with whoever has it last
            data = os.pread(file.fileno(), size, self.files.first + row * size)
        except OSError as error:
            raise self._damaged(path, error.strerror or str(error)) from error
        if len(data) != size:
            raise self._damaged(path, f"row {row} is cut off")
        values = np.frombuffer(data, self.files.dtype).astype(np.float32)
        odd = np.isnan(values)
        if not np.isfinite(values).all() and not odd.all():  # of an earlier version
            raise self._damaged(path, f"row {row} is not finite")
        return values.reshape(self.shape[1:])

    def _file(self, number: int, path: Path) -> BinaryIO:
        """The open file; whoever has it may read on when it is let go."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        file = path.open("rb", buffering=0)
        with self._lock:
            file = self._open.setdefault(number, file)  # another thread may have been faster
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
        return file

    def _damaged(self, path: Path, what: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: {what}. Delete {self.directory} and run the same command again: the features "
            "are computed anew."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredRows, (self.directory, len(self), self.files, self.shape[1:])
