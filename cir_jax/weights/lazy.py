"""Tensors of files, of which no more is read than is asked for, when it is asked for."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

Index = tuple[slice, ...]
"""One slice per axis, with start and stop."""

_ALIGNED = 64
"""Bytes; arrays that begin elsewhere are copied for each device."""


class Stored:
    """A tensor in a file: shape and type are known, its numbers are read where it is indexed."""

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[Index], np.ndarray]
    ):
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read

    def __getitem__(self, index: Index) -> np.ndarray:
        return self._read(spans(index, self.shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)


class Lazy(Mapping[str, np.ndarray]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray | Stored]]):
        self._readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self.stored(name))

    def stored(self, name: str) -> np.ndarray | Stored:
        """To be read in part."""
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers  # the default would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def stored(tensors: Mapping[str, np.ndarray], name: str) -> np.ndarray | Stored:
    """One of some tensors, not read yet where it lies in a file."""
    return tensors.stored(name) if isinstance(tensors, Lazy) else np.asarray(tensors[name])


def reader(tensors: Mapping[str, np.ndarray], name: str) -> Callable[[], np.ndarray | Stored]:
    """For another `Lazy`, which has the tensor under a name of its own."""
    return lambda: stored(tensors, name)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As np.empty, where JAX's CPU devices take arrays as they are, all of them the same one."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    begin = -memory.ctypes.data % _ALIGNED
    return memory[begin : begin + size].view(dtype).reshape(shape)


def spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    """The index with start and stop for each axis; axes that it does not name are whole."""
    given = (*index, *(slice(None),) * (len(shape) - len(index)))
    ends = (axis.indices(size) for axis, size in zip(given, shape, strict=True))
    return tuple(slice(start, stop) for start, stop, _ in ends)


def equal(one: np.ndarray | Stored, other: np.ndarray | Stored, rows: int = 1024) -> bool:
    """As np.array_equal, of which both are read a few rows at a time."""
    if one.shape != other.shape:
        return False
    parts = [(slice(i, i + rows),) for i in range(0, one.shape[0], rows)] if one.shape else [()]
    return all(np.array_equal(one[part], other[part]) for part in parts)
