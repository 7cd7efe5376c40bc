"""Other people's tensors <-> our parameter trees, by explicit bidirectional name tables.

A family gives one table {source name: (target path, layout)}; every source tensor is used once,
every target parameter is filled once, and leftovers on either side are an error that lists them.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.weights.lazy import Index, Stored, empty, spans, stored

Path = tuple[str | tuple[str, ...], ...]
"""Path in our tree. An element may be a tuple of names, ("attention", ("query", "key"), "kernel"):
the source holds those parameters in one tensor, one after the other along its first axis."""

Target = tuple[Path, str]
"""Path in our tree, and the layout of the source tensor."""

# layout -> axes of our array in the source's; PyTorch: Linear [out, in], Conv2d [out, in, h, w]
_TO_OURS = {"same": None, "linear": (1, 0), "conv": (2, 3, 1, 0)}
_TO_SOURCE = {"same": None, "linear": (1, 0), "conv": (3, 2, 0, 1)}


# of bitsandbytes, GPTQ, AWQ, torchao, optimum-quanto, DeepSeek's and ComfyUI's fp8
_SCALE = re.compile(
    r"(.*[._])?((weight|input|output|activation|[kqv])_scale(_inv|_2)?|scale_(weight|input)|SCB"
    r"|weight(\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|_data|_scale)"
    r"|_packed|_zero_point|_format)|qweight|qzeros|g_idx|scaled_fp8)"
)


class Names(dict[str, Target]):
    """A name table, with the entries of PyTorch's usual modules."""

    def norm(self, source: str, *path: str | tuple[str, ...]) -> None:
        """LayerNorm: weight, bias -> scale, bias."""
        self[f"{source}.weight"] = ((*path, "scale"), "same")
        self[f"{source}.bias"] = ((*path, "bias"), "same")

    def batch_norm(self, source: str, *path: str | tuple[str, ...]) -> None:
        """BatchNorm with its running statistics -> scale, bias, mean, var."""
        self.norm(source, *path)
        self[f"{source}.running_mean"] = ((*path, "mean"), "same")
        self[f"{source}.running_var"] = ((*path, "var"), "same")

    def linear(self, source: str, *path: str | tuple[str, ...], bias: bool = True) -> None:
        """Linear: weight, bias -> kernel, bias."""
        self[f"{source}.weight"] = ((*path, "kernel"), "linear")
        if bias:
            self[f"{source}.bias"] = ((*path, "bias"), "same")


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter of ours that is not read yet: an index reads this part of it, and checks it.

    source: the tensor `name` of the weights `what`; axes: of ours in the source's, None = the same.
    first: where it begins on the source's first axis, of one that holds several.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    source: np.ndarray | Stored
    axes: tuple[int, ...] | None
    first: int
    name: str
    what: str

    def __getitem__(self, index: Index) -> np.ndarray:
        part = self._converted(self._read(index))
        if _is_finite(part):
            return part
        # in the words of all processes, whichever part they read: as it is stored, or not any more
        finite(np.asarray(self.source), self.name, self.what)
        whole = finite(self._converted(self._read(())), self.name, f"{self.what} as {self.dtype}")
        return whole[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def _read(self, index: Index) -> np.ndarray:
        """The source's numbers, on the axes of ours."""
        axes = self.axes or tuple(range(len(self.shape)))
        there = [slice(0)] * len(axes)
        for axis, span in zip(axes, spans(index, self.shape), strict=True):
            shift = 0 if axis else self.first
            there[axis] = slice(span.start + shift, span.stop + shift)
        return self.source[tuple(there)].transpose(axes)

    def _converted(self, part: np.ndarray) -> np.ndarray:
        part = _widened(part)
        if part.dtype == self.dtype and part.flags.c_contiguous:
            return part
        made = empty(part.shape, self.dtype)
        with np.errstate(over="ignore"):
            made[...] = part
        return made


def to_ours(
    tensors: Mapping[str, np.ndarray],
    names: Mapping[str, Target],
    *,
    ignore: Sequence[str] = (),
    what: str = "weights",
    dtype: Any = None,
) -> dict[str, Any]:
    """As `unread`, and read."""
    return read(unread(tensors, names, ignore=ignore, what=what, dtype=dtype))


def read(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a tree of `Parameter`, whole. Raises WeightsError as reading does."""
    return jax.tree.map(np.asarray, tree)


def unread(
    tensors: Mapping[str, np.ndarray],
    names: Mapping[str, Target],
    *,
    ignore: Sequence[str] = (),
    what: str = "weights",
    dtype: Any = None,
) -> dict[str, Any]:
    """Nested tree of `Parameter` from source tensors.

    ignore: patterns of source names that are known and not parameters.
    dtype: of the parameters; None = as they are stored.
    Raises WeightsError listing tensors that no parameter takes, and parameters without a tensor;
    for quantised weights, tensors that are no floating-point numbers, and, when they are read, NaN
    or infinity in them.
    """
    unused = [n for n in tensors if n not in names and not any(re.fullmatch(p, n) for p in ignore)]
    if scales := [n for n in unused if _SCALE.fullmatch(n)]:
        raise WeightsError(
            f"{what}: quantised weights, as {_some(scales, 3)} says: their numbers mean nothing by "
            "themselves. Take the model's original weights, or dequantise them in PyTorch."
        )
    missing = [n for n in names if n not in tensors]
    if unused or missing:
        raise WeightsError(
            f"{what}: does not fit this model. "
            f"Missing tensors ({len(missing)}): {_some(missing)}. "
            f"Tensors nothing takes ({len(unused)}): {_some(unused)}."
        )
    tree: dict[str, Any] = {}
    for name, (path, layout) in names.items():
        source, paths, axes = stored(tensors, name), expand(path), _TO_OURS[layout]
        _check_numbers(source.dtype, name, what)
        shape, count = source.shape, len(paths)
        if (axes and len(shape) != len(axes)) or (count > 1 and (not shape or shape[0] % count)):
            raise WeightsError(
                f"{what}: {name} has shape {shape}, which is no {layout} tensor"
                + (f" of {count} parts." if count > 1 else ".")
            )
        # one part is the tensor itself, which may be a scalar
        part = (shape[0] // count, *shape[1:]) if count > 1 else shape
        ours = tuple(part[axis] for axis in axes) if axes else part
        kind = np.dtype(dtype or (np.float32 if source.dtype.itemsize == 1 else source.dtype))
        for number, (*parents, leaf) in enumerate(paths):
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            first = number * part[0] if part else 0
            node[leaf] = Parameter(ours, kind, source, axes, first, name, what)
    return tree


def finite(array: np.ndarray, name: str, what: str) -> np.ndarray:
    """The array. Raises WeightsError when it holds NaN, infinity, or no floating-point numbers."""
    _check_numbers(array.dtype, name, what)
    array = _widened(array)
    if _is_finite(array):
        return array
    wrong = array.size - np.count_nonzero(np.isfinite(array))
    why = ""
    if array.dtype == np.float16:
        why = " Numbers above 65504 overflow in float16: save the original in float32 or bfloat16."
    raise WeightsError(
        f"{what}: {name} holds {wrong} of {array.size} values that are NaN or infinite. Take "
        f"another checkpoint, or download it again.{why}"
    )


def _check_numbers(dtype: np.dtype, name: str, what: str) -> None:
    if not jnp.issubdtype(dtype, np.floating):
        raise WeightsError(
            f"{what}: {name} is of type {dtype}, expected floating-point numbers. Take the "
            "model's original weights, not quantised."
        )


def _widened(array: np.ndarray) -> np.ndarray:
    """Of 8 bits as float32, since those are for storage and nothing computes in them."""
    return array.astype(np.float32) if array.itemsize == 1 else array


def _is_finite(array: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        # a finite sum has finite terms; one pass without a mask as large as the array
        total = array.sum(dtype=np.promote_types(array.dtype, np.float32))
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())


def to_source(params: Mapping[str, Any], names: Mapping[str, Target]) -> dict[str, np.ndarray]:
    """The inverse: source tensors from our tree. WeightsError for parameters without a name."""
    flat = flatten(params)
    paths = {one for path, _ in names.values() for one in expand(path)}
    if extra := ["/".join(path) for path in flat if path not in paths]:
        raise WeightsError(f"parameters without a name in this format: {_some(extra)}.")
    tensors = {}
    for name, (path, layout) in names.items():
        axes = _TO_SOURCE[layout]
        parts = [np.asarray(flat[one]) for one in expand(path)]
        parts = parts if axes is None else [part.transpose(axes) for part in parts]
        joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
        tensors[name] = np.asarray(joined, order="C")
    return tensors


def joint_shapes(model: Any) -> dict[str, Any]:
    """Parameters of a `Blip` or `Siglip` as shapes; nothing is computed."""
    size = model.config.vision.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    token_ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), images, token_ids)["params"]


def check_shapes(params: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raises WeightsError naming the parameters whose shape is not that of `expected`."""
    ours, theirs = flatten(params), flatten(expected)
    if wrong := [
        f"{'/'.join(path)} {np.shape(ours[path])}, expected {np.shape(theirs[path])}"
        for path in ours
        if path in theirs and np.shape(ours[path]) != np.shape(theirs[path])
    ]:
        raise WeightsError(f"{what}: wrong shapes: {_some(wrong)}.")
    if leftover := ["/".join(path) for path in set(ours) ^ set(theirs)]:
        raise WeightsError(f"{what}: parameters on one side only: {_some(sorted(leftover))}.")


SAME = 1e-2
"""Of the largest value of a tensor: files of one model differ by less, be they rounded to fp16."""


def check_same(
    params: Mapping[str, Any], expected: Mapping[str, Any], what: str, remedy: str
) -> None:
    """Raises WeightsError unless all of `params` are, but for rounding, in `expected`."""
    ours = flatten(expected)
    for path, tensor in flatten(params).items():
        here = np.asarray(ours[path], np.float32)
        if np.abs(tensor - here).max() > SAME * np.abs(here).max():
            raise WeightsError(f"{what}: {'/'.join(path)} is not that of the backbone. {remedy}")


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested dict -> {path: leaf}."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, (*prefix, key))
        else:
            flat[(*prefix, key)] = value
    return flat


def expand(path: Path) -> list[tuple[str, ...]]:
    """The paths of a fused tensor's parts, in their order; of any other tensor, its one path."""
    paths: list[tuple[str, ...]] = [()]
    for key in path:
        keys = key if isinstance(key, tuple) else (key,)
        paths = [(*one, each) for one in paths for each in keys]
    return paths


def _some(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit]) or "none"
    return shown + (f" ... and {len(names) - limit} more" if len(names) > limit else "")
