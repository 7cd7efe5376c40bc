"""A library on each rung of the ladder: the same photos are found, whatever they lie in."""

import sys

import jax
import numpy as np
import pytest

from cir_jax import composers
from cir_jax.errors import ConfigError, DataError
from cir_jax.library import Library
from cir_jax.library.indexes import faiss_ivf, ladder, qdrant
from cir_jax.retrieval.search import Searcher
from cir_jax.sharding.mesh import make_mesh
from tests.library.folders import fill

pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact")
pytest.importorskip("faiss")
pytest.importorskip("qdrant_client")
APPROXIMATE = ("faiss", "qdrant")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setenv(qdrant.URL, ":memory:")
    monkeypatch.setattr(faiss_ivf, "SMALL", 8)


def searcher(tiny, name, **settings):
    composer = composers.build(name, tiny[0], **settings)
    params = jax.jit(composer.init)(jax.random.key(1)) if composer.trained else {}
    mesh = make_mesh({"data": -1}, jax.devices()[:2])
    return Searcher(composer, params, composer.freeze(tiny[1]), mesh=mesh, batch_size=8)


@pytest.fixture(scope="module")
def slerp(tiny):
    return searcher(tiny, "slerp")


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "photos", 30, name="0-{i:02}.png")


def asked(folder):
    one, other = folder / "0-04.png", folder / "0-06.png"
    yield {"text": "make it red", "k": 50}
    yield {"image": one, "text": "is red", "k": 5}
    yield {"image": one, "text": "is red", "under": "2024", "k": 50}
    yield {"images": [one, other], "negative": "blue", "after": "2020", "k": 8}
    yield {"text": "a star", "min_score": 0.0, "dedup": 0.9, "k": 4}
    yield {"text": "a star", "after": "2999"}


@pytest.mark.parametrize("rung", [name for name in ladder.NAMES if name != "exact"])
def test_every_rung_finds_what_the_exact_one_finds(rung, folder, slerp, tmp_path):
    store, said = tmp_path / "s.sqlite", []
    with (
        Library(folder, slerp, store=store) as exact,
        Library(folder, slerp, store=store, index=rung, say=said.append) as other,
    ):
        exact.update()

        def same():
            assert len(exact) == len(other)
            for query in asked(folder):
                expected, found = exact.search(**query), other.search(**query)
                assert [path for path, _ in found] == [path for path, _ in expected], query
                for (_, score), (_, theirs) in zip(found, expected, strict=True):
                    assert score == pytest.approx(theirs, abs=1e-3)

        same()
        assert len(said) == (rung in APPROXIMATE)
        fill(folder, 3, seed=1, name="1-{i:02}.png")
        (folder / "0-08.png").unlink()
        exact.update()
        same()
        fill(folder, 2, seed=2, name="2-{i:02}.png")
        other.update()
        same()
        assert len(said) == (rung in APPROXIMATE)  # what has changed is added, not all made anew
        found = other.check(k=5, queries=6)
    assert (found.name, found.k, found.queries, found.photos) == (rung, 5, 6, 34)
    assert 0.9 <= found.recall <= 1 and found.milliseconds > 0


def test_an_explanation_beside_vectors_that_are_not_all_in_memory(folder, slerp, tmp_path):
    """The first thousand places of what the parts would give: here, all."""
    query = {"image": folder / "0-04.png", "text": "is red", "k": 5, "explain": True}
    with Library(folder, slerp, store=tmp_path / "s.sqlite") as exact:
        exact.update()
        whole = exact.search(**query)
        with Library(folder, slerp, store=tmp_path / "s.sqlite", index="faiss") as other:
            found = other.search(**query)
    assert found.numbers == whole.numbers
    for part in ("image", "text"):
        assert found.explained[part].ranks == whole.explained[part].ranks
        assert found.explained[part].now == whole.explained[part].now


