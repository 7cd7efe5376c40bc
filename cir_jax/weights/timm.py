"""timm's state dicts of the light encoders <-> our variables (params and batch_stats)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.models.light import LightEncoder
from cir_jax.weights import convert

IGNORE = (
    r".*\.num_batches_tracked",  # PyTorch's counter; only momentum=None uses it
    r"(classifier|head)\..*",  # ImageNet's classes
    r".*\.attention_bias_idxs",  # a constant that older files of EfficientViT store
)

# leaf of our tree -> (timm's, layout)
_LEAVES = {
    "kernel": ("weight", "conv"),
    "scale": ("weight", "same"),
    "bias": ("bias", "same"),
    "mean": ("running_mean", "same"),
    "var": ("running_var", "same"),
    "attention_biases": ("attention_biases", "same"),
}


def shapes(model: LightEncoder) -> dict[str, Any]:
    """The model's variables {params, batch_stats} as shapes; nothing is computed."""
    # the parameters do not depend on it, and the smaller the map the faster it is traced
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def names(model: LightEncoder) -> dict[str, convert.Target]:
    """Name table: modules are named as in timm, so it is read off the model's own tree."""
    table = {}
    for path in convert.flatten(shapes(model)):
        leaf, layout = _LEAVES[path[-1]]
        table[".".join((*path[1:-1], leaf))] = (path, layout)
    return table


def to_variables(
    tensors: Mapping[str, np.ndarray],
    model: LightEncoder,
    what: str = "timm weights",
    dtype: Any = None,
) -> dict[str, Any]:
    """{params, batch_stats} for `model.apply`. Raises WeightsError for what does not fit.

    dtype: of the variables; None = as they are stored.
    """
    variables = convert.to_ours(tensors, names(model), ignore=IGNORE, what=what, dtype=dtype)
    convert.check_shapes(variables, shapes(model), what)
    return variables


def to_tensors(variables: Mapping[str, Any], model: LightEncoder) -> dict[str, np.ndarray]:
    """A state dict for timm's model with `num_classes=0`, loadable with `strict=True`."""
    tensors = convert.to_source(jax.device_get(variables), names(model))
    counters = [name for name in tensors if name.endswith(".running_mean")]
    for name in counters:
        tensors[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    return tensors
