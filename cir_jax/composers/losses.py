"""Losses that several methods share."""

import jax
import jax.numpy as jnp
import optax


def info_nce(a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Symmetric InfoNCE of unit float32[batch, dim] rows, row i of `a` belonging to row i of `b`.

    CLIP (arXiv 2103.00020): mean of both directions' cross-entropies of scale * a bT.
    """
    logits = scale * a @ b.T
    labels = jnp.arange(len(a))
    forward = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    backward = optax.softmax_cross_entropy_with_integer_labels(logits.T, labels)
    return (forward.mean() + backward.mean()) / 2
