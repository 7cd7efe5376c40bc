"""Losses that several methods share."""

import jax
import jax.numpy as jnp
import optax

from cir_jax.composers.base import normalise


def info_nce(a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Symmetric InfoNCE of unit float32[batch, dim] rows, row i of `a` belonging to row i of `b`.

    CLIP (arXiv 2103.00020): mean of both directions' cross-entropies of scale * a bT.
    """
    logits = scale * a @ b.T
    return (pair_cross_entropy(logits) + pair_cross_entropy(logits.T)) / 2


def pair_cross_entropy(logits: jax.Array) -> jax.Array:
    """Mean cross-entropy of float32[batch, n], where row i belongs to column i."""
    labels = jnp.arange(len(logits))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def pair_recall(logits: jax.Array) -> jax.Array:
    """Share of the rows of float32[batch, n] whose own column is the largest."""
    return (jnp.argmax(logits, axis=-1) == jnp.arange(len(logits))).mean()


def nt_xent(
    a: jax.Array, b: jax.Array, temperature: float, groups: jax.Array | None = None
) -> jax.Array:
    """NT-Xent of float[batch, dim] rows, row i of `a` belonging to row i of `b`.

    Over the 2 x batch unit rows of both: each row's positive is its counterpart, its negatives are
    all the others, of its own kind too. As in the released code of SEARLE, PALAVRA and RTD, the
    mean is over 2 x batch rows (the papers print the sum of both directions over batch). Those
    compare the rows of one device; here they are the rows of the global batch.

    groups: int32[batch]; pairs of one group are not each other's negatives. None = all are.
    """
    rows = normalise(jnp.concatenate([a, b]).astype(jnp.float32))
    logits = rows @ rows.T / temperature
    labels = jnp.roll(jnp.arange(len(rows)), len(a))
    left_out = jnp.eye(len(rows), dtype=bool)
    if groups is not None:
        both = jnp.concatenate([groups, groups])
        positive = jnp.roll(left_out, len(a), axis=1)
        left_out = (both[:, None] == both[None]) & ~positive
    logits = jnp.where(left_out, -jnp.inf, logits)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def cosine_loss(a: jax.Array, b: jax.Array) -> jax.Array:
    """1 - cosine of float[..., dim] rows, in float32: `torch.nn.CosineEmbeddingLoss`, target 1."""
    a, b = normalise(a.astype(jnp.float32)), normalise(b.astype(jnp.float32))
    return 1 - jnp.sum(a * b, axis=-1)
