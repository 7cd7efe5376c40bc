"""What a benchmark refuses, by message, and what the registry reads."""

import dataclasses

import numpy as np
import pytest

from cir_jax.errors import ConfigError, DataError
from cir_jax.evaluation import benchmarks, protocols
from data import build
from tests import tiny as factory
from tests.evaluation import worlds

SHARED = protocols.variant(protocols.CIRCO, ["shared_concept"])
SOFT = protocols.variant(protocols.CIRR, ["artemis"])


def broken(protocol, position, **changes):
    queries = list(worlds.queries(protocol))
    if protocol in (SHARED, SOFT):
        queries = [
            dataclasses.replace(q, concept="a tile", soft=((q.targets[0], 1.0),)) for q in queries
        ]
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
        (SHARED, {"concept": ""}, "no shared concept, which protocol circo(gallery=all"),
        (SOFT, {"soft": ()}, "no graded answers, which protocol cirr"),
        (SOFT, {"soft": ((50, 1.0),)}, "graded answer 50 is outside the gallery of 45"),
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
    groups = {"gallery even": 23, "gallery odd": 22}
    assert benchmark.counts == {"queries": 14, "gallery": 45} | groups
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


def test_the_registry_knows_the_official_counts():
    counts = {name: benchmarks.find(name).counts for name in ("circo", "cirr", "fashioniq")}
    assert counts["circo"] == {"val": (220, 123403), "test": (800, 123403)}
    assert counts["cirr"]["val"] == (4181, 2297) and counts["cirr"]["test1"] == (4148, 2315)
    assert counts["fashioniq"]["val"] == (6016, 15415)
    groups = benchmarks.find("fashioniq").groups
    names = ("dress", "shirt", "toptee")
    assert [groups["category", "val", n] for n in names] == [3817, 6346, 5373]
    assert [groups["triplets", "val", n] for n in names] == [2628, 3089, 2902]


def test_builders_and_registry_know_the_same_counts():
    """The doctor's and the evaluation's: neither package reads the other."""
    for name in ("circo", "cirr", "fashioniq"):
        official = build._builder_class(name).OFFICIAL
        entry = benchmarks.find(name)
        assert entry.counts == {s: (n["queries"], n["gallery"]) for s, n in official.items()}
        for (kind, split, group), count in entry.groups.items():
            if kind == "category":
                assert count == official[split][f"gallery {group}"]


def test_variants_are_parts_of_the_name():
    entry = benchmarks.find("fashioniq:small_gallery+capitalised")
    assert (entry.protocol.gallery, entry.protocol.captions) == ("triplets", "capitalised")
    assert benchmarks.find("shapes/circo").protocol == protocols.CIRCO
    with pytest.raises(ConfigError, match="Did you mean 'shared_concept'"):
        benchmarks.find("circo:shared_concepts")


def test_default_splits_have_public_labels():
    assert benchmarks.find("shapes/circo").split == "test_0"
    for name in ("circo", "cirr", "fashioniq", "genecis", "coco_object"):
        assert benchmarks.find(name).split == "val"


def test_required_tables_are_those_of_all_benchmarks():
    needed = benchmarks.required(["circo", "circo:shared_concept", "coco_captions", "coco_object"])
    assert needed["circo"] == {"queries", "gallery"}
    assert needed["coco_captions"] == {"captions", "gallery", "original"}  # the others may lack
    assert needed["coco_object"] == {"queries", "gallery", "references"}


def test_a_mark_makes_data_partial(tables):
    mark = {"splits": {"val": {"complete": False, "lost": {"queries": 2, "gallery": 0}}}}
    tables["fashioniq"].mark = lambda: mark
    with pytest.raises(DataError, match=r"incomplete files \(lost: 2 queries\).*--allow_partial"):
        benchmarks.load("shapes/fashioniq", "val")
    partial = benchmarks.load("shapes/fashioniq", "val", allow_partial=True)
    assert partial.partial and partial.name == "shapes/fashioniq (partial)"
    mark["splits"]["val"]["complete"] = True
    assert not benchmarks.load("shapes/fashioniq", "val").partial


def test_a_category_of_the_wrong_size_is_refused(tables, monkeypatch):
    entry = dataclasses.replace(
        benchmarks.find("shapes/fashioniq"), groups={("category", "val", "odd"): 23}
    )
    monkeypatch.setitem(benchmarks.REGISTRY, "shapes/fashioniq", entry)
    with pytest.raises(DataError, match="22 gallery images of odd, the official split has 23"):
        benchmarks.load("shapes/fashioniq", "val")
