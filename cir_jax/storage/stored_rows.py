"""Rows of features on disk, read one by one: memory does not grow with their number."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cir_jax.errors import CheckpointError
from cir_jax.storage.kept_open import KeptOpen


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
    """Of a .npy file of numbers [rows, dim]; None for another one, or none."""
    try:
        with file.open("rb") as stream:
            np.lib.format.read_magic(stream)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            found = Header(shape, dtype, stream.tell(), os.fstat(stream.fileno()).st_size)
    except Exception:  # of a damaged one, as many kinds as Python's parser has
        return None
    numbers = dtype.kind == "f" and dtype.isnative  # as this project writes them
    return found if numbers and not fortran and len(shape) == 2 else None


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
        self._open = KeptOpen(self._opened)

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
            file = self._open.get(number)
            data = _pread(file, size, self.files.first + row * size)
        except OSError as error:
            raise self._damaged(path, error.strerror or str(error)) from error
        if len(data) != size:
            raise self._damaged(path, f"row {row} is cut off")
        values = np.frombuffer(data, self.files.dtype).astype(np.float32)
        odd = np.isnan(values)
        if not np.isfinite(values).all() and not odd.all():  # of an earlier version
            raise self._damaged(path, f"row {row} is not finite")
        return values.reshape(self.shape[1:])

    def _opened(self, number: int) -> BinaryIO:
        return (self.directory / chunk_name(number)).open("rb", buffering=0)

    def _damaged(self, path: Path, what: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: {what}. Delete {self.directory} and run the same command again: the features "
            "are computed anew."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredRows, (self.directory, len(self), self.files, self.shape[1:])


def _pread(file: BinaryIO, size: int, where: int) -> bytes:
    """`size` bytes from there on, fewer at the end of the file: at once, unless the system gives
    less, as some disks of a network do."""
    data = part = os.pread(file.fileno(), size, where)
    while part and len(data) < size:
        part = os.pread(file.fileno(), size - len(data), where + len(data))
        data += part
    return data
