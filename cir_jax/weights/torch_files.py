"""PyTorch checkpoint files (.pt, .pth, .bin, TorchScript archives) read without PyTorch.

No code of a file is run: its pickle may name any class, but a name is only ever turned into an
inert placeholder, never imported. That is stricter than PyTorch's weights-only loading, and it also
reads TorchScript archives (OpenAI's CLIP files), which PyTorch would load by compiling their code.

A file takes memory in proportion to its size on disk, whatever it declares: no member may be
compressed, and its tensors together take at most VIEWS times as much as the file, since views of a
shared storage could be made of any size.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.input import pickles
from cir_jax.input.pickles import Global, Object
from cir_jax.weights import kinds
from cir_jax.weights.lazy import Lazy, Stored
from cir_jax.weights.torch_archives import SAVE_WEIGHTS, DamagedError, Legacy, Read, Zip

VIEWS = 4
"""Weights are dense: tied ones share a storage, nothing is repeated many times."""

_SMALL = 2**20  # bytes: an expanded scalar is no attack
_DEPTH, _NAME, _NODES, _AXES = 100, 1000, 100_000, 32
"""Levels of a state dict, characters of a name, dictionaries and tensors in all, axes of one."""

_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": jnp.bfloat16,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
    "float8_e4m3fnuz": jnp.float8_e4m3fnuz,
    "float8_e5m2fnuz": jnp.float8_e5m2fnuz,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
_WRAPPERS = ("state_dict", "model", "model_state_dict", "ema_model", "CLIP")
"""Keys under which training scripts keep the model; what is beside it (optimiser, epoch) is not."""


def read(path: Path) -> Mapping[str, np.ndarray]:
    """The state dict of a file; of a training checkpoint, the model's part of it.

    Raises WeightsError naming the file when it cannot be read or holds no tensors; so does reading
    a tensor that is damaged or of a kind that no array has (sparse, quantised).
    """
    with _about(path):
        tensors = _flatten(_unwrap(_tree(path)))
        _check_size(tensors, path)
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors. Expected the weights of a model.")
    return _lazy(tensors, path)


def read_parts(path: Path) -> dict[str, Mapping[str, np.ndarray]]:
    """The state dicts of a training checkpoint by their key; a tensor beside them is under "".

    Raises WeightsError as `read` does.
    """
    parts: dict[str, dict[str, _Tensor | _Foreign]] = {}
    with _about(path):
        tree = _tree(path)
        for key, value in tree.items() if isinstance(tree, dict) else ():
            name = str(key) if isinstance(value, dict | Object) else ""
            if found := _flatten(value, "" if name else f"{key}."):
                parts.setdefault(name, {}).update(found)
        every = [(f"{part}.{name}", t) for part in parts for name, t in parts[part].items()]
        _check_size(dict(every), path)
    return {name: _lazy(tensors, path) for name, tensors in parts.items()}


def read_values(path: Path, key: str) -> dict[str, Any]:
    """The plain values under `key` of a training checkpoint, such as the arguments of the script
    that wrote it: numbers, strings, truths, None. What is not plain is left out.

    Raises WeightsError as `read` does.
    """
    with _about(path):
        tree = _tree(path)
        found = tree.get(key) if isinstance(tree, dict) else None
        items = found.state if isinstance(found, Object) else found
        items = items if isinstance(items, dict) else {}
        return {k: x for k, x in items.items() if isinstance(x, str | int | float | None)}


@contextlib.contextmanager
def _about(path: Path, name: str = "") -> Iterator[None]:
    """Whatever a damaged file raises becomes a WeightsError that names it."""
    where = f"{path}: {name}: " if name else f"{path}: "
    try:
        yield
    except (WeightsError, MemoryError):
        raise
    except DamagedError as error:
        raise WeightsError(f"{where}{error}") from error
    except Exception as error:  # a corrupt pickle raises whatever its opcodes run into
        raise WeightsError(
            f"{where}not a readable PyTorch file ({type(error).__name__}: {str(error)[:200]}). "
            "Download or copy it again."
        ) from error


def _tree(path: Path) -> Any:
    if problem := kinds.problem(path, kinds.ZIP, kinds.LEGACY):
        raise WeightsError(problem)
    kind = kinds.of(path)
    if not kind:
        raise DamagedError("not a PyTorch file, or damaged.")
    archive = Zip(path) if kind == kinds.ZIP else Legacy(path)
    return archive.tree(lambda file: _Reader(file, archive))


def _lazy(tensors: Mapping[str, "_Tensor | _Foreign"], path: Path) -> Lazy:
    if all(name.startswith("module.") for name in tensors):  # of DataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}

    def reader(name: str, tensor: _Tensor | _Foreign) -> Callable[[], Stored]:
        def read_tensor() -> np.ndarray:
            with _about(path, name):
                return tensor.read()

        def stored() -> Stored:
            if isinstance(tensor, _Foreign):
                read_tensor()  # says what it is
            return Stored(tensor.shape, tensor.dtype, lambda index: read_tensor()[index])

        return stored

    return Lazy({name: reader(name, tensor) for name, tensor in tensors.items()})


class _Storage(NamedTuple):
    dtype: str
    size: int
    read: Read | None


class _Foreign:
    """A tensor that is no plain array of numbers."""

    nbytes, shape = 0, ()

    def __init__(self, kind: str):
        self.kind = kind

    def read(self) -> np.ndarray:
        raise DamagedError(
            f"is {self.kind}, expected a dense tensor of numbers.",
            "Save the model's original weights, not quantised, sparse or on the meta device.",
        )


class _Tensor:
    """Where a tensor lies in a storage."""

    def __init__(self, storage: _Storage, dtype: str, offset: Any, shape: Any, strides: Any):
        self.storage, self.dtype = storage, np.dtype(_DTYPES[dtype])
        self.offset, self.shape, self.strides = offset, tuple(shape), tuple(strides)
        numbers = (offset, *self.shape, *self.strides)
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise DamagedError(f"a tensor of shape {self.shape}, strides {self.strides}.")
        if len(self.shape) != len(self.strides) or len(self.shape) > _AXES:
            raise DamagedError(f"a tensor of {len(self.shape)} axes, {len(self.strides)} strides.")
        last = offset + sum(
            (n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)
        )
        # a view that reaches out of its storage would read foreign memory
        if 0 not in self.shape and last >= storage.size // self.dtype.itemsize:
            raise DamagedError(f"a tensor of shape {self.shape} reaches out of its storage.")

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for n in self.shape:
            count *= n
        return count

    def read(self) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        size = self.dtype.itemsize
        flat = self.storage.read(self.dtype).view(np.uint8)
        strides = [step * size for step in self.strides]
        view = np.ndarray(self.shape, self.dtype, flat.data, self.offset * size, strides)
        return np.array(view, order="C")


def _rebuild(
    storage: _Storage, dtype: Any, offset: Any, shape: Any, strides: Any, bits: Any
) -> Any:
    if dtype not in _DTYPES:
        return _Foreign(f"of type {dtype}")
    if isinstance(bits, dict) and any(bits.values()):
        return _Foreign("a conjugate or negated view")
    return _Tensor(storage, dtype, offset, shape, strides)


def _tensor_v2(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any = 0,
    hooks: Any = 0,
    bits: Any = 0,
) -> Any:
    return _rebuild(storage, storage.dtype, offset, shape, strides, bits)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Global,
    bits: Any = 0,
) -> Any:  # fmt: skip
    """Of a type that has no storage class of its own."""
    return _rebuild(storage, dtype.name, offset, shape, strides, bits)


def _of_class(function: Any, kind: Global, args: tuple[Any, ...], state: Any) -> Any:
    """A tensor with attributes of its own, or of a subclass."""
    plain = kind.module.split(".")[0] == "torch" and kind.name in ("Tensor", "Parameter")
    return _call(function, args) if plain else _Foreign(f"a {kind.module}.{kind.name}")


def _size(numbers: Any = ()) -> tuple[Any, ...]:
    if len(numbers) > _AXES:
        raise DamagedError(f"a shape of {len(numbers)} axes.")
    return tuple(numbers)


def _first(value: Any, *rest: Any) -> Any:
    return value


_BUILDERS: dict[Global, Callable[..., Any]] = {
    Global("torch._utils", "_rebuild_tensor"): _tensor_v2,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    Global("torch._utils", "_rebuild_parameter"): _first,
    Global("torch._utils", "_rebuild_parameter_with_state"): _first,
    Global("torch._tensor", "_rebuild_from_type"): _of_class,
    Global("torch._tensor", "_rebuild_from_type_v2"): _of_class,
    Global("torch", "Size"): _size,
    Global("collections", "OrderedDict"): lambda: {},
}


def _call(function: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(function, Global):
        if function in _BUILDERS:
            return _BUILDERS[function](*args)
        if function.name.startswith("_rebuild_"):
            return _Foreign(f"made by {function.module}.{function.name}")
    return Object(function)


class _Reader(pickles.Reader):
    def __init__(self, file: io.BytesIO, archive: Zip | Legacy):
        super().__init__(file)
        self._archive = archive

    def named(self, module: str, name: str) -> Any:
        return Global(module, name)

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        return _call(function, args)

    def outside(self, pid: Any) -> Any:
        what, *about = pid
        if what == "module":  # of a whole model, with its source
            return about[0]
        kind, key, _, count, *view = about
        if what != "storage" or any(part is not None for part in view):
            raise DamagedError(f"unknown reference to {what!r}.", "Save it with a newer PyTorch.")
        if not (isinstance(key, str) and type(count) is int and count >= 0):
            raise DamagedError(f"a storage of {count!r} elements.")
        name = _STORAGES.get(kind.name, kind.name)
        if name not in _DTYPES and isinstance(self._archive, Zip):
            return _Storage(name, 0, None)  # of another part of a checkpoint, perhaps
        if name not in _DTYPES:  # where it ends, and the next begins, is not known
            raise DamagedError(f"holds tensors of {name}.", "Save the model's original weights.")
        itemsize = np.dtype(_DTYPES[name]).itemsize
        read = self._archive.storage(key, count * itemsize, itemsize)
        return _Storage(name, count * itemsize, read)


def _unwrap(tree: Any) -> Any:
    for _ in range(_DEPTH):
        inner = [tree[k] for k in _WRAPPERS if isinstance(tree, dict) and _holds(tree.get(k))]
        if not inner:
            break
        tree = inner[0]
    return tree


def _holds(tree: Any) -> bool:
    return isinstance(tree, dict | Object)


def _flatten(tree: Any, prefix: str = "") -> dict[str, _Tensor | _Foreign]:
    """The tensors by their path; `prefix` ends with a dot."""
    found: dict[str, _Tensor | _Foreign] = {}
    nodes = 0

    def walk(node: Any, prefix: str, depth: int) -> None:
        nonlocal nodes
        nodes += 1
        if depth > _DEPTH or len(prefix) > _NAME or nodes > _NODES:  # it may hold itself
            raise DamagedError(
                f"more than {_DEPTH} levels, {_NAME} characters of a name, or {_NODES} entries: no "
                "state dict.",
                SAVE_WEIGHTS,
            )
        if isinstance(node, _Tensor | _Foreign):
            found[prefix[:-1]] = node
            return
        items = node.state if isinstance(node, Object) else node
        if isinstance(node, Object) and {"_parameters", "_modules"} <= items.keys():
            raise DamagedError(
                f"holds a whole model ({getattr(node.made_by, 'name', 'of some class')}), not its "
                "weights.",
                "Where that class is installed: `torch.save(model.state_dict(), FILE)`.",
            )
        for key, value in items.items():
            if _holds(value) or isinstance(value, _Tensor | _Foreign):
                walk(value, f"{prefix}{key}.", depth + 1)

    if _holds(tree) or isinstance(tree, _Tensor | _Foreign):
        walk(tree, prefix, 0)
    return found


def _check_size(tensors: Mapping[str, _Tensor | _Foreign], path: Path) -> None:
    size, total = os.path.getsize(path), sum(tensor.nbytes for tensor in tensors.values())
    if total > VIEWS * size + _SMALL:
        name = max(tensors, key=lambda name: tensors[name].nbytes)
        raise DamagedError(
            f"its tensors would take {total} bytes, more than {VIEWS} times the file's {size}; the "
            f"largest is {name}, {tensors[name].shape}. Views that repeat values are refused.",
            "Save dense weights: `{k: v.clone() for k, v in model.state_dict().items()}`.",
        )
