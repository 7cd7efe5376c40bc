"""The attention of the CLIP towers: cuDNN's fused kernel where there is one, XLA's elsewhere."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

FUSED_DTYPES = (jnp.bfloat16, jnp.float16)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
) -> jax.Array:
    """float[batch, length, heads, head_dim] each -> the query's shape; softmax in float32.

    Keys and values may be of another length than the query.

    mask: bool, broadcast to [batch, heads, length, keys], True where a key may be attended to.
    causal: no position attends to a later one.
    """
    alike = mask is None and query.shape == key.shape
    fused = alike and fused_kernel(query.shape[1:], jnp.dtype(query.dtype), causal)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=causal,
        implementation="cudnn" if fused else "xla",
    )


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


def _on_cuda() -> bool:
    return "cuda" in jax.local_devices()[0].client.platform_version
