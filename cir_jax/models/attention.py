"""The attention of the CLIP towers: cuDNN's fused kernel where there is one, XLA's elsewhere.

On CPU heads go before positions, which takes half of the time of jax.nn.dot_product_attention:
that one turns the whole matrix of scores over, and divides each of them by their sum.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from cir_jax.sharding.constraints import target

FUSED_DTYPES = (jnp.bfloat16, jnp.float16)

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a key that may not be attended to; finite, so that a row of them has a softmax."""


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
) -> jax.Array:
    """float[batch, length, heads, head_dim], keys and values with their own length -> as the query.

    mask: bool, broadcast to [batch, heads, length, keys], True where a key may be attended to.
    causal: no position attends to a later one. The softmax is in float32.
    """
    if _on_cpu():
        return _heads_first(query, key, value, mask, causal)
    # the kernel was asked about self-attention, here; what is traced for TPUs may be so on any host
    plain = mask is None and query.shape == key.shape and target()[0] != "tpu"
    fused = plain and fused_kernel(query.shape[1:], jnp.dtype(query.dtype), causal)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=causal,
        implementation="cudnn" if fused else "xla",
    )


def _heads_first(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, causal: bool
) -> jax.Array:
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32) * (
        query.shape[-1] ** -0.5
    )
    if causal:
        triangle = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
        mask = triangle if mask is None else mask & triangle
    if mask is not None:
        scores = jnp.where(mask, scores, HIDDEN)
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value)
    return (mixed / weights.sum(-1, keepdims=True)).astype(value.dtype).swapaxes(1, 2)


@functools.cache
def fused_kernel(shape: tuple[int, int, int], dtype: Any, causal: bool) -> bool:
    """Whether cuDNN's kernel, which never writes the scores to memory, is to be used.

    shape: (length, heads, head_dim). Which shapes and cards it takes changes with its version, so
    it is asked: by compiling it once, forward and backward. A refusal is logged.
    """
    if dtype not in FUSED_DTYPES or not _on_cuda():
        return False

    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        mixed = jax.nn.dot_product_attention(
            query, key, value, is_causal=causal, implementation="cudnn"
        )
        return mixed.astype(jnp.float32).sum()

    example = jax.ShapeDtypeStruct((1, *shape), dtype)
    try:
        jax.jit(jax.value_and_grad(total, (0, 1, 2))).lower(example, example, example).compile()
    except Exception as error:  # each layer of the stack below raises its own
        logging.warning(
            "cuDNN's fused attention does not take (length, heads, head_dim) %s in %s; XLA's is "
            "used, slower and with more memory: %s",
            shape,
            dtype,
            error,
        )
        return False
    return True


def _on_cpu() -> bool:
    return target()[0] == "cpu"


def _on_cuda() -> bool:
    return "cuda" in jax.local_devices()[0].client.platform_version
