"""MobileViTv2 (Mehta and Rastegari, arXiv 2206.02680), as timm's `mobilevitv2_*`."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.models.light.blocks import EPSILON, ConvNorm, conv, make_divisible

WIDTHS = (64, 128, 256, 384, 512)
REPEATS = (1, 2, 1, 1, 1)
"""Inverted residuals of each stage."""

TRANSFORMERS = (0, 0, 2, 4, 3)
"""Transformer layers at the end of each stage."""

STEM, PATCH = 32, 2


@dataclasses.dataclass(frozen=True)
class MobileVitV2Config:
    """`multiplier` scales every width, rounded down; a stage's then to a multiple of eight."""

    multiplier: float = 1.0

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the stages. The stem's is not rounded a second time."""
        return tuple(make_divisible(int(width * self.multiplier)) for width in WIDTHS)

    @property
    def num_features(self) -> int:
        return self.widths[-1]


class InvertedResidual(nn.Module):
    """Widen by two, depthwise convolution, narrow; linear output."""

    features: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shortcut, hidden = x, make_divisible(2 * x.shape[-1])
        x = jax.nn.silu(ConvNorm(hidden, dtype=self.dtype, name="conv1_1x1")(x, train))
        depthwise = ConvNorm(
            hidden, 3, self.stride, depthwise=True, dtype=self.dtype, name="conv2_kxk"
        )
        x = jax.nn.silu(depthwise(x, train))
        x = ConvNorm(self.features, dtype=self.dtype, name="conv3_1x1")(x, train)
        same = self.stride == 1 and shortcut.shape[-1] == self.features
        return x + shortcut if same else x


class TransformerBlock(nn.Module):
    """Linear self-attention and MLP over float[batch, patch pixels, patches, channels].

    Pixels at the same place of different patches attend to each other through one context vector:
    the mean of the keys under a softmax over patches.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]

        def project(features: int, name: str, x: jax.Array) -> jax.Array:
            return conv(features, bias=True, dtype=self.dtype, name=name)(x)

        queries_keys_values = project(1 + 2 * channels, "attn.qkv_proj", norm("norm1")(x))
        query, key, value = jnp.split(queries_keys_values, (1, 1 + channels), axis=-1)
        weights = jax.nn.softmax(query.astype(jnp.float32), axis=2).astype(self.dtype)
        context = jnp.sum(key * weights, axis=2, keepdims=True)
        x = x + project(channels, "attn.out_proj", jax.nn.relu(value) * context)
        hidden = jax.nn.silu(project(2 * channels, "mlp.fc1", norm("norm2")(x)))
        return x + project(channels, "mlp.fc2", hidden)


class MobileVitBlock(nn.Module):
    """Depthwise convolution, then transformer blocks over 2 x 2 patches at half the width."""

    layers: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        batch, height, width, channels = x.shape
        rows, columns = -(-height // PATCH), -(-width // PATCH)
        # a map of odd size grows, and stays grown
        x = resize(x, rows * PATCH, columns * PATCH)
        local = ConvNorm(channels, 3, depthwise=True, dtype=self.dtype, name="conv_kxk")
        x = jax.nn.silu(local(x, train))
        hidden = make_divisible(channels / 2)
        x = conv(hidden, dtype=self.dtype, name="conv_1x1")(x)
        # [batch, rows, 2, columns, 2, hidden] -> [batch, 2 * 2, rows * columns, hidden]
        x = x.reshape(batch, rows, PATCH, columns, PATCH, hidden).transpose(0, 2, 4, 1, 3, 5)
        x = x.reshape(batch, PATCH * PATCH, rows * columns, hidden)
        for i in range(self.layers):
            x = TransformerBlock(self.dtype, name=f"transformer.{i}")(x)
        x = norm("norm")(x)
        x = x.reshape(batch, PATCH, PATCH, rows, columns, hidden).transpose(0, 3, 1, 4, 2, 5)
        x = x.reshape(batch, rows * PATCH, columns * PATCH, hidden)
        return ConvNorm(channels, dtype=self.dtype, name="conv_proj")(x, train)


def norm(name: str) -> nn.GroupNorm:
    """One group: statistics over all positions and channels of an image."""
    return nn.GroupNorm(num_groups=1, epsilon=EPSILON, use_fast_variance=False, name=name)


def resize(x: jax.Array, height: int, width: int) -> jax.Array:
    """Bilinear, corners on corners (which `jax.image.resize` cannot do)."""
    if x.shape[1:3] == (height, width):
        return x
    rows, columns = (
        _linear(old, new) for old, new in zip(x.shape[1:3], (height, width), strict=True)
    )
    return jnp.einsum("rh,cw,bhwd->brcd", rows, columns, x, precision="highest").astype(x.dtype)


def _linear(old: int, new: int) -> np.ndarray:
    place = np.arange(new) * ((old - 1) / max(new - 1, 1))
    distance = np.abs(place[:, None] - np.arange(old)[None])
    return np.maximum(1 - distance, 0).astype(np.float32)


class MobileVitV2(nn.Module):
    """float[batch, h, w, 3] in [0, 1] -> float[batch, h / 32, w / 32, num_features]."""

    config: MobileVitV2Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        stem = ConvNorm(int(STEM * config.multiplier), 3, 2, dtype=self.dtype, name="stem")
        x = jax.nn.silu(stem(images, train))
        for i, width in enumerate(config.widths):
            for j in range(REPEATS[i]):
                stride = 2 if i > 0 and j == 0 else 1
                block = InvertedResidual(width, stride, self.dtype, name=f"stages.{i}.{j}")
                x = block(x, train)
            if TRANSFORMERS[i]:
                name = f"stages.{i}.{REPEATS[i]}"
                x = MobileVitBlock(TRANSFORMERS[i], self.dtype, name=name)(x, train)
        return x
