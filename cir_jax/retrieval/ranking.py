"""Ranks by blocks: matrix product and top-k, never a full sort of the gallery.

Order everywhere: score descending, equal scores by gallery position, lowest first.
The gallery passes once per block of queries, block by block. What a target's rank needs, its score,
is computed first, in the same program; where the gallery gives another last bit for it, the block
of queries is counted again with that score. So ranks are exact, and no row of scores is kept.
Memory beside the features: two blocks of the gallery and their scores, at most SCORE_BYTES each; on
accelerators the gallery, up to RESIDENT_BYTES. benchmarks/ranking.json has figures.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.composers.base import Composer
from cir_jax.errors import CirError
from cir_jax.sharding.placement import to_host

SCORE_BYTES = 16 << 20
GALLERY_BLOCK = 2048
QUERY_BLOCK = 1024
HELD_BLOCK = 8192
RESIDENT_BYTES = 2 << 30
"""A gallery up to this size stays on an accelerator; a larger one is sent again per query block. On
a CPU it is never copied as a whole."""

Score = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""(params, float32[batch, dim], float32[n, dim]) -> float32[batch, n]: a composer's `score`."""


def dot_product(params: Any, queries: jax.Array, gallery: jax.Array) -> jax.Array:
    """Cosine similarity of unit features: the default score."""
    del params
    return queries @ gallery.T


def scoring(composer: Composer, params: Any) -> dict[str, Any]:
    """The arguments `score` and `params` of `rank` for a composer."""
    if type(composer).score is Composer.score:
        return {"score": dot_product, "params": None}  # one program for all such methods
    # every process ranks all queries by itself, on its own device
    return {"score": composer.score, "params": jax.tree.map(to_host, params)}


