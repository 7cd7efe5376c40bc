"""LoRA (Hu et al., arXiv 2106.09685) for any Linen model, outside of the model.

The adapter is its own parameter tree: where the base tree has a chosen kernel, it has {"a", "b"}.

    adapter = lora.init(rng, params, r".*/attention/(query|value)/kernel", rank=16)
    merged = lora.merge(params, adapter, scale=alpha / rank)      # a plain tree of the base's shape
    features = model.apply({"params": merged}, images)

Merging is differentiable, so training may merge inside the loss; the gradient goes to the adapter
alone. Dropout on the adapter's input cannot be merged (it acts on activations); for that, or to
leave the base untouched, run the model unmerged:

    with lora.attached(adapter, scale, dropout=0.1, rng=rng):
        features = model.apply({"params": params}, images)

Export: save the merged tree as the base model's own weights, `save` / `load` the adapter, or write
and read it as PEFT does (`weights.save_adapter`, `weights.load_adapter`).
"""

import contextlib
import dataclasses
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cir_jax.errors import ConfigError, WeightsError
from cir_jax.models.chunks import whole
from cir_jax.models.layers import scanned


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels, and how; `pattern` matches whole paths from the root of the tree.

    The default is the usual choice: queries and values, of every tower.
    """

    pattern: str = r".*/attention/(query|value)/kernel"
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init(rng: jax.Array, params: Mapping[str, Any], pattern: str, rank: int) -> dict[str, Any]:
    """Adapter tree for the kernels of `params` whose path matches; float32, the product is zero.

    a: float[inputs, rank], uniform as in the reference; b: float[rank, outputs], zero. Of a
    convolution's kernel [h, w, in, out] the inputs are h * w * in. Works on shapes (eval_shape).
    Raises ConfigError when nothing matches, or what matches is no kernel.
    """
    if rank < 1:
        raise ConfigError(f"LoRA rank {rank}: give a positive number.")
    flat = flatten_dict(params, sep="/")
    chosen = [path for path in flat if re.fullmatch(pattern, path)]
    if not chosen:
        kernels = [path for path in flat if path.endswith("kernel")]
        raise ConfigError(
            f"LoRA pattern {pattern!r} matches no parameter. Paths look like: "
            f"{', '.join(kernels[:: max(1, len(kernels) // 6)][:6])}."
        )
    adapter = {}
    for path in chosen:
        shape = flat[path].shape
        if len(shape) < 2 or not path.endswith("kernel"):
            raise ConfigError(
                f"LoRA pattern {pattern!r} matches {path} of shape {tuple(shape)}; it can adapt "
                "kernels only. Narrow the pattern."
            )
        inputs = math.prod(shape[:-1])
        # by path: the values do not depend on what else is adapted
        a = jax.random.uniform(
            jax.random.fold_in(rng, zlib.crc32(path.encode())), (inputs, rank), minval=-1, maxval=1
        )
        adapter[f"{path}/a"] = a * inputs**-0.5
        adapter[f"{path}/b"] = jnp.zeros((rank, shape[-1]))
    return unflatten_dict(adapter, sep="/")


def merge(params: Mapping[str, Any], adapter: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The base's tree with kernel + scale * a @ b in the adapted places; the rest is not copied.

    Raises WeightsError when the adapter is for another model.
    """
    flat = flatten_dict(params, sep="/")
    for path, (a, b) in pairs(adapter).items():
        _check_fit(flat, path, a, b)
        kernel = flat[path]
        delta = (scale * jnp.matmul(a, b, precision="highest")).reshape(kernel.shape)
        flat[path] = (kernel + delta).astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")


