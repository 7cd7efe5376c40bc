"""Image-text matching as BLIP trains it (arXiv 2201.12086; salesforce/BLIP, blip_retrieval.py).

    L = H(p, y) over: each text with its own image, with a wrong image, each image with a wrong text

The wrong one is drawn among the others of the batch, the likelier the more it looks right: with the
probability that the contrastive scores give it, + 1e-4. BLIP draws among the rows of one device;
here among those of the global batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cir_jax.composers.base import Params, in_parts

FLOOR = 1e-4


def wrong_ones(scores: jax.Array, rng: jax.Array) -> jax.Array:
    """float32[batch, batch] logits, right ones on the diagonal -> int32[batch], a wrong column for
    each row, drawn."""
    shares = jax.nn.softmax(jax.lax.stop_gradient(scores)) + FLOOR
    right = jnp.eye(len(scores), dtype=bool)
    return jax.random.categorical(rng, jnp.where(right, -jnp.inf, jnp.log(shares)))


def matching_loss(
    match: Callable[[Params, Params], jax.Array],
    texts: Params,
    images: Params,
    scores: jax.Array,
    rng: jax.Array,
    parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """The loss, and the share of the pairs that are told right. Of at least two rows.

    match(texts, images) -> float32[rows, 2], logits of (no match, match). texts, images: trees of
    arrays [batch, ...], row i belonging to row i. scores: float32[batch, batch], logits of text i
    with image j. parts: as `in_parts`.
    """
    of_text, of_image = jax.random.split(rng)
    others = wrong_ones(scores, of_text), wrong_ones(scores.T, of_image)

    def taken(tree: Params, rows: jax.Array) -> Params:
        return jax.tree.map(lambda x: x[rows], tree)

    sides = [
        in_parts(match, pair, parts)
        for pair in (
            (texts, images),
            (texts, taken(images, others[0])),
            (taken(texts, others[1]), images),
        )
    ]
    logits = jnp.concatenate(sides)
    labels = (jnp.arange(len(logits)) < len(scores)).astype(jnp.int32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(axis=-1) == labels).mean()
