"""CLIP's ModifiedResNet image tower (arXiv 2103.00020, section 2.4): RN50, RN50x4.

Unlike a plain ResNet: three convolutions in the stem, an average pool before every strided
convolution (so that no convolution has a stride but the first), attention in place of the final
average pool. Batch norms are frozen: their statistics are parameters that get no gradient.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cir_jax.sharding.constraints import split_rows

EXPANSION = 4  # output channels of a bottleneck / its inner channels
STRIDE = 32  # pixels per cell of the last map
STATISTICS = ("mean", "var")  # parameters of a frozen batch norm that no optimiser may touch


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """layers: bottlenecks of the four stages; width: channels of the stem."""

    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = 64
    num_attention_heads: int = 32
    image_size: int = 224

    @property
    def hidden_size(self) -> int:
        """Channels of the last map."""
        return self.width * 8 * EXPANSION


class FrozenBatchNorm(nn.Module):
    """Batch norm in inference mode."""

    features: int
    dtype: Any = jnp.float32
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, height, width, features] -> the same shape."""
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        shape = (self.features,)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        mean, var = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (mean, var))
        # folded to one multiplication and one addition per value
        factor = scale * jax.lax.rsqrt(var + self.eps)
        offset = bias - mean * factor
        factor, offset = (v.astype(self.dtype)[None, None, None] for v in (factor, offset))
        return x * factor + offset


def conv(
    features: int, size: int, stride: int = 1, *, dtype: Any, name: str | None = None
) -> nn.Conv:
    """Without bias, padded as PyTorch pads ("SAME" is another thing where the stride is 2)."""
    pad = (size - 1) // 2
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding=[(pad, pad), (pad, pad)],
        use_bias=False,
        dtype=dtype,
        name=name,
    )


def average(x: jax.Array, stride: int) -> jax.Array:
    return nn.avg_pool(x, (stride, stride), (stride, stride)) if stride > 1 else x


class Bottleneck(nn.Module):
    """1x1, 3x3, average pool by `stride`, 1x1; the shortcut is projected where shapes change."""

    features: int
    stride: int
    project: bool
    dtype: Any = jnp.float32

    def setup(self) -> None:
        features, out, dtype = self.features, self.features * EXPANSION, self.dtype
        self.conv1, self.norm1 = conv(features, 1, dtype=dtype), FrozenBatchNorm(features, dtype)
        self.conv2, self.norm2 = conv(features, 3, dtype=dtype), FrozenBatchNorm(features, dtype)
        self.conv3, self.norm3 = conv(out, 1, dtype=dtype), FrozenBatchNorm(out, dtype)
        if self.project:
            self.shortcut_conv = conv(out, 1, dtype=dtype)
            self.shortcut_norm = FrozenBatchNorm(out, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(self.norm1(self.conv1(x)))
        hidden = jax.nn.relu(self.norm2(self.conv2(hidden)))
        hidden = self.norm3(self.conv3(average(hidden, self.stride)))
        if self.project:
            x = self.shortcut_norm(self.shortcut_conv(average(x, self.stride)))
        return jax.nn.relu(hidden + x)


class AttentionPool(nn.Module):
    """One attention layer whose single query is the mean of all positions."""

    config: ResNetConfig
    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """float[batch, positions, hidden_size] -> float[batch, dim]."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        init = nn.initializers.normal(width**-0.5)
        cells = (self.config.image_size // STRIDE) ** 2
        position = self.param("position_embedding", init, (cells + 1, width))
        x = jnp.concatenate([tokens.mean(axis=1, keepdims=True), tokens], axis=1)
        x = x + position.astype(self.dtype)[None]

        def heads_of(name: str, x: jax.Array) -> jax.Array:
            x = nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)(x)
            return x.reshape(*x.shape[:-1], heads, width // heads)

        pooled = jax.nn.dot_product_attention(
            heads_of("query", x[:, :1]), heads_of("key", x), heads_of("value", x)
        )
        out = nn.Dense(self.dim, dtype=self.dtype, kernel_init=init, name="out")
        return out(pooled.reshape(-1, width))


class ResNetTower(nn.Module):
    """Same interface as clip.VisionTower, but `pool` ends in the joint dimension `dim`.

    remat: the backward pass computes each bottleneck again, see clip.blocks.
    """

    config: ResNetConfig
    dim: int
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        width, dtype = self.config.width, self.dtype
        self.conv1 = conv(width // 2, 3, 2, dtype=dtype)
        self.norm1 = FrozenBatchNorm(width // 2, dtype)
        self.conv2, self.norm2 = (
            conv(width // 2, 3, dtype=dtype),
            FrozenBatchNorm(width // 2, dtype),
        )
        self.conv3, self.norm3 = conv(width, 3, dtype=dtype), FrozenBatchNorm(width, dtype)
        bottleneck = nn.remat(Bottleneck) if self.remat else Bottleneck
        self.stages = [
            [
                bottleneck(width * 2**stage, 1 if i or not stage else 2, i == 0, dtype)
                for i in range(count)
            ]
            for stage, count in enumerate(self.config.layers)
        ]
        self.attention_pool = AttentionPool(self.config, self.dim, dtype)

    def stem(self, images: jax.Array) -> jax.Array:
        """Normalised float[batch, height, width, 3] -> float[batch, height / 4, width / 4, width].

        The last `width` is that of the config.
        """
        x = images.astype(self.dtype)
        for layer, norm in (
            (self.conv1, self.norm1),
            (self.conv2, self.norm2),
            (self.conv3, self.norm3),
        ):
            x = jax.nn.relu(norm(layer(x)))
        return average(x, 2)

    def feature_map(self, images: jax.Array) -> jax.Array:
        """-> float[batch, height / 32, width / 32, hidden_size]."""
        x = split_rows(self.stem(images))
        for stage in self.stages:
            for block in stage:
                x = split_rows(block(x))
        return x

    def __call__(self, images: jax.Array) -> jax.Array:
        """-> float[batch, tokens, hidden_size]: the cells of the last map, row by row."""
        x = self.feature_map(images)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def pool(self, tokens: jax.Array) -> jax.Array:
        """float[batch, tokens, hidden_size] -> float[batch, dim]."""
        return self.attention_pool(tokens)
