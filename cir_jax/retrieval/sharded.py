"""Exact search over all devices of a mesh, of one process or of many.

Rows of a gallery lie in equal shards, one per device. Each device ranks its own, block by block,
and keeps k; what travels is k scores and k rows of each. A row is named by its shard and its row in
it: two int32, so that there may be more rows than one of them can count.
All processes call every method here, in one order, with the same arguments.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cir_jax.errors import CirError
from cir_jax.retrieval.ranking import HELD_BLOCK, Score, check_finite, dot_product
from cir_jax.sharding.mesh import AXES
from cir_jax.sharding.placement import replicate, to_host
from cir_jax.sharding.together import Together

SHARDS = P(AXES)


class Sharded:
    """Rows [shards, blocks, width, dim] over the devices of a mesh, in the type that they come in.

    shards: how many. rows: in each of them, of which some may be empty: what is in which is known
    to whoever asks, who says with each search which rows may be found.
    """

    def __init__(
        self,
        mesh: Mesh,
        pieces: Iterable[np.ndarray],
        at_most: int,
        score: Score = dot_product,
        params: Any = None,
    ):
        """pieces: float16 or float32 [some, dim]; row i of them goes to row i % `filled` of shard
        i // `filled`. at_most: rows in all; what comes after them is refused. score, params: as
        `ranking.rank` takes them, the same parameters on all processes.

        Raises CirError for rows that are not finite, ValueError for more than at_most.
        """
        self.mesh, self.shards = mesh, mesh.devices.size
        self.filled = max(1, -(-at_most // self.shards))
        self.width = min(HELD_BLOCK, 1 << max(3, (self.filled - 1).bit_length()))
        self.rows = -(-self.filled // self.width) * self.width
        self._sharding = NamedSharding(mesh, SHARDS)
        self._score, self._params = score, params
        if params is not None:
            self._params = replicate(mesh, params)
        self._gallery = self._placed(pieces)

    def _placed(self, pieces: Iterable[np.ndarray]) -> jax.Array | None:
        """Each process takes the rows of its own devices; None where there are none at all."""
        devices, parts, count = list(self.mesh.devices.flat), [], 0
        block, kind = None, None

        def close(shard: int) -> None:
            if devices[shard].process_index == jax.process_index():
                rows = np.zeros((self.rows, dim), kind) if block is None else block
                rows = rows.reshape(1, *self._shape(dim)[1:])
                parts.append(jax.device_put(rows, devices[shard]))

        for piece in pieces:
            check_finite("gallery", piece, count)
            if count + len(piece) > self.filled * self.shards:
                raise ValueError(f"more rows than {self.filled * self.shards}")
            dim, kind = piece.shape[1], piece.dtype
            while len(piece):
                shard, row = divmod(count, self.filled)
                part, piece = np.split(piece, [self.filled - row])
                if devices[shard].process_index == jax.process_index():
                    block = np.zeros((self.rows, dim), kind) if block is None else block
                    block[row : row + len(part)] = part
                count += len(part)
                if row + len(part) == self.filled:
                    close(shard)
                    block = None  # before the next: memory for one is enough
        if kind is None:
            return None
        for shard in range(count // self.filled, self.shards):
            close(shard)
            block = None
        return jax.make_array_from_single_device_arrays(self._shape(dim), self._sharding, parts)

    def _shape(self, dim: int) -> tuple[int, int, int, int]:
        return self.shards, self.rows // self.width, self.width, dim

    def search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k best of the rows that bool[shards, rows] allows, for each of float32[batch, dim]:
        scores float32[batch, k], -inf where there are fewer, shards and rows int32[batch, k]; equal
        scores by shard and row, lowest first.

        Raises CirError for queries or scores that are not finite.
        """
        check_finite("query", queries)
        if self._gallery is None:
            none = np.zeros((len(queries), k), np.int32)
            return np.full(none.shape, -np.inf, np.float32), none, none
        allowed = allowed.reshape(self._gallery.shape[:3])
        ranked = jax.make_array_from_callback(allowed.shape, self._sharding, allowed.__getitem__)
        asked = replicate(self.mesh, np.float32(queries))
        k = min(k, self.shards * self.rows)
        with jax.default_matmul_precision("highest"):
            found = _search(self.mesh, self._score, k, self._params, self._gallery, ranked, asked)
        scores, shards, rows, broken = map(to_host, found)
        if broken.any():
            raise CirError(f"query {int(np.argmax(broken))}: its scores are NaN.")
        return scores, shards, rows

    def put(self, shards: np.ndarray, rows: np.ndarray, vectors: np.ndarray) -> None:
        """[some, dim] in the place of these rows. Raises CirError for rows that are not finite."""
        check_finite("gallery", vectors)
        if not len(vectors):
            return
        if self._gallery is None:
            self._gallery = _empty(self.mesh, self._shape(vectors.shape[1]), vectors.dtype)
        # few different numbers, so that few programs are compiled
        lacking = (1 << (len(vectors) - 1).bit_length()) - len(vectors)
        where = np.full((2, len(vectors) + lacking), -1, np.int32)
        where[:, : len(vectors)] = shards, rows
        vectors = np.pad(vectors, ((0, lacking), (0, 0))).astype(self._gallery.dtype)
        new = replicate(self.mesh, (where, vectors))
        self._gallery = _put(self.mesh, self._gallery, *new)

    def grow(self, rows: int) -> None:
        """At least so many more in each shard, after those that are there."""
        blocks = -(-rows // self.width)
        self.rows += blocks * self.width
        if self._gallery is not None:
            self._gallery = _grown(self.mesh, blocks, self._gallery)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, its rows [rows, dim]) of the devices of this process, in the order of shards."""
        if self._gallery is not None:
            parts = {
                part.index[0].start or 0: part.data for part in self._gallery.addressable_shards
            }
            for shard, data in sorted(parts.items()):
                yield shard, np.asarray(data).reshape(self.rows, -1)


@Together
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(
    mesh: Mesh,
    score: Score,
    k: int,
    params: Any,
    gallery: jax.Array,
    ranked: jax.Array,
    queries: jax.Array,
) -> tuple[jax.Array, ...]:
    """[shards, blocks, width, dim], bool[shards, blocks, width], [batch, dim] -> replicated."""

    def local(
        params: Any, gallery: jax.Array, ranked: jax.Array, queries: jax.Array
    ) -> tuple[jax.Array, ...]:
        width, batch = gallery.shape[2], len(queries)

        def block(carry: Any, given: Any) -> tuple[Any, None]:
            best, top, broken = carry
            vectors, may, first = given
            found = score(params, queries, vectors.astype(jnp.float32)).astype(jnp.float32)
            found = jnp.where(may[None], found, -jnp.inf)
            broken |= jnp.isnan(found).any(axis=1)
            values, rows = jax.lax.top_k(found, min(k, width))
            # earlier blocks first: top_k keeps the order of equal scores
            values = jnp.concatenate([best, values], axis=1)
            rows = jnp.concatenate([top, rows.astype(jnp.int32) + first], axis=1)
            best, order = jax.lax.top_k(values, k)
            return (best, jnp.take_along_axis(rows, order, axis=1), broken), None

        nothing = jnp.full((batch, k), -jnp.inf), jnp.zeros((batch, k), jnp.int32)
        firsts = width * jnp.arange(gallery.shape[1], dtype=jnp.int32)
        given = gallery[0], ranked[0], firsts
        carry, _ = jax.lax.scan(block, (*nothing, jnp.zeros(batch, bool)), given)
        # k of each device: [shards, batch, k] on all of them
        best, top, broken = (jax.lax.all_gather(x, AXES) for x in carry)
        best, top = (jnp.swapaxes(x, 0, 1).reshape(batch, -1) for x in (best, top))
        best, order = jax.lax.top_k(best, k)
        shards = (order // k).astype(jnp.int32)
        return best, shards, jnp.take_along_axis(top, order, axis=1), broken.any(axis=0)

    # what was gathered is the same everywhere, which shard_map does not see
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), SHARDS, SHARDS, P()),
        out_specs=P(),
        check_vma=False,
    )(params, gallery, ranked, queries)


@Together
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), NamedSharding(mesh, SHARDS))


@Together
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _put(mesh: Mesh, gallery: jax.Array, where: jax.Array, vectors: jax.Array) -> jax.Array:
    """where: int32[2, some] shards and rows; shard -1 is none."""

    def local(gallery: jax.Array, where: jax.Array, vectors: jax.Array) -> jax.Array:
        rows = gallery.reshape(-1, gallery.shape[-1])
        mine = jnp.where(where[0] == jax.lax.axis_index(AXES), where[1], len(rows))
        return rows.at[mine].set(vectors, mode="drop").reshape(gallery.shape)

    specs = SHARDS, P(), P()
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=SHARDS, check_vma=False)(
        gallery, where, vectors
    )


@Together
@functools.partial(jax.jit, static_argnums=(0, 1))
def _grown(mesh: Mesh, blocks: int, gallery: jax.Array) -> jax.Array:
    grown = jnp.pad(gallery, ((0, 0), (0, blocks), (0, 0), (0, 0)))
    return jax.lax.with_sharding_constraint(grown, NamedSharding(mesh, SHARDS))