@contextlib.contextmanager
def attached(
    adapter: Mapping[str, Any],
    scale: float,
    *,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> Iterator[None]:
    """Inside, every adapted `nn.Dense` adds scale * dropout(x) @ a @ b to its output.

    dropout: rate on the adapter's input; each layer, and each call of a layer, has its own mask.
    Only dense layers (convolutions: `merge`).

    A model of which the adapter has a kernel must have them all, and in these sizes; other models
    run as they are. Which parts of it run does not matter: with an adapter of both towers, texts
    alone may be encoded. Raises WeightsError for what does not fit, and on leaving when no model
    of the adapter was applied, or a module ran without its adapted kernel (one that computes with
    the kernel itself).
    """
    if dropout and rng is None:
        raise ValueError("LoRA dropout needs rng.")
    adapted, calls, ran = pairs(adapter), Counter(), set()
    found = False

    def add(next_call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal found
        if not context.module.path:
            flat = flatten_dict(context.module.variables.get("params", {}), sep="/")
            if not adapted.keys().isdisjoint(flat):
                found = True
                for path, (a, b) in adapted.items():
                    _check_fit(flat, path, a, b)
        elif context.method_name == "__call__":
            ran.add("/".join(context.module.path))
        y = next_call(*args, **kwargs)
        path = "/".join((*context.module.path, "kernel"))
        if context.method_name != "__call__" or path not in adapted:
            return y
        if not isinstance(context.module, nn.Dense):
            raise WeightsError(f"LoRA adapter: {path} is not of a dense layer; use lora.merge.")
        x = args[0]
        if dropout:
            key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
            keep = jax.random.bernoulli(jax.random.fold_in(key, calls[path]), 1 - dropout, x.shape)
            x = jnp.where(keep, x / (1 - dropout), 0)
        calls[path] += 1
        a, b = (part.astype(y.dtype) for part in adapted[path])
        return y + scale * ((x.astype(y.dtype) @ a) @ b)

    # a chunk of the batch would be a call with the masks of the others, and a loop's layers have no
    # paths of their own
    with nn.intercept_methods(add), whole(), scanned(False):
        yield
    if adapted and not found:
        raise WeightsError(
            f"LoRA adapter: no model was applied that has its kernels, as {min(adapted)}. Apply "
            "the model it was made for; a function compiled before does not see the adapter."
        )
    if unused := sorted(path for path in adapted.keys() - calls.keys() if _holder(path) in ran):
        raise WeightsError(
            f"LoRA adapter: {len(unused)} of its kernels were not used where their modules ran, "
            f"as {unused[0]}; use lora.merge."
        )


def _holder(kernel: str) -> str:
    """The module that has the dense layer: "text/layers_0/attention" of ".../query/kernel"."""
    return kernel.removesuffix("/kernel").rpartition("/")[0]


def _check_fit(flat: Mapping[str, Any], path: str, a: Any, b: Any) -> None:
    """Raises WeightsError unless the flat parameters have a kernel for the pair."""
    kernel = flat.get(path)
    if kernel is None or (math.prod(kernel.shape[:-1]), kernel.shape[-1]) != (
        a.shape[0],
        b.shape[-1],
    ):
        raise WeightsError(
            f"LoRA adapter: {path} ({a.shape[0]} -> {b.shape[-1]}) does not fit the model, "
            f"which has {'no such kernel' if kernel is None else kernel.shape}. Use the base "
            "weights it was trained on."
        )


def save(path: Path, adapter: Mapping[str, Any], config: LoraConfig) -> None:
    """Writes the adapter as safetensors: "<kernel's path>/a" and "/b", config in the metadata."""
    from safetensors.numpy import save_file

    flat = flatten_dict(jax.device_get(adapter), sep="/")
    metadata = {"lora": json.dumps(dataclasses.asdict(config))}
    scratch = Path(path).with_name(f".{Path(path).name}.part")
    save_file({name: np.ascontiguousarray(x) for name, x in flat.items()}, scratch, metadata)
    scratch.replace(path)


def load(path: Path) -> tuple[dict[str, Any], LoraConfig]:
    """The adapter and config that `save` wrote. Raises WeightsError naming the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            config = LoraConfig(**json.loads((file.metadata() or {})["lora"]))
            flat = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: no LoRA adapter of this project ({type(error).__name__}: {error}). "
            "Give a file that lora.save wrote."
        ) from error
    return unflatten_dict(flat, sep="/"), config


def pairs(adapter: Mapping[str, Any]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Path of the kernel -> (a, b)."""
    flat = flatten_dict(adapter, sep="/")
    paths = [path.removesuffix("/a") for path in flat if path.endswith("/a")]
    return {path: (flat[f"{path}/a"], flat[f"{path}/b"]) for path in paths}
