"""What every index can do: one suite for all rungs of the ladder."""

import contextlib
import os
import uuid

import jax
import numpy as np
import pytest

from cir_jax.errors import CirError, DataError
from cir_jax.library.indexes import faiss_ivf, ladder, qdrant
from cir_jax.library.indexes.exact import Exact
from cir_jax.library.indexes.faiss_ivf import Faiss
from cir_jax.library.indexes.qdrant import Qdrant
from cir_jax.library.indexes.sharded import OnMesh
from cir_jax.library.photos import File
from cir_jax.library.store import New, Store
from cir_jax.library.vectors import Vectors
from cir_jax.sharding.mesh import make_mesh

DIM, COUNT = 16, 300


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def drawn(count, seed=0):
    """Vectors as they are stored, around few centres, as photographs are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((12, DIM))
    rows = centres[rng.integers(0, 12, count)] + 0.5 * rng.standard_normal((count, DIM))
    return unit(rows).astype(np.float16)


def mesh(data, fsdp=1, tensor=1):
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, devices)


class World:
    """The truth that an index is compared with: vectors by id, in a dictionary."""

    def __init__(self):
        self.rows = {}

    def pieces(self, size=64):
        ids = np.int64(sorted(self.rows))
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            yield some, np.stack([self.rows[i] for i in some])

    def of(self, ids):
        return np.float32([self.rows.get(int(i), np.zeros(DIM)) for i in ids]).reshape(-1, DIM)

    def upsert(self, index, ids, vectors):
        self.rows |= dict(zip(map(int, ids), vectors, strict=True))
        index.upsert(np.int64(ids), vectors)

    def delete(self, index, ids):
        for i in ids:
            self.rows.pop(int(i), None)
        index.delete(np.int64(ids))

    def best(self, queries, k, only=None, without=()):
        ids = np.int64(sorted(self.rows))
        ids = ids[~np.isin(ids, without)]
        ids = ids if only is None else ids[np.isin(ids, only)]
        scores = queries @ self.of(ids).T
        order = np.lexsort((np.broadcast_to(ids, scores.shape), -scores))[:, :k]
        return ids[order], np.take_along_axis(scores, order, axis=1)


RUNGS = {
    "exact": lambda world, folder: Exact(),
    "sharded:1": lambda world, folder: OnMesh(mesh(1)),
    "sharded:3": lambda world, folder: OnMesh(mesh(3)),
    "sharded:8": lambda world, folder: OnMesh(mesh(2, 2, 2)),
    "faiss": lambda world, folder: in_faiss(world, folder),
    "qdrant": lambda world, folder: in_qdrant(":memory:", folder),
    "qdrant:http": lambda world, folder: over_http(folder),
    # a real one, where there is one to write to
    "qdrant:server": lambda world, folder: in_qdrant(os.environ.get(SERVER), folder),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Local mode performs exact"),
    pytest.mark.filterwarnings("ignore:Api key is used with an insecure"),
]
SERVER = "CIR_JAX_TEST_QDRANT"


def in_faiss(world, folder):
    pytest.importorskip("faiss")
    return Faiss(folder / "x.faiss", world.of, lambda said: None)


def over_http(folder):
    pytest.importorskip("qdrant_client")
    from tests.library import qdrant_server

    stack = contextlib.ExitStack()
    url = stack.enter_context(qdrant_server.served())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(qdrant.URL, url)
        patch.setenv(qdrant.KEY, "no")
        with pytest.raises(DataError, match=f"index 'qdrant': {url}: Unexpected Response: 401"):
            in_qdrant(url, folder)
        patch.setenv(qdrant.KEY, qdrant_server.KEY)
        index = in_qdrant(url, folder)
    index.closing = stack.pop_all().close
    return index


def in_qdrant(url, folder):
    if not url:
        pytest.skip(f"${SERVER} names no server")
    pytest.importorskip("qdrant_client")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(qdrant.URL, url)
        client = qdrant.connect()
    made = f"cir_jax_test_{uuid.uuid4().hex}"
    index = Qdrant(client, made, folder / "x.lock", lambda said: None)
    close = index.close

    def closed():
        client.delete_collection(made)
        close()
        getattr(index, "closing", lambda: None)()

    index.close = closed
    return index


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch):
    """What is for many vectors is done for a few hundred, too."""
    monkeypatch.setattr(faiss_ivf, "SMALL", 64)
    monkeypatch.setattr(qdrant, "LISTED", 20)
    monkeypatch.setattr(qdrant, "NUMBERS", 30 * DIM)


@pytest.fixture
def world():
    return World()


@pytest.fixture(params=RUNGS)
def index(request, world, tmp_path):
    made = RUNGS[request.param](world, tmp_path)
    yield made
    made.close()


@pytest.fixture
def filled(index, world):
    """Of COUNT vectors with gaps between their ids."""
    world.rows = dict(zip(range(3, 3 + 2 * COUNT, 2), drawn(COUNT), strict=True))
    index.rebuild(world.pieces, COUNT + 5)
    return index


def asked():
    return unit(np.random.default_rng(5).standard_normal((9, DIM)))


def agrees(index, world, k=10, queries=None, **ranked):
    queries = asked() if queries is None else queries
    found = index.search(queries, k, **ranked)
    ids, scores = world.best(queries, k, **ranked)
    width = ids.shape[1]
    assert found.ids.shape == found.scores.shape == (len(queries), k)
    assert found.ids.dtype == np.int64 and found.scores.dtype == np.float32
    assert (found.ids[:, width:] == -1).all() and (found.scores[:, width:] == -np.inf).all()
    right = [np.isin(b, a).mean() for a, b in zip(found.ids[:, :width], ids, strict=True) if width]
    assert not right or np.mean(right) >= (0.85 if index.approximate else 1), right
    for mine, scored, query in zip(found.ids, found.scores, queries, strict=True):
        np.testing.assert_allclose(scored[:width], world.of(mine[:width]) @ query, atol=2e-3)
        assert (np.diff(scored[:width]) <= 0).all()
    if not index.approximate:
        np.testing.assert_allclose(found.scores[:, :width], scores, atol=2e-3)
    assert len(index) == len(world.rows)


def test_the_best_of_all(filled, world):
    for k in (1, 10, COUNT + 7):
        agrees(filled, world, k)
    agrees(filled, world, 10, world.of([7, 101]))
    assert filled.search(world.of([7]), 1).ids == 7


def test_queries_do_not_change_each_other(filled, world):
    for ranked in ({}, {"only": np.int64(sorted(world.rows)[::4])}):
        together = filled.search(asked(), 12, **ranked)
        for row, query in enumerate(asked()):
            alone = filled.search(query[None], 12, **ranked)
            np.testing.assert_array_equal(alone.ids[0], together.ids[row])
            np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-6)


def test_nothing_is_there(index, world):
    agrees(index, world)
    index.rebuild(world.pieces, 0)
    index.delete(np.int64([4]))
    agrees(index, world)
    assert not list(index) or sum(len(ids) for ids, _ in index) == 0
    world.upsert(index, [9, 4], drawn(2))
    agrees(index, world)


def test_filters(filled, world):
    ids = np.int64(sorted(world.rows))
    some = ids[::7]
    for only in (some, ids[:1], ids[:0], np.int64([1, 2, 10**12]), np.r_[some, 4], ids[5:]):
        agrees(filled, world, only=only)
        agrees(filled, world, 64, only=only, without=[int(some[2]), 999_999])
    best = filled.search(world.of([21]), 3).ids[0]
    agrees(filled, world, without=[int(best[0]), int(best[2])])
    assert filled.search(world.of([21]), 1, without=best[:1].tolist()).ids == best[1]
    agrees(filled, world, without=ids.tolist())


def test_equals_come_by_id(filled, world):
    twins = [40, 1, 10**7]
    world.upsert(filled, twins, np.stack([world.rows[99]] * 3))
    found = filled.search(world.of([99]), 6).ids[0]
    assert found[:4].tolist() == [1, 40, 99, 10**7]


def test_any_sequence_of_changes(filled, world):
    rng = np.random.default_rng(3)
    for step in range(6):
        known = np.int64(sorted(world.rows))
        new = rng.choice(np.setdiff1d(np.arange(5000), known), 40, replace=False)
        again = rng.choice(known, 15, replace=False)
        ids = rng.permutation(np.r_[new, again])
        world.upsert(filled, ids, drawn(len(ids), seed=step))
        world.delete(filled, np.r_[rng.choice(known, 10, replace=False), 7777, 8888])
        agrees(filled, world)
        agrees(filled, world, only=ids)
    held = {int(i): row for ids, rows in filled for i, row in zip(ids, rows, strict=True)}
    assert held.keys() == world.rows.keys()
    cosines = [unit(np.float32(row)) @ world.of([i])[0] for i, row in held.items()]
    assert min(cosines) > (0.95 if filled.approximate else 0.999)
    world.delete(filled, known)
    world.delete(filled, list(world.rows))
    agrees(filled, world)


def test_numbers_that_are_not_finite(filled, world):
    bad = drawn(2)
    bad[1, 3] = np.nan
    with pytest.raises(CirError, match="row 1 is not finite"):
        filled.upsert(np.int64([3, 5]), bad)
    with pytest.raises(CirError, match="query features: row 0 is not finite"):
        filled.search(np.full((1, DIM), np.nan, np.float32), 3)
    agrees(filled, world)


class Photos:
    """A store whose photos come, change and go."""

    def __init__(self, path):
        self.store = Store(path)
        self.encoder = self.store.encoder("e", "{}")
        self.vectors = Vectors(self.store, self.encoder)

    def add(self, names, seed):
        news = [New(File(name.encode(), 1, seed), name.encode(), "", "") for name in names]
        self.store.add(self.encoder, news, drawn(len(names), seed).astype(np.float32))

    def remove(self, names):
        gone = [photo for photo in self.store.photos() if photo.path.decode() in names]
        self.store.rearrange(gone, [], [], [])

    def world(self):
        world = World()
        for ids, rows in self.vectors.read():
            world.rows |= dict(zip(ids.tolist(), rows, strict=True))
        return world


@pytest.fixture
def photos(tmp_path):
    made = Photos(tmp_path / "s.sqlite")
    yield made
    made.store.close()


def counted(index, monkeypatch):
    """What `follow` does with the index."""
    done = []
    for name in ("rebuild", "upsert", "delete", "keep"):
        real = getattr(index, name)

        def spy(*args, real=real, name=name):
            done.append(name)
            return real(*args)

        monkeypatch.setattr(index, name, spy)
    return done


def cut_off(*_):
    raise RuntimeError("cut off")


@pytest.mark.parametrize("rung", RUNGS)
def test_an_index_follows_the_store(rung, photos, tmp_path, monkeypatch):
    index = RUNGS[rung](photos.vectors, tmp_path)
    done = counted(index, monkeypatch)
    photos.add([f"{i}" for i in range(40)], 1)
    ladder.follow(index, photos.vectors)
    agrees(index, photos.world())
    assert done == ["rebuild", "keep"]
    ladder.follow(index, photos.vectors)
    assert len(done) == 2  # nothing has changed
    photos.add(["3", "new"], 2)
    photos.remove({"5", "6"})
    done.clear()
    ladder.follow(index, photos.vectors)
    agrees(index, photos.world())
    assert set(done) == {"upsert", "delete", "keep"} and len(index) == 39
    # cut off in between: what is done again changes nothing
    photos.add(["8", "later"], 3)
    with monkeypatch.context() as patch:
        patch.setattr(index, "delete", cut_off)
        with pytest.raises(RuntimeError, match="cut off"):
            ladder.follow(index, photos.vectors)
    photos.remove({"8"})
    ladder.follow(index, photos.vectors)
    agrees(index, photos.world())
    # another store under the same name, as long as this one
    other = Photos(tmp_path / "other.sqlite")
    other.add([f"{i}" for i in range(48)], 4)
    index.close()
    index = RUNGS[rung](other.vectors, tmp_path)
    done = counted(index, monkeypatch)
    ladder.follow(index, other.vectors)
    assert "rebuild" in done
    agrees(index, other.world())
    other.store.close()
    index.close()
