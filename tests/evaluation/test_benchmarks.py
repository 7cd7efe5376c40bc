"""What a benchmark refuses, by message, and what the registry reads."""

import dataclasses

import numpy as np
import pytest

from cir_jax.errors import DataError
from cir_jax.evaluation import benchmarks, protocols
from tests import tiny as factory
from tests.evaluation import worlds


def broken(protocol, position, **changes):
    queries = list(worlds.queries(protocol))
    queries[position] = dataclasses.replace(queries[position], **changes)
    return worlds.benchmark(protocol, queries=tuple(queries))


@pytest.mark.parametrize(
    ("protocol", "changes", "message"),
    [
        (protocols.CIRCO, {"targets": (45,)}, "ground truth 45 is outside the gallery of 45"),
        (protocols.CIRCO, {"targets": (3, 3)}, "a ground truth is listed twice"),
        (protocols.CIRCO, {"targets": ()}, "ground truth is missing here"),
        (protocols.CIRCO, {"reference": -1}, "reference -1 is outside"),
        (protocols.CIRCO, {"id": 100}, "duplicate query id, already used by record 0"),
        (protocols.CIRCO, {"texts": ("a", "b")}, "2 texts, protocol circo"),
        (protocols.CIRR, {"reference": 1, "targets": (1,)}, "the reference is a ground truth"),
        (protocols.CIRR, {"candidates": ()}, "no candidates, which protocol cirr"),
        (protocols.GENECIS, {"candidates": (5, 6)}, "is not among the candidates"),
        (protocols.FASHIONIQ, {"category": "evn"}, "unknown category 'evn'. Did you mean 'even'"),
        (protocols.FASHIONIQ, {"category": "even", "targets": (1,)}, "1 is not of category 'even'"),
    ],
)
def test_a_bad_record_is_named(protocol, changes, message):
    with pytest.raises(DataError) as error:
        broken(protocol, 2, **changes)
    assert str(error.value).startswith("tiles.json, record 2 (id ")
    assert message in str(error.value)


def test_a_benchmark_needs_queries_and_categories():
    with pytest.raises(DataError, match="0 queries and 45 gallery images"):
        worlds.benchmark(queries=())
    with pytest.raises(DataError, match="needs the categories of all 45 gallery images, got 0"):
        worlds.benchmark(protocols.FASHIONIQ, categories=())


def test_padding_of_ragged_rows():
    np.testing.assert_array_equal(
        benchmarks.pad_rows([[3], [], [1, 2]]), [[3, -1], [-1, -1], [1, 2]]
    )
    table = worlds.benchmark(protocols.CIRR).candidate_table(without_reference=True)
    assert table.shape == (14, 5) and (table >= 0).all()


def test_unknown_benchmarks_list_the_known_ones():
    with pytest.raises(DataError, match="Did you mean 'shapes/circo'"):
        benchmarks.load("shapes/circ", "val")


@pytest.fixture
def tables(monkeypatch):
    """Prepared tables as TFDS gives them: bytes and numpy arrays."""
    queries = [
        {
            "id": np.int64(q.id),
            "reference": np.int32(q.reference),
            "texts": [text.encode() for text in q.texts],
            "targets": np.asarray(q.targets, np.int32),
            "candidates": np.asarray(q.candidates, np.int32),
            "category": q.category.encode(),
            "aspects": [aspect.encode() for aspect in q.aspects],
        }
        for q in worlds.queries(protocols.FASHIONIQ)
    ]
    gallery = [
        record | {"categories": [b"even" if i % 2 == 0 else b"odd"]}
        for i, record in enumerate(worlds.gallery())
    ]
    made = {"fashioniq": factory.MemoryTable(queries), "gallery": factory.MemoryTable(gallery)}
    monkeypatch.setattr(benchmarks, "Table", lambda directory, dataset, table, split: made[table])
    return made


def test_load_reads_prepared_tables(tables):
    benchmark = benchmarks.load("shapes/fashioniq", "val")
    assert benchmark.queries == worlds.queries(protocols.FASHIONIQ)
    assert benchmark.categories[:2] == (frozenset({"even"}), frozenset({"odd"}))
    assert benchmark.counts == {"queries": 14, "gallery": 45}
    del tables["fashioniq"].records[3]["texts"]
    with pytest.raises(DataError, match=r"record 3: not a query record \(KeyError: 'texts'"):
        benchmarks.load("shapes/fashioniq", "val")


def test_a_partial_gallery_is_refused_unless_allowed(tables, monkeypatch):
    monkeypatch.setattr(benchmarks, "REGISTRY", {})
    entry = benchmarks.Entry("real", "fashioniq", protocols.FASHIONIQ, counts={"val": (14, 46)})
    benchmarks.register("real/fashioniq", entry)
    benchmarks.register("real/fashioniq", entry)
    with pytest.raises(ValueError, match="already registered"):
        benchmarks.register("real/fashioniq", dataclasses.replace(entry, dataset="other"))
    with pytest.raises(DataError, match="14 queries and 45 gallery images, the official split has"):
        benchmarks.load("real/fashioniq", "val")
    partial = benchmarks.load("real/fashioniq", "val", allow_partial=True)
    assert partial.name == "real/fashioniq (partial)"
