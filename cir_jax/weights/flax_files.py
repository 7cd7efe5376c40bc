"""Files of Flax's parameters, pickled: read without running the pickle, and written again.

Such a file is a pickle of one bytes object, which `flax.serialization.to_bytes` made of the tree:
msgpack, in which an array is an extension of (shape, type, numbers). MagicLens is released so.
Nothing of the file is called or imported, and what it declares takes no memory: a length is
compared with what is there before anything is made of that size.
"""

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
from flax import serialization

from cir_jax.errors import WeightsError
from cir_jax.input import pickles
from cir_jax.storage.atomic import write_atomically
from cir_jax.weights import convert, kinds

EXPECTED = "a pickle of Flax's bytes"

_ENTRIES, _AXES = 10_000, 32
"""Of one dictionary; of an array."""

_ARRAY, _SCALAR = 1, 3
"""Flax's numbers of msgpack extensions."""

_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": jnp.bfloat16,
    "int32": np.int32,
    "int64": np.int64,
}


class _Reader(pickles.Reader):
    """Bytes alone, so nothing is named, and what is not named cannot be called."""

    def named(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays by their path in the tree: "params/clip/logit_scale".

    They are views of what was read. Raises WeightsError naming the file when it is of another kind
    or damaged, and an array of a type or size that is none.
    """
    kind = kinds.of(path)
    if kind in (kinds.ZIP, kinds.LEGACY, kinds.SAFETENSORS):
        raise WeightsError(f"{path}: not {EXPECTED}, but {kind}. Give the file of the authors.")
    if problem := kinds.problem(path, EXPECTED):
        raise WeightsError(problem)
    try:
        packed = _Reader(io.BytesIO(path.read_bytes())).load()
        if not isinstance(packed, bytes):
            raise ValueError(f"it holds {type(packed).__name__}, expected bytes")
        tree = msgpack.unpackb(packed, ext_hook=_unpack, max_array_len=_AXES, max_map_len=_ENTRIES)
        if not isinstance(tree, dict):
            raise ValueError(f"its bytes are {type(tree).__name__}, expected a tree")
        flat = {"/".join(keys): leaf for keys, leaf in convert.flatten(tree).items()}
        if odd := [name for name, leaf in flat.items() if not isinstance(leaf, np.ndarray)]:
            raise ValueError(f"{odd[0]} is {type(flat[odd[0]]).__name__}, expected an array")
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes run into
        raise WeightsError(
            f"{path}: not {EXPECTED}, or damaged ({type(error).__name__}: {str(error)[:200]}). "
            "Download or copy it again."
        ) from error
    if not flat:
        raise WeightsError(f"{path}: holds no arrays. Expected the weights of a model.")
    return flat


def _unpack(code: int, data: bytes) -> np.ndarray:
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"an extension {code}, expected arrays")
    shape, name, numbers = msgpack.unpackb(data, raw=True, max_array_len=_AXES)
    if (name := name.decode()) not in _DTYPES:
        raise ValueError(f"an array of {name}, expected one of {', '.join(_DTYPES)}")
    dtype = np.dtype(_DTYPES[name])
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(numbers):
        raise ValueError(f"an array of shape {tuple(shape)}, {name}, of {len(numbers)} bytes")
    return np.frombuffer(numbers, dtype).reshape(shape)


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """The inverse of `read`; Flax's `from_bytes(target, pickle.load(file))` reads it, too."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, leaf = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = np.asarray(array)
    packed = serialization.msgpack_serialize(tree)
    write_atomically(path, lambda file: pickle.dump(packed, file, protocol=4))
