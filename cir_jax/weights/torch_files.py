"""PyTorch checkpoint files (.pt, .pth, .bin, TorchScript archives) read without PyTorch.

No code of a file is run: its pickle may name any class, but a name is only ever turned into an
inert placeholder, never imported. That is stricter than PyTorch's weights-only loading, and it also
reads TorchScript archives (OpenAI's CLIP files), which PyTorch would load by compiling their code.
Files written before PyTorch 1.6 are not zip archives; they are left to PyTorch, weights-only.
"""

import collections
import functools
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError

_STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_WRAPPERS = ("state_dict", "model", "model_state_dict", "ema_model", "CLIP")
"""Keys under which training scripts keep the model; what is beside it (optimiser, epoch) is not."""


class Lazy(Mapping[str, np.ndarray]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
        self._readers = readers

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers  # the default would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def read(path: Path) -> Mapping[str, np.ndarray]:
    """The state dict of a file; of a training checkpoint, the model's part of it.

    Raises WeightsError naming the file when it cannot be read or holds no tensors.
    """
    tensors = _flatten(_unwrap(_tree(path)))
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors. Expected the weights of a model.")
    return _without_module(tensors)


def read_parts(path: Path) -> dict[str, Mapping[str, np.ndarray]]:
    """The state dicts of a training checkpoint by their key; a tensor beside them is under "".

    Raises WeightsError naming the file when it cannot be read.
    """
    tree = _tree(path)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        name = str(key) if isinstance(value, Mapping) else ""
        if found := _flatten(value, "" if name else f"{key}."):
            parts.setdefault(name, {}).update(found)
    return {name: _without_module(tensors) for name, tensors in parts.items()}


def _tree(path: Path) -> Any:
    try:
        return _Archive(path).tree() if zipfile.is_zipfile(path) else _legacy(path)
    except WeightsError:
        raise
    except Exception as error:  # a corrupt pickle raises whatever its opcodes run into
        raise WeightsError(
            f"{path}: not a readable PyTorch file ({type(error).__name__}: {error}). "
            "Download or copy it again."
        ) from error


def _without_module(tensors: dict[str, Any]) -> Lazy:
    if all(name.startswith("module.") for name in tensors):  # of DataParallel
        tensors = {name.removeprefix("module."): reader for name, reader in tensors.items()}
    return Lazy(tensors)


class _Tensor:
    """Where a tensor lies in a storage; calling it reads it."""

    def __init__(self, read: Callable[[], np.ndarray], offset: int, shape: Any, strides: Any):
        self.read, self.offset = read, offset
        self.shape, self.strides = tuple(shape), tuple(strides)

    def __call__(self) -> np.ndarray:
        flat = self.read()
        last = self.offset + sum(
            (n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)
        )
        # a view that reaches out of its storage would read foreign memory
        if min((self.offset, *self.shape, *self.strides)) < 0:
            raise WeightsError(f"corrupt file: negative tensor shape {self.shape}")
        if 0 not in self.shape and last >= len(flat):
            raise WeightsError(f"corrupt file: a tensor of shape {self.shape} ends too early")
        strides = [step * flat.itemsize for step in self.strides]
        view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides)
        return np.array(view, order="C")


class _Inert(dict):
    """Stands for an object of any class: keeps its state as items, runs nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.update(state)

    def append(self, item: Any) -> None:
        """Items of lists and sets are no parameters."""

    def extend(self, items: Any) -> None:
        """Ditto."""

    add = append


def _rebuild_tensor(storage: Any, offset: int, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, strides)


def _first(value: Any, *rest: Any) -> Any:
    return value


_BUILDERS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, storage: Callable[[np.dtype, str, int], Any]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return _BUILDERS.get((module, name)) or type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise WeightsError(
                f"unknown tensor storage {getattr(dtype, '__name__', dtype)!r}. Save the weights "
                "as safetensors: `safetensors.torch.save_file(model.state_dict(), FILE)`."
            )
        return self._storage(dtype, key, count)


class _Archive:
    """A zip archive of `torch.save` or `torch.jit.save`."""

    def __init__(self, path: Path):
        self._zip = zipfile.ZipFile(path)
        pickles = [n for n in self._zip.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if not pickles:
            raise WeightsError(f"{path}: a zip archive, but not one of PyTorch (no data.pkl).")
        self._root = pickles[0].removesuffix("/data.pkl")
        # several tensors may share a storage
        self._bytes = functools.lru_cache(maxsize=1)(self._zip.read)

    def tree(self) -> Any:
        with self._zip.open(f"{self._root}/data.pkl") as file:
            return _Unpickler(file, self._storage).load()

    def _storage(self, dtype: np.dtype, key: str, count: int) -> Callable[[], np.ndarray]:
        def read_storage() -> np.ndarray:
            return np.frombuffer(self._bytes(f"{self._root}/data/{key}"), dtype, count)

        return read_storage


def _legacy(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path}: not a zip archive, so either no PyTorch file or one from before PyTorch 1.6, "
            "which only PyTorch can read: `pip install cir_jax[torch]`, or save it as safetensors."
        ) from error
    tree = torch.load(path, map_location="cpu", weights_only=True)

    def readers(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            flat = node.detach().contiguous().reshape(-1)
            flat = flat.float() if flat.dtype == torch.bfloat16 else flat
            return _Tensor(flat.numpy, 0, node.shape, node.contiguous().stride())
        return {k: readers(v) for k, v in node.items()} if isinstance(node, Mapping) else None

    return readers(tree)


def _unwrap(tree: Any) -> Any:
    for key in _WRAPPERS:
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            return _unwrap(tree[key])
    return tree


def _flatten(tree: Any, prefix: str = "") -> dict[str, Callable[[], np.ndarray]]:
    if isinstance(tree, _Tensor):
        return {prefix[:-1]: tree}
    flat: dict[str, Callable[[], np.ndarray]] = {}
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            flat |= _flatten(value, f"{prefix}{key}.")
    return flat