def test_what_is_missed_is_measured(folder, slerp, tmp_path, monkeypatch):
    with Library(folder, slerp, store=tmp_path / "s.sqlite", index="faiss") as library:
        library.update()
        assert library.check(10, 6).recall == 1
        search = faiss_ivf.Faiss.search

        def forgetful(self, queries, k, *rest):
            found = search(self, queries, k, *rest)
            return found._replace(ids=np.where(np.arange(k) % 2, -1, found.ids))

        monkeypatch.setattr(faiss_ivf.Faiss, "search", forgetful)
        assert library.check(10, 6).recall == 0.5


def test_a_method_that_makes_vectors_of_the_backbones(folder, tiny, tmp_path):
    sizes = {"layers": 1, "heads": 2, "hidden_dim": 20, "initial": "random"}
    lens, store, said = searcher(tiny, "magiclens", **sizes), tmp_path / "s.sqlite", []
    with (
        Library(folder, lens, store=store) as exact,
        Library(folder, lens, store=store, index="faiss", say=said.append) as other,
    ):
        exact.update()
        for query in ({"image": folder / "0-04.png", "text": "is red"}, {"text": "a star"}):
            expected = dict(exact.search(**query, k=30))
            found = other.search(**query, k=30)
            assert {path for path, _ in found} == expected.keys()
            for path, score in found:
                assert score == pytest.approx(expected[path], abs=1e-3)
    assert len({line.partition(":")[0] for line in said}) == 2  # a file for each
    assert len(list(tmp_path.glob("s.sqlite.*.faiss"))) == 2


def test_a_score_of_its_own(folder, tiny, tmp_path):
    artemis = searcher(tiny, "artemis", embed_dim=8)
    query = {"image": folder / "0-04.png", "text": "is red", "k": 9}
    found = {}
    for rung in ("", "exact", "sharded"):
        with Library(folder, artemis, store=tmp_path / "s.sqlite", index=rung) as library:
            library.update()
            found[rung] = library.search(**query)
            message = "check: Artemis ranks by a score of its own, always exactly"
            with pytest.raises(ConfigError, match=message):
                library.check()
    assert len(found[""]) == 9 and found[""] == found["exact"]
    for (path, score), (other, theirs) in zip(found["sharded"], found["exact"], strict=True):
        assert path == other and score == pytest.approx(theirs, abs=1e-5)
    message = "index 'faiss': Artemis ranks by a score of its own.* Take exact or sharded"
    with (
        Library(folder, artemis, store=tmp_path / "s.sqlite", index="faiss") as library,
        pytest.raises(ConfigError, match=message),
    ):
        library.search(**query)


def test_what_is_taken_where_nothing_is_asked_for(folder, slerp, tmp_path, monkeypatch):
    store, said = tmp_path / "s.sqlite", []

    def taken():
        with Library(folder, slerp, store=store, say=said.append) as library:
            library.update()
            return library.check(3, 1).name

    assert taken() == "exact"
    monkeypatch.setattr(ladder, "EXACT_UP_TO", 29)
    assert taken() == "faiss" and len(said) == 1
    monkeypatch.setattr(ladder.importlib.util, "find_spec", lambda name: None)
    assert taken() == "exact"
    assert said[1:] == [
        "30 photos are scanned in memory; pip install 'cir_jax[search]' takes less of both."
    ]


def test_what_cannot_be_had(folder, slerp, tmp_path, monkeypatch):
    store = tmp_path / "s.sqlite"
    with pytest.raises(ConfigError, match="unknown index 'fais'. Did you mean 'faiss'"):
        Library(folder, slerp, store=store, index="fais")
    with Library(folder, slerp, store=store, index="qdrant") as library:
        with pytest.raises(DataError, match="nothing is indexed yet"):
            library.check()
        library.update()
        monkeypatch.setenv(qdrant.URL, "http://localhost:1")
        message = r"index 'qdrant': http://localhost:1: .*refused.* docker run .* \$QDRANT_URL"
        with pytest.raises(DataError, match=message):
            library.search(text="red")
    for rung, (package, extra) in ladder.PACKAGES.items():  # before anything is indexed
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf"'{rung}': .*pip install 'cir_jax\[{extra}\]'"):
            Library(folder, slerp, store=store, index=rung)
