"""Convolution blocks that the light encoders share. Feature maps are float[batch, h, w, channels].

Submodules carry timm's names, dots included (`blocks.0.1`), so that the weights' name table follows
from the tree (`cir_jax.weights.timm`).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cir_jax.models.light.depthwise import convolution as depthwise_convolution
from cir_jax.sharding.constraints import split_rows

Activation = Callable[[jax.Array], jax.Array]

EPSILON = 1e-5
"""Of all norms; timm's `tf_*` models have another one and are not these."""


class BatchNorm(nn.Module):
    """PyTorch's BatchNorm2d; running statistics are in the `batch_stats` collection.

    Flax's own stores the biased variance of a batch, PyTorch's the unbiased one. In a jitted step
    over a mesh the statistics are those of the global batch (PyTorch's SyncBatchNorm).
    """

    momentum: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        x = split_rows(x.astype(jnp.float32))  # behind every convolution
        used_mean, used_var = mean.value, var.value
        if train:
            axes = tuple(range(x.ndim - 1))
            used_mean, used_var = jnp.mean(x, axes), jnp.var(x, axes)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = used_var * (count / max(count - 1, 1))
                keep = 1 - self.momentum
                mean.value = keep * mean.value + self.momentum * used_mean
                var.value = keep * var.value + self.momentum * unbiased
        row = (1,) * (x.ndim - 1) + shape
        gain = (scale * jax.lax.rsqrt(used_var + EPSILON)).reshape(row)
        return ((x - used_mean.reshape(row)) * gain + bias.reshape(row)).astype(self.dtype)


def conv(
    features: int,
    size: int = 1,
    stride: int = 1,
    *,
    depthwise: bool = False,
    bias: bool = False,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """Convolution padded by (size - 1) // 2 on every side, also at stride 2."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=(size - 1) // 2,
        feature_group_count=features if depthwise else 1,
        conv_general_dilated=depthwise_convolution if depthwise else None,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )


class ConvNorm(nn.Module):
    """Convolution (`conv`) and BatchNorm (`bn`)."""

    features: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = conv(
            self.features,
            self.size,
            self.stride,
            depthwise=self.depthwise,
            dtype=self.dtype,
            name="conv",
        )(x)
        return BatchNorm(dtype=self.dtype, name="bn")(x, train)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from its mean over the map.

    names: of the two convolutions; timm has two classes of this that differ in them.
    """

    hidden: int
    activation: Activation
    names: tuple[str, str]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        reduce, expand = self.names
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = self.activation(conv(self.hidden, bias=True, dtype=self.dtype, name=reduce)(gate))
        gate = conv(x.shape[-1], bias=True, dtype=self.dtype, name=expand)(gate)
        return x * jax.nn.sigmoid(gate)


def make_divisible(value: float, divisor: int = 8, limit: float = 0.9) -> int:
    """The nearest multiple of `divisor`, but not below `limit` of the value."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < limit * value else rounded
