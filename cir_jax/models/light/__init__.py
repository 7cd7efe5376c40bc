"""Light image encoders for query images (ISA), with timm's names, sizes and weights.

    model = light.create("mobilenetv2_100")
    variables = model.init(rng, images)                      # params and batch_stats
    feature_map = model.apply(variables, images)             # float[batch, h, w, num_features]
    feature_map, changed = model.apply(variables, images, train=True, mutable=["batch_stats"])

`pool(feature_map)` is timm's pooled vector. Convolutions and statistics of one family share
`blocks.py`. `model.config.num_features` is the number of channels.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cir_jax.errors import ConfigError, unknown
from cir_jax.models.light.efficientnet import (
    EfficientNet,
    EfficientNetConfig,
    Stage,
    efficientnet,
    mobilenetv2,
)
from cir_jax.models.light.efficientvit import EfficientVit, EfficientVitConfig
from cir_jax.models.light.mobilevit import MobileVitV2, MobileVitV2Config

LightEncoder = EfficientNet | EfficientVit | MobileVitV2


def _vit(*columns: tuple[int, ...]) -> dict[str, Any]:
    return dict(zip(("embed_dim", "depth", "num_heads", "kernels"), columns, strict=True))


_SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2))

# timm's name -> {arch, and the fields of its config}
PUBLISHED: dict[str, dict[str, Any]] = {
    **{
        f"efficientnet_b{i}": {
            "arch": "efficientnet",
            "channel_multiplier": channels,
            "depth_multiplier": depth,
        }
        for i, (channels, depth) in enumerate(_SCALES)
    },
    **{
        f"mobilenetv2_{percent:03}": {
            "arch": "mobilenetv2",
            "channel_multiplier": percent / 100,
        }
        for percent in (35, 50, 75, 100, 140)
    },
    **{
        f"mobilenetv2_{name}": {
            "arch": "mobilenetv2",
            "channel_multiplier": channels,
            "depth_multiplier": depth,
            "fix_stem_head": True,
        }
        for name, channels, depth in (("110d", 1.1, 1.2), ("120d", 1.2, 1.4))
    },
    **{
        f"mobilevitv2_{percent:03}": {"arch": "mobilevitv2", "multiplier": percent / 100}
        for percent in (50, 75, 100, 125, 150, 175, 200)
    },
    **{
        f"efficientvit_m{i}": {"arch": "efficientvit_msra", **fields}
        for i, fields in enumerate(
            (
                _vit((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
                _vit((128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
                _vit((128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
                _vit((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
                _vit((128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
                _vit((192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
            )
        )
    },
}

OWN: dict[str, dict[str, Any]] = {
    "shapes": {
        "arch": "inverted_residuals",
        "stages": (Stage(1, 3, 2, 1, 24), Stage(2, 3, 2, 4, 64)),
        "stem": 16,
        "head": 128,
        "activation": "relu6",
        "squeeze_ratio": 0.0,
    }
}
"""Names that are not timm's: for the 32 x 32 pixels of the embedded world, a map of 4 x 4."""

_ARCHS = {
    "inverted_residuals": lambda fields: EfficientNet(EfficientNetConfig(**fields)),
    "efficientnet": lambda fields: EfficientNet(efficientnet(**fields)),
    "mobilenetv2": lambda fields: EfficientNet(mobilenetv2(**fields)),
    "mobilevitv2": lambda fields: MobileVitV2(MobileVitV2Config(**fields)),
    "efficientvit_msra": lambda fields: EfficientVit(EfficientVitConfig(**fields)),
}


def create(name: str, dtype: Any = jnp.float32, **fields: Any) -> LightEncoder:
    """The encoder timm calls `name`, or one of OWN; `fields` change its config (`image_size` for
    EfficientViT).

    Raises ConfigError for an unknown name, listing the known ones.
    """
    known = PUBLISHED | OWN
    if name not in known:
        raise ConfigError(unknown("light encoder", name, known))
    return from_dict({**known[name], **fields}, dtype)


def from_dict(config: Mapping[str, Any], dtype: Any = jnp.float32) -> LightEncoder:
    """The encoder of a dictionary {arch, fields of that architecture's config}."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    arch = fields.pop("arch", "")
    if arch not in _ARCHS:
        raise ConfigError(unknown("light architecture", arch, _ARCHS))
    if arch != "efficientvit_msra":
        fields.pop("image_size", None)  # the others take any size
    try:
        return _ARCHS[arch](fields).clone(dtype=dtype)
    except TypeError as error:
        raise ConfigError(f"light encoder {arch!r}: {error}.") from error


def pool(feature_map: jax.Array) -> jax.Array:
    """float[batch, h, w, channels] -> float[batch, channels], the mean over the map."""
    return jnp.mean(feature_map, axis=(1, 2))
