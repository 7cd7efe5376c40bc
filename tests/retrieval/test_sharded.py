"""Exact search over a mesh: as `ranking.rank` on one device, whatever lies where."""

import jax
import numpy as np
import pytest

from cir_jax.errors import CirError
from cir_jax.retrieval import ranking, sharded
from cir_jax.retrieval.sharded import Sharded
from cir_jax.sharding.mesh import make_mesh

COUNT, DIM = 90, 8


def mesh(*sizes):
    axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=False))
    return make_mesh(axes, jax.devices()[: int(np.prod(sizes))])


@pytest.fixture(scope="module")
def world():
    """Small numbers, whose products are exact in any order: many scores are equal."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 3, (COUNT, DIM)).astype(np.float16)
    return rows, rng.integers(-2, 3, (5, DIM)).astype(np.float32)


def farther(params, queries, gallery):
    """A score that is no dot product."""
    distance = ((queries[:, None] - gallery[None]) ** 2).sum(axis=2)
    return -params["scale"] * distance


@pytest.mark.parametrize("sizes", [(1,), (3,), (2, 2, 2)])
@pytest.mark.parametrize("scoring", [{}, {"score": farther, "params": {"scale": np.float32(2)}}])
def test_equal_scores_come_as_they_lie(sizes, scoring, world, monkeypatch):
    monkeypatch.setattr(sharded, "HELD_BLOCK", 8)  # several blocks in each shard
    rows, queries = world
    made = Sharded(mesh(*sizes), iter(np.split(rows, [1, 40, 41])), COUNT, **scoring)
    assert made.shards == np.prod(sizes) and made.rows % 8 == 0
    there = np.zeros((made.shards, made.rows), bool)
    place = np.divmod(np.arange(COUNT), made.filled)
    there[place] = np.arange(COUNT) % 7 > 0
    position = np.full(there.shape, -1)
    position[place] = np.arange(COUNT)
    members = np.arange(COUNT)[None] % 7 > 0
    for k in (1, 20, 200):
        scores, shards, where = made.search(queries, k, there)
        expected = ranking.rank(queries, np.float32(rows), k=k, members=members, **scoring)
        width = expected.top.shape[1]
        np.testing.assert_array_equal(scores[:, :width], expected.scores)
        found = np.where(np.isfinite(scores), position[shards, where], -1)
        np.testing.assert_array_equal(found[:, :width], expected.top)
        assert (scores[:, width:] == -np.inf).all()


def test_what_is_refused(world):
    rows, queries = world
    with pytest.raises(ValueError, match="more rows than 42"):
        Sharded(mesh(3), [rows], 40)
    bad = rows.copy()
    bad[50, 2] = np.inf
    with pytest.raises(CirError, match="gallery features: row 50 is not finite"):
        Sharded(mesh(3), [bad[:30], bad[30:]], COUNT)
    broken = {"score": farther, "params": {"scale": np.float32(np.nan)}}
    made = Sharded(mesh(3), [rows], COUNT, **broken)
    with pytest.raises(CirError, match="query 0: its scores are NaN"):
        made.search(queries, 3, np.ones((3, made.rows), bool))


def test_what_travels_is_k_of_each_device(world):
    rows, queries = world
    made = Sharded(mesh(3), [np.tile(rows, (100, 1))], 100 * COUNT)
    allowed = jax.device_put(np.ones(made._gallery.shape[:3], bool), made._sharding)
    lowered = sharded._search.lower(
        made.mesh, ranking.dot_product, 10, None, made._gallery, allowed, queries
    )
    text = lowered.as_text()
    gathered = [line for line in text.splitlines() if "all_gather" in line and "->" in line]
    shapes = {line.rpartition("-> ")[2] for line in gathered}
    assert shapes == {"tensor<3x5x10xf32>", "tensor<3x5x10xi32>", "tensor<3x5xi1>"}, shapes
