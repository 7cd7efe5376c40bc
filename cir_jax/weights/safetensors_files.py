"""Safetensors files: the header is read at once, of the numbers no more than is asked for.

What is read is held by who asked for it and by nobody else; a file mapped into memory, as the
library reads it, would be counted as the process's own. Damage in the numbers cannot be noticed, as
there are no checksums.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from cir_jax.errors import WeightsError
from cir_jax.weights import kinds
from cir_jax.weights.lazy import Index, Lazy, Stored, empty

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

PAGE = 4096
"""Bytes. No disk reads less: of runs that are shorter, the whole rows are read and cut."""
_BLOCK = 2**20
"""Bytes of whole rows that are read at a time."""


def read(path: Path) -> Lazy:
    """The tensors of one file, by name.

    Raises WeightsError naming the file when it is of another kind or damaged; so does reading a
    tensor of a type that no array has, or one that is not there any more.
    """
    if problem := kinds.problem(path, kinds.SAFETENSORS):
        raise WeightsError(problem)
    with _about(path):
        with safe_open(path, framework="numpy"):  # the library checks all that the header says
            pass
        file = _File(path)
        size = int.from_bytes(file.bytes(0, 8), "little")
        header = json.loads(file.bytes(8, size))
    header.pop("__metadata__", None)
    return Lazy({name: _stored(file, 8 + size, name, about) for name, about in header.items()})


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: unreadable ({error}). Download or copy it again.") from error


class _File:
    """An open file, until nobody needs it any more."""

    def __init__(self, path: Path):
        self.path = path
        self._raw = path.open("rb", buffering=0)

    def __del__(self) -> None:
        if hasattr(self, "_raw"):
            self._raw.close()

    def bytes(self, begin: int, size: int) -> bytearray:
        data = bytearray(size)
        self.fill(memoryview(data), begin)
        return data

    def fill(self, data: memoryview, begin: int) -> None:
        """Reads as many bytes as `data` has."""
        self._raw.seek(begin)
        while data:
            if not (count := self._raw.readinto(data)):
                raise OSError("it ends too early")
            data = data[count:]


def _stored(file: _File, start: int, name: str, about: dict) -> Callable[[], Stored]:
    """start: of all numbers, in the file. about: what the header says of this tensor."""
    kind, shape, begin = about["dtype"], tuple(about["shape"]), start + about["data_offsets"][0]

    def stored() -> Stored:
        if kind not in _DTYPES:
            raise WeightsError(
                f"{file.path}: unreadable ({name} is of type {kind}, which no array has). Take the "
                "model's original weights, not quantised."
            )
        dtype = np.dtype(_DTYPES[kind])
        return Stored(shape, dtype, lambda index: _part(file, begin, shape, dtype, index))

    return stored


def _part(
    file: _File, begin: int, shape: tuple[int, ...], dtype: np.dtype, index: Index
) -> np.ndarray:
    """begin: of the tensor, in the file."""
    sizes = tuple(axis.stop - axis.start for axis in index)
    out = empty(sizes, dtype)
    if not out.size:
        return out
    steps = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    starts = [axis.start * step for axis, step in zip(index, steps, strict=True)]
    # what lies behind this axis is asked for whole, so its span is one run
    last = max((axis for axis, size in enumerate(sizes) if size < shape[axis]), default=0)
    run = sizes[last] * steps[last] if sizes else dtype.itemsize
    with _about(file.path):
        if last and run < PAGE:
            rows = max(1, _BLOCK // steps[0])
            for row in range(0, sizes[0], rows):
                some = np.empty((min(rows, sizes[0] - row), *shape[1:]), dtype)
                file.fill(_bytes(some), begin + starts[0] + row * steps[0])
                out[row : row + len(some)] = some[:, *index[1:]]
            return out
        data, first = _bytes(out), begin + sum(starts)
        for number, place in enumerate(itertools.product(*map(range, sizes[:last]))):
            offset = sum(i * step for i, step in zip(place, steps, strict=False))
            file.fill(data[number * run : (number + 1) * run], first + offset)
    return out


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))