class Held:
    """A gallery of which many queries are asked one after the other: checked and brought to the
    device once, in blocks, in the type that it comes in. float16 is half the memory, and widened to
    float32 as it is multiplied.
    """

    def __init__(self, pieces: Iterable[np.ndarray], at_most: int):
        """pieces: float16 or float32 [some, dim], of which few are held at once. at_most: rows in
        all, as far as is known: small galleries come in one small block.

        Raises CirError for rows that are not finite.
        """
        self.width = min(HELD_BLOCK, 1 << max(6, (at_most - 1).bit_length()))
        self.blocks: list[jax.Array] = []
        self.rows = 0
        self.extend(pieces)

    def extend(self, pieces: Iterable[np.ndarray]) -> None:
        """More rows, after those that are there."""
        block = np.array(self.blocks.pop()) if self.rows % self.width else None
        try:
            for piece in pieces:
                check_finite("gallery", piece, self.rows)
                while len(piece):
                    filled = self.rows % self.width
                    if block is None:
                        block = np.zeros((self.width, piece.shape[1]), piece.dtype)
                    part, piece = np.split(piece, [self.width - filled])
                    block[filled : filled + len(part)] = part
                    self.rows += len(part)
                    if not self.rows % self.width:
                        self.blocks.append(jax.device_put(block))
                        block = None
        finally:
            if block is not None:
                self.blocks.append(jax.device_put(block))

    def put(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """[some, dim] in the place of these rows."""
        check_finite("gallery", vectors)
        for i in np.unique(rows // self.width):
            block, here = np.array(self.blocks[i]), rows // self.width == i
            block[rows[here] % self.width] = vectors[here]
            self.blocks[i] = jax.device_put(block)

    def __len__(self) -> int:
        return self.rows


class Ranking(NamedTuple):
    """top: int32[queries, k] gallery positions, -1 where fewer than k images are ranked.
    scores: float32[queries, k], -inf there. target_ranks: int32[queries, targets], 0-based, -1 pad.
    """

    top: np.ndarray
    scores: np.ndarray
    target_ranks: np.ndarray


def rank(
    queries: np.ndarray,
    gallery: np.ndarray | Held,
    *,
    k: int,
    targets: np.ndarray | None = None,
    exclude: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    members: np.ndarray | None = None,
    score: Score = dot_product,
    params: Any = None,
    gallery_block: int = GALLERY_BLOCK,
    query_block: int = QUERY_BLOCK,
) -> Ranking:
    """The k best images, and the exact ranks of given targets.

    queries float32[batch, dim], gallery float32[n, dim], or one that is held: without targets
    targets: int32[batch, targets], -1 = none.
    exclude: int32[batch], an image that is not ranked for the query (its reference), -1 = none.
    groups, members: int32[batch] and bool[groups, n]: query i is ranked among members[groups[i]].
    Raises CirError for features or scores that are not finite, ValueError for targets not ranked.
    """
    batch, n = len(queries), len(gallery)
    check_finite("query", queries)
    holds = isinstance(gallery, Held)
    if not holds:
        check_finite("gallery", gallery)
    elif targets is not None:
        raise ValueError("targets are not looked for in a gallery that is held")
    k = min(k, n)
    targets = np.full((batch, 1), -1, np.int32) if targets is None else np.asarray(targets)
    exclude = np.full(batch, -1, np.int32) if exclude is None else np.asarray(exclude)
    groups = np.zeros(batch, np.int32) if groups is None else np.asarray(groups)
    step = min(batch, query_block)
    width = gallery.width if holds else max(1, min(gallery_block, n, SCORE_BYTES // (4 * step)))
    starts = range(0, n, width)
    allowed = np.zeros((1 if members is None else len(members), len(starts) * width), bool)
    allowed[:, :n] = True if members is None else members  # the padding of the last block: never

    def block(start: int) -> tuple[Any, Any]:
        if holds:
            rows = gallery.blocks[start // width]
        else:
            rows = _pad(gallery[start : start + width], width)
        return rows, allowed[:, start : start + width]

    accelerated = jax.default_backend() != "cpu"
    keep = not holds and gallery.nbytes <= RESIDENT_BYTES and accelerated
    kept = [jax.device_put(block(start)) for start in starts] if keep else None
    parts = []
    # TPUs and GPUs would round to bfloat16 or TF32, and so change ranks
    with jax.default_matmul_precision("highest"):
        for first in range(0, batch, step):
            rows = slice(first, first + step)
            query, group = _pad(queries[rows], step), _pad(groups[rows], step)
            wanted, excluded = _pad(targets[rows], step, -1), _pad(exclude[rows], step, -1)
            query, group, excluded = jax.device_put((query, group, excluded))

            def scores(i: int, query=query, group=group, excluded=excluded) -> jax.Array:
                images, ranked = block(starts[i]) if kept is None else kept[i]
                start = np.int32(starts[i])
                return _scores(score, params, query, images, ranked, group, excluded, start)

            expected = _target_scores(score, params, query, gallery, wanted, width)
            part = _pass(scores, expected, wanted, k, starts)
            if (part[3] != expected)[(wanted >= 0) & np.isfinite(part[3])].any():
                part = _pass(scores, part[3], wanted, k, starts)
            parts.append([np.asarray(x)[: batch - first] for x in part])
    top, best, ranks, found, broken = (np.concatenate(part) for part in zip(*parts, strict=True))
    if broken.any():
        raise CirError(f"query {int(np.argmax(broken))}: its scores are NaN.")
    lost = (targets >= 0) & ~np.isfinite(found)
    if lost.any():
        raise ValueError(f"query {int(np.argmax(lost.any(axis=1)))}: its target is not ranked")
    return Ranking(
        np.where(np.isfinite(best), top, -1).astype(np.int32),
        best,
        np.where(targets >= 0, ranks, -1).astype(np.int32),
    )


def scores(
    query: np.ndarray,
    gallery: Held,
    members: np.ndarray,
    *,
    score: Score = dot_product,
    params: Any = None,
) -> np.ndarray:
    """float32[n] of one query, float32[1, dim], with all images; -inf where not bool[n] `members`.

    As `rank` computes them. Raises CirError for those that are not finite.
    """
    check_finite("query", query)
    width = gallery.width
    allowed = np.zeros((1, len(gallery.blocks) * width), bool)
    allowed[0, : len(gallery)] = members
    group, nobody = np.zeros(1, np.int32), np.full(1, -1, np.int32)
    parts = [np.zeros(0, np.float32)]
    with jax.default_matmul_precision("highest"):
        for i, rows in enumerate(gallery.blocks):
            ranked, start = allowed[:, i * width : (i + 1) * width], np.int32(i * width)
            found = _scores(score, params, query, rows, ranked, group, nobody, start)
            parts.append(np.asarray(found)[0])
    every = np.concatenate(parts)[: len(gallery)]
    if np.isnan(every).any():
        raise CirError("query 0: its scores are NaN.")
    return every


def check_finite(what: str, x: np.ndarray, first: int = 0) -> None:
    for start in range(0, len(x), GALLERY_BLOCK):  # a mask of all would be a quarter of it
        bad = ~np.isfinite(x[start : start + GALLERY_BLOCK]).all(axis=1)
        if bad.any():
            raise CirError(
                f"{what} features: row {first + start + int(np.argmax(bad))} is not finite. "
                "What it was computed with is damaged, or numbers overflow."
            )


def rank_candidates(
    queries: np.ndarray,
    gallery: np.ndarray,
    candidates: np.ndarray,
    targets: np.ndarray | None = None,
    *,
    score: Score = dot_product,
    params: Any = None,
    query_block: int = QUERY_BLOCK,
) -> Ranking:
    """Each query's own short list, ranked in full; `top` has the width of `candidates`.

    candidates: int32[batch, candidates] gallery positions, -1 pads. targets: as in `rank`.
    Raises ValueError for a target that is not a candidate.
    """
    batch = len(queries)
    targets = np.full((batch, 1), -1, np.int32) if targets is None else np.asarray(targets)
    step = min(batch, query_block)
    parts = []
    with jax.default_matmul_precision("highest"):
        for first in range(0, batch, step):
            rows = slice(first, first + step)
            chosen = gallery[np.maximum(_pad(candidates[rows], step), 0)]
            part = _candidate_scores(score, params, _pad(queries[rows], step), chosen)
            parts.append(np.asarray(part)[: batch - first])
    scores = np.where(candidates >= 0, np.concatenate(parts), -np.inf)
    if np.isnan(scores).any():
        raise CirError(f"query {int(np.argmax(np.isnan(scores).any(axis=1)))}: its scores are NaN.")
    order = np.lexsort((candidates, -scores), axis=1)  # the last key is the first criterion
    top = np.take_along_axis(candidates, order, axis=1)
    # [batch, targets, candidates]
    hits = (top[:, None, :] == targets[:, :, None]) & (targets >= 0)[:, :, None]
    lost = (targets >= 0) & ~hits.any(axis=2)
    if lost.any():
        raise ValueError(f"query {int(np.argmax(lost.any(axis=1)))}: its target is no candidate")
    return Ranking(
        top.astype(np.int32),
        np.take_along_axis(scores, order, axis=1).astype(np.float32),
        np.where(targets >= 0, hits.argmax(axis=2), -1).astype(np.int32),
    )


def _pad(x: np.ndarray, rows: int, value: int = 0) -> np.ndarray:
    """Blocks of one shape: one program for all of them."""
    missing = rows - len(x)
    if not missing:
        return x
    return np.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), constant_values=value)


@functools.partial(jax.jit, static_argnames="score")
def _scores(
    score: Score,
    params: Any,
    queries: jax.Array,
    gallery: jax.Array,
    members: jax.Array,
    group: jax.Array,
    excluded: jax.Array,
    start: jax.Array,
) -> jax.Array:
    """float32[batch, block]; -inf for images that are not ranked."""
    gallery = gallery.astype(jnp.float32)
    position = start + jnp.arange(len(gallery))
    ranked = members[group] & (position[None, :] != excluded[:, None])
    return jnp.where(ranked, score(params, queries, gallery).astype(jnp.float32), -jnp.inf)


@functools.partial(jax.jit, static_argnames="score")
def _candidate_scores(
    score: Score, params: Any, queries: jax.Array, chosen: jax.Array
) -> jax.Array:
    """[batch, dim], [batch, candidates, dim] -> [batch, candidates]."""
    return jax.vmap(lambda query, images: score(params, query[None], images)[0])(queries, chosen)


def _target_scores(
    score: Score,
    params: Any,
    queries: jax.Array,
    gallery: np.ndarray,
    targets: np.ndarray,
    width: int,
) -> np.ndarray:
    """float32[batch, targets]: the score of each query with each of its targets, -inf without.

    As blocks of the gallery are scored: all these targets with all queries, in the same program.
    """
    out = np.full(targets.shape, -np.inf, np.float32)
    used, place = np.unique(targets, return_inverse=True)
    place = place.reshape(targets.shape)
    nobody = np.full(len(targets), -1, np.int32)
    for start in range(int(used[0] < 0), len(used), width):
        rows = used[start : start + width]
        images = _pad(gallery[rows], width)
        everyone, group = np.ones((1, width), bool), np.zeros(len(targets), np.int32)
        found = np.asarray(
            _scores(score, params, queries, images, everyone, group, nobody, np.int32(0))
        )
        local = place - start
        here = (local >= 0) & (local < len(rows))
        mine = np.take_along_axis(found, np.clip(local, 0, width - 1), axis=1)
        out = np.where(here, mine, out)
    return out


def _pass(
    scores: Callable[[int], jax.Array],
    expected: np.ndarray,
    targets: np.ndarray,
    k: int,
    starts: range,
) -> tuple[np.ndarray, ...]:
    """All blocks once: top, their scores, target ranks, target scores, whether any score is NaN.

    The ranks are right where the target scores are `expected`.
    """
    batch = len(targets)
    carry = (
        jnp.full((batch, k), -1, jnp.int32),
        jnp.full((batch, k), -jnp.inf),
        jnp.zeros(targets.shape, jnp.int32),
        jnp.full(targets.shape, -jnp.inf),
        jnp.zeros(batch, bool),
    )
    wanted, level = jax.device_put((targets, expected))
    for i, start in enumerate(starts):
        # the next block is not made before the last one is done with: two are held at most
        carry = jax.block_until_ready(_merge(carry, scores(i), wanted, level, np.int32(start)))
    return tuple(np.asarray(x) for x in carry)


@jax.jit
def _merge(
    carry: Any, scores: jax.Array, targets: jax.Array, expected: jax.Array, start: jax.Array
) -> Any:
    top, best, ranks, found, broken = carry
    k, width = best.shape[1], scores.shape[1]
    # earlier blocks first: top_k keeps the order of equal scores, so the lowest position wins; and
    # with the best so far before it, it changes its mind rarely, which is half of the time on a CPU
    best, order = jax.lax.top_k(jnp.concatenate([best, scores], axis=1), k)
    known = jnp.take_along_axis(top, jnp.minimum(order, k - 1), axis=1)
    top = jnp.where(order < k, known, order.astype(jnp.int32) - k + start)
    local = targets - start
    here = (local >= 0) & (local < width)
    mine = jnp.take_along_axis(scores, jnp.clip(local, 0, width - 1), axis=1)
    position = start + jnp.arange(width, dtype=jnp.int32)

    def before(column: tuple[jax.Array, jax.Array]) -> jax.Array:
        target, value = (x[:, None] for x in column)
        ahead = (scores > value) | ((scores == value) & (position[None, :] < target))
        return ahead.sum(axis=1, dtype=jnp.int32)

    # one target at a time: [batch, block] is the largest array
    counted = jax.lax.map(before, (targets.T, expected.T)).T
    return (
        top,
        best,
        ranks + counted,
        jnp.where(here, mine, found),
        broken | jnp.isnan(scores).any(axis=1),
    )
