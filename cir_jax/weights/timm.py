"""timm's state dicts of the light encoders <-> our variables (params and batch_stats)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.input.images import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from cir_jax.models.light import PUBLISHED, LightEncoder
from cir_jax.weights import convert

IGNORE = (
    r".*\.num_batches_tracked",  # PyTorch's counter; only momentum=None uses it
    r"(classifier|head)\..*",  # ImageNet's classes
    r".*\.attention_bias_idxs",  # a constant that older files of EfficientViT store
)

TAGS = {
    "efficientnet_b0": "ra_in1k",
    "efficientnet_b2": "ra_in1k",
    "efficientvit_m2": "r224_in1k",
    "mobilenetv2_100": "ra_in1k",
    "mobilevitv2_100": "cvnets_in1k",
}
"""timm's default weights of ISA's query encoders."""

_IMAGE_SIZES = {"efficientnet_b1": 240, "efficientnet_b2": 256, "efficientnet_b3": 288}
_MODES = {"bicubic": 3, "bilinear": 2}

# leaf of our tree -> (timm's, layout)
_LEAVES = {
    "kernel": ("weight", "conv"),
    "scale": ("weight", "same"),
    "bias": ("bias", "same"),
    "mean": ("running_mean", "same"),
    "var": ("running_var", "same"),
    "attention_biases": ("attention_biases", "same"),
}


def hub_id(name: str) -> str:
    """Hub id of what timm calls `name`; any other name as it is.

    "mobilenetv2_100", "mobilenetv2_100.ra_in1k", "hf_hub:timm/mobilenetv2_100.ra_in1k".
    """
    name = name.removeprefix("hf_hub:").removeprefix("hf-hub:")
    base, _, tag = name.partition(".")
    if base not in PUBLISHED:
        return name
    if not tag and base not in TAGS:
        raise WeightsError(
            f"encoder {name!r}: say which of timm's weights, {name}.TAG "
            f"(https://huggingface.co/timm lists them), or give a directory or file."
        )
    return f"timm/{base}.{tag or TAGS[base]}"


def image_transform(name: str, config: Mapping[str, Any]) -> ImageTransform:
    """timm's evaluation transform, from the `pretrained_cfg` of a config.json.

    {} = the defaults of the published encoder `name`. Raises WeightsError for modes that are not
    implemented.
    """
    config = {field: value for field, value in config.items() if value is not None}
    mobilevit = name.startswith("mobilevit")
    mean, std = ((0.0,) * 3, (1.0,) * 3) if mobilevit else (IMAGENET_MEAN, IMAGENET_STD)
    usual = 256 if mobilevit else _IMAGE_SIZES.get(name, 224)
    channels, height, size = config.get("input_size", (3, usual, usual))
    mode, filter_name = config.get("crop_mode", "center"), config.get("interpolation", "bicubic")
    if mode not in ("center", "squash") or filter_name not in _MODES:
        raise WeightsError(
            f"{name}: pretrained_cfg says crop_mode {mode!r} and interpolation {filter_name!r}; "
            f"expected 'center' or 'squash', and one of {', '.join(_MODES)}."
        )
    if channels != 3 or height != size:
        raise WeightsError(
            f"{name}: pretrained_cfg says input_size {config['input_size']}, expected [3, n, n]."
        )
    return ImageTransform(
        resize=math.floor(size / (config.get("crop_pct") or (0.888 if mobilevit else 0.875))),
        crop=size,
        mean=tuple(config.get("mean", mean)),
        std=tuple(config.get("std", std)),
        squash=mode == "squash",
        resample=_MODES[filter_name],
        round_offset=True,
        alpha="drop",
    )


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
