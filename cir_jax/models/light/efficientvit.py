"""EfficientViT with cascaded group attention (Liu et al., arXiv 2305.07027), as timm's M0 ... M5.

Not MIT's network of the same name. The size of the attention windows follows the image size the
weights were made for, so that one is part of the config.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.models.light.blocks import ConvNorm, SqueezeExcite, make_divisible


@dataclasses.dataclass(frozen=True)
class EfficientVitConfig:
    """Field names are timm's; the defaults are M2."""

    image_size: int = 224
    embed_dim: tuple[int, ...] = (128, 192, 224)
    key_dim: tuple[int, ...] = (16, 16, 16)
    depth: tuple[int, ...] = (1, 2, 3)
    num_heads: tuple[int, ...] = (4, 3, 2)
    window_size: tuple[int, ...] = (7, 7, 7)
    kernels: tuple[int, ...] = (7, 5, 3, 3)

    @property
    def num_features(self) -> int:
        return self.embed_dim[-1]

    def windows(self) -> tuple[int, ...]:
        """Side of the attention window of each stage: never larger than the stage's map."""
        side, sides = self.image_size // 16, []
        for i, window in enumerate(self.window_size):
            side = side if i == 0 else (side - 1) // 2 + 1
            sides.append(min(window, side))
        return tuple(sides)


def bias_offsets(side: int) -> np.ndarray:
    """int[side^2, side^2]: which learned bias a (query, key) pair of a window has.

    Offsets (|dy|, |dx|) are numbered in order of their first appearance, row by row: |dy| * side +
    |dx|, because the first query, in the corner, meets all of them.
    """
    rows, columns = np.divmod(np.arange(side * side), side)
    rows, columns = (np.abs(x[:, None] - x[None]) for x in (rows, columns))
    return rows * side + columns


class GroupAttention(nn.Module):
    """Cascaded group attention over whole maps: a head also sees the output of the one before."""

    key_dim: int
    heads: int
    kernels: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float[batch, side, side, channels] -> the same shape."""
        batch, side, _, channels = x.shape
        value_dim = channels // self.heads
        biases = self.param(
            "attention_biases", nn.initializers.zeros, (self.heads, side * side)
        ).astype(self.dtype)
        offsets = bias_offsets(side)
        outputs: list[jax.Array] = []
        for i, feature in enumerate(jnp.split(x, self.heads, axis=-1)):
            if outputs:
                feature = feature + outputs[-1]
            width = 2 * self.key_dim + value_dim
            feature = ConvNorm(width, dtype=self.dtype, name=f"qkvs.{i}")(feature, train)
            query, key, value = jnp.split(feature, (self.key_dim, 2 * self.key_dim), axis=-1)
            query = ConvNorm(
                self.key_dim, self.kernels[i], depthwise=True, dtype=self.dtype, name=f"dws.{i}"
            )(query, train)
            query, key, value = (
                part.reshape(batch, side * side, part.shape[-1]) for part in (query, key, value)
            )
            logits = jnp.einsum("bqd,bkd->bqk", query * self.key_dim**-0.5, key)
            weights = jax.nn.softmax((logits + biases[i][offsets][None]).astype(jnp.float32))
            mixed = jnp.einsum("bqk,bkd->bqd", weights.astype(self.dtype), value)
            outputs.append(mixed.reshape(batch, side, side, value_dim))
        x = jax.nn.relu(jnp.concatenate(outputs, axis=-1))
        return ConvNorm(channels, dtype=self.dtype, name="proj.1")(x, train)


class WindowAttention(nn.Module):
    """Group attention in windows; the map is zero-padded at the bottom and right to whole ones."""

    key_dim: int
    heads: int
    kernels: tuple[int, ...]
    window: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        attend = GroupAttention(self.key_dim, self.heads, self.kernels, self.dtype, name="attn")
        batch, height, width, channels = x.shape
        side = self.window
        rows, columns = -(-height // side), -(-width // side)
        pads = (rows * side - height, columns * side - width)
        x = jnp.pad(x, ((0, 0), (0, pads[0]), (0, pads[1]), (0, 0)))
        # [batch, rows, side, columns, side, channels] -> [batch * rows * columns, side, side, ...]
        x = x.reshape(batch, rows, side, columns, side, channels).swapaxes(2, 3)
        x = attend(x.reshape(-1, side, side, channels), train)
        x = x.reshape(batch, rows, columns, side, side, channels).swapaxes(2, 3)
        return x.reshape(batch, rows * side, columns * side, channels)[:, :height, :width]


class Mlp(nn.Module):
    """Two 1x1 convolutions, twice as wide between them."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        hidden = jax.nn.relu(ConvNorm(2 * channels, dtype=self.dtype, name="pw1")(x, train))
        return ConvNorm(channels, dtype=self.dtype, name="pw2")(hidden, train)


class PatchMerging(nn.Module):
    """Halves the map: widen by four, depthwise stride 2, squeeze-excite, narrow."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        hidden = 4 * x.shape[-1]
        x = jax.nn.relu(ConvNorm(hidden, dtype=self.dtype, name="conv1")(x, train))
        halve = ConvNorm(hidden, 3, 2, depthwise=True, dtype=self.dtype, name="conv2")
        x = jax.nn.relu(halve(x, train))
        squeezed = make_divisible(hidden / 4, limit=0.0)
        x = SqueezeExcite(squeezed, jax.nn.relu, ("fc1", "fc2"), self.dtype, name="se")(x)
        return ConvNorm(self.features, dtype=self.dtype, name="conv3")(x, train)


class EfficientVit(nn.Module):
    """Normalised float[batch, h, w, 3] -> float[batch, h / 64, w / 64, num_features]."""

    config: EfficientVitConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        config, x = self.config, images

        def local(x: jax.Array, depthwise: str, mlp: str) -> jax.Array:
            convolve = ConvNorm(x.shape[-1], 3, depthwise=True, dtype=self.dtype, name=depthwise)
            x = x + convolve(x, train)
            return x + Mlp(self.dtype, name=mlp)(x, train)

        for i in range(4):
            width = config.embed_dim[0] // 2 ** (3 - i)
            x = ConvNorm(width, 3, 2, dtype=self.dtype, name=f"patch_embed.conv{i + 1}")(x, train)
            x = x if i == 3 else jax.nn.relu(x)
        for i, window in enumerate(config.windows()):
            if i > 0:
                down = f"stages.{i}.downsample"
                x = local(x, f"{down}.res1.0.m", f"{down}.res1.1.m")
                merge = PatchMerging(config.embed_dim[i], self.dtype, name=f"{down}.patchmerge")
                x = merge(x, train)
                x = local(x, f"{down}.res2.0.m", f"{down}.res2.1.m")
            for j in range(config.depth[i]):
                block = f"stages.{i}.blocks.{j}"
                x = local(x, f"{block}.dw0.m", f"{block}.ffn0.m")
                x = x + WindowAttention(
                    config.key_dim[i],
                    config.num_heads[i],
                    config.kernels,
                    window,
                    self.dtype,
                    name=f"{block}.mixer.m",
                )(x, train)
                x = local(x, f"{block}.dw1.m", f"{block}.ffn1.m")
        return x
