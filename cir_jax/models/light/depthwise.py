"""Depthwise convolution: on CPUs a sum of shifted maps, elsewhere the compiler's own.

XLA's convolution on a CPU computes the channels of a depthwise one apart from each other. The maps
shifted by each place of the kernel, weighted and added, are the same sum in another order:
EfficientNet-B2 of one image takes 32 ms with them and 173 with XLA's (benchmarks/query.py).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], ...]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_shifted, stride=stride, padding=padding),
        default=functools.partial(_general, stride=stride, padding=padding),
    )


def _general(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=DIMENSIONS,
        feature_group_count=x.shape[-1],
    )


def _shifted(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    # a map that is padded within the sum would be so at every place
    x_padded = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0))))
    total = sum(
        part.astype(jnp.float32) * kernel[i : i + 1, j : j + 1].astype(jnp.float32)
        for i, j, part in _parts(x_padded, kernel.shape, stride)
    )
    return total.astype(x.dtype)


def _parts(
    x_padded: jax.Array, kernel_shape: Sequence[int], stride: int
) -> Iterator[tuple[int, int, jax.Array]]:
    """Of each place in the kernel: what it meets, [batch, out_height, out_width, channels]."""
    last = [
        (size - side) // stride * stride
        for size, side in zip(x_padded.shape[1:3], kernel_shape, strict=False)
    ]
    for i in range(kernel_shape[0]):
        for j in range(kernel_shape[1]):
            yield i, j, x_padded[:, i : i + last[0] + 1 : stride, j : j + last[1] + 1 : stride]


def _forward(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> tuple[Any, Any]:
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _backward(stride: int, padding: Padding, kept: Any, gradient: jax.Array) -> Any:
    def general(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Any:
        return jax.vjp(lambda x, k: _general(x, k, stride, padding), x, kernel)[1](gradient)

    def shifted(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Any:
        return (
            _gradient_of_map(x.shape, kernel, gradient, stride, padding),
            _gradient_of_kernel(x, kernel, gradient, stride, padding),
        )

    return jax.lax.platform_dependent(*kept, gradient, cpu=shifted, default=general)


def _gradient_of_map(
    shape: Sequence[int], kernel: jax.Array, gradient: jax.Array, stride: int, padding: Padding
) -> jax.Array:
    """The flipped kernel over the gradient, whose places lie `stride` apart."""
    edges = [(0, 0, 0)]
    for size, side, (before, _), given in zip(
        shape[1:3], kernel.shape, padding, gradient.shape[1:3], strict=False
    ):
        low = side - 1 - before
        spread = (given - 1) * stride + 1
        edges.append((low, size + side - 1 - spread - low, stride - 1))
    spread_out = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), (*edges, (0, 0, 0)))
    return _shifted(spread_out, kernel[::-1, ::-1], 1, ((0, 0), (0, 0)))


def _gradient_of_kernel(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, stride: int, padding: Padding
) -> jax.Array:
    x_padded = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0))))
    gradient = gradient.astype(jnp.float32)
    # one after the other: as one loop over all places they would be slower
    sums = [
        jax.lax.optimization_barrier(jnp.sum(part * gradient, axis=(0, 1, 2)))
        for _, _, part in _parts(x_padded, kernel.shape, stride)
    ]
    return jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


_convolve.defvjp(_forward, _backward)


def convolution(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **_: Any
) -> jax.Array:
    """For `nn.Conv`: float[batch, height, width, channels] and float[side, side, 1, channels], of
    equal strides and without dilation -> float[batch, out_height, out_width, channels]."""
    assert strides[0] == strides[1] and kernel.shape[2] == 1, (strides, kernel.shape)
    return _convolve(x, kernel, strides[0], tuple(tuple(edge) for edge in padding))
