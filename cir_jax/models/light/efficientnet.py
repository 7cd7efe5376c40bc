"""EfficientNet (arXiv 1905.11946) and MobileNetV2 (arXiv 1801.04381): stacks of inverted residuals.

As timm's `efficientnet_*` and `mobilenetv2_*`, without the classifier. timm's `tf_efficientnet_*`
pad differently and have another epsilon: they are not these.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cir_jax.models.light.blocks import BatchNorm, SqueezeExcite, conv, make_divisible

ACTIVATIONS = {"silu": jax.nn.silu, "relu6": jax.nn.relu6}


@dataclasses.dataclass(frozen=True)
class Stage:
    """`repeats` blocks of one width; the first one has the stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


EFFICIENTNET = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
MOBILENETV2 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(3, 3, 2, 6, 32),
    Stage(4, 3, 2, 6, 64),
    Stage(3, 3, 1, 6, 96),
    Stage(3, 3, 2, 6, 160),
    Stage(1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
"""Channels before and after the stages, before scaling."""


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """What the scaled network is made of; `efficientnet` and `mobilenetv2` fill it in."""

    stages: tuple[Stage, ...]
    stem: int
    head: int
    activation: str
    squeeze_ratio: float

    @property
    def num_features(self) -> int:
        return self.head


def efficientnet(
    channel_multiplier: float = 1.0, depth_multiplier: float = 1.0
) -> EfficientNetConfig:
    """Every width is scaled and rounded to eights, every depth scaled and rounded up."""
    return EfficientNetConfig(
        stages=tuple(_scaled(s, channel_multiplier, depth_multiplier) for s in EFFICIENTNET),
        stem=make_divisible(STEM * channel_multiplier),
        head=make_divisible(HEAD * channel_multiplier),
        activation="silu",
        squeeze_ratio=0.25,
    )


def mobilenetv2(
    channel_multiplier: float = 1.0, depth_multiplier: float = 1.0, fix_stem_head: bool = False
) -> EfficientNetConfig:
    """The head is never narrower than 1280.

    fix_stem_head: stem, head, and the depth of the first and last stage stay unscaled (timm's
    `mobilenetv2_110d` and `_120d`).
    """
    last = len(MOBILENETV2) - 1
    return EfficientNetConfig(
        stages=tuple(
            _scaled(
                stage,
                channel_multiplier,
                1.0 if fix_stem_head and i in (0, last) else depth_multiplier,
            )
            for i, stage in enumerate(MOBILENETV2)
        ),
        stem=STEM if fix_stem_head else make_divisible(STEM * channel_multiplier),
        head=HEAD if fix_stem_head else max(HEAD, make_divisible(HEAD * channel_multiplier)),
        activation="relu6",
        squeeze_ratio=0.0,
    )


def _scaled(stage: Stage, channel_multiplier: float, depth_multiplier: float) -> Stage:
    return dataclasses.replace(
        stage,
        repeats=math.ceil(stage.repeats * depth_multiplier),
        channels=make_divisible(stage.channels * channel_multiplier),
    )


class InvertedResidual(nn.Module):
    """Widen (unless expansion is 1), depthwise convolution, squeeze-excite, narrow; linear output.

    The names of the parts depend on whether the block widens, as in timm.
    """

    stage: Stage
    stride: int
    activation: str
    squeeze_ratio: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        stage, shortcut = self.stage, x
        act = ACTIVATIONS[self.activation]
        channels = x.shape[-1]
        widens = stage.expansion > 1

        def norm(index: int, x: jax.Array) -> jax.Array:
            return BatchNorm(dtype=self.dtype, name=f"bn{index}")(x, train)

        if widens:
            hidden = make_divisible(channels * stage.expansion)
            x = act(norm(1, conv(hidden, dtype=self.dtype, name="conv_pw")(x)))
        hidden = x.shape[-1]
        depthwise = conv(
            hidden, stage.kernel, self.stride, depthwise=True, dtype=self.dtype, name="conv_dw"
        )
        x = act(norm(1 + widens, depthwise(x)))
        if self.squeeze_ratio:
            # a ratio of the block's input channels, not of the widened ones
            squeezed = round(hidden * self.squeeze_ratio / stage.expansion)
            names = ("conv_reduce", "conv_expand")
            x = SqueezeExcite(squeezed, act, names, self.dtype, name="se")(x)
        narrow = conv(stage.channels, dtype=self.dtype, name="conv_pwl" if widens else "conv_pw")
        x = norm(2 + widens, narrow(x))
        return x + shortcut if self.stride == 1 and channels == stage.channels else x


class EfficientNet(nn.Module):
    """Normalised float[batch, h, w, 3] -> float[batch, h / 32, w / 32, num_features]."""

    config: EfficientNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        act = ACTIVATIONS[config.activation]
        x = conv(config.stem, 3, 2, dtype=self.dtype, name="conv_stem")(images)
        x = act(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        for i, stage in enumerate(config.stages):
            for j in range(stage.repeats):
                x = InvertedResidual(
                    stage,
                    stage.stride if j == 0 else 1,
                    config.activation,
                    config.squeeze_ratio,
                    self.dtype,
                    name=f"blocks.{i}.{j}",
                )(x, train)
        x = conv(config.head, dtype=self.dtype, name="conv_head")(x)
        return act(BatchNorm(dtype=self.dtype, name="bn2")(x, train))
