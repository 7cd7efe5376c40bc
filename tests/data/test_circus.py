"""CIRCUS's lists, and the queries that are chosen by them."""

import json
from pathlib import Path

import pytest

from cir_jax.errors import ConfigError, DataError
from cir_jax.evaluation import benchmarks, circus
from cir_jax.evaluation.queries import Query
from data import build
from tests.data.dummies import copy, dummy, rows

ANNOTATIONS = Path(__file__).resolve().parents[3] / "shared" / "annotations"
SOURCES = ("circo", "cirr", "fashioniq", "cirr_mbeir", "fashioniq_mbeir", "circus")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    pytest.importorskip("pyarrow")  # of M-BEIR's copies
    folder = tmp_path_factory.mktemp("data")
    for dataset in SOURCES:
        build.prepare(dataset, None, folder, source=dummy(dataset), allow_partial=True)
    return folder


def test_lists_are_read_without_their_traces(data_dir):
    assert build.check("circus", None, data_dir)["cirr"] == {"shortcut_free": 1, "validated": 1}
    (record,) = rows(data_dir, "circus", "cirr", "validated")
    assert record["query"] == b"8:2" and record["reference_name"] == b"dev-2-0-img0"
    assert record["text"] == b"Have only one shape, but in blue."


@pytest.mark.parametrize(
    "name, ids",
    [
        ("circo:shortcut_free", [1, 2]),
        ("cirr:shortcut_free", [13]),
        ("cirr:mbeir+validated", [1]),
        ("fashioniq:mbeir+shortcut_free", [1, 3]),
        ("fashioniq:mbeir+validated", [1, 3]),
        # the two that are one in M-BEIR are both asked of the official galleries
        ("fashioniq:shortcut_free", [1, 3, 5]),
        ("fashioniq:artemis+validated", [2, 3, 6, 7, 10, 11]),
    ],
)
def test_the_listed_queries_are_chosen(data_dir, name, ids):
    benchmark = benchmarks.load(name, "", data_dir, allow_partial=True)
    assert [query.id for query in benchmark.queries] == ids
    whole = benchmarks.load(name.rpartition(":")[0] + ":mbeir" * ("mbeir" in name), "", data_dir,
                            allow_partial=True)  # fmt: skip
    assert len(benchmark.gallery) == len(whole.gallery)
    assert "queries=" in benchmark.protocol.id and "queries=" not in whole.protocol.id
    assert benchmarks.required([name])["circus"] == {name.partition(":")[0]}


def test_a_partial_list_is_refused_unless_allowed(data_dir):
    with pytest.raises(DataError, match="allow_partial"):
        benchmarks.load("cirr:validated", "", data_dir)


def test_variants_without_data_are_refused():
    for name in ("shapes/cirr:mbeir", "shapes/circo:validated"):
        with pytest.raises(ConfigError, match="such data of circo, cirr, fashioniq only"):
            benchmarks.find(name)


def test_queries_that_are_not_there_are_named(tmp_path):
    listed = [{"query": "8:1", "reference_name": "a", "text": "Is red."}]
    queries = (Query(0, 0, ("is red",)),)
    options = dict(partial=False)
    assert circus.select(listed, "cirr", queries, {0: "a"}.get, [], **options) == [0]
    with pytest.raises(DataError, match=r"1 of its 1 .*\('a', 'Is red.'\); the benchmark has"):
        circus.select(listed, "cirr", queries, {0: "b"}.get, [], **options)
    with pytest.raises(DataError, match="'8:1'; the benchmark has '8:7'"):
        circus.select(listed, "cirr", queries, {0: "a"}.get, ["8:7"], **options)
    assert circus.select(listed, "cirr", queries, {0: "b"}.get, [], partial=True) == []


def test_lists_of_other_annotations_are_refused_where_data_are_complete(tmp_path, monkeypatch):
    source = copy("circus", tmp_path)
    for file in source.rglob("*circo*.jsonl"):
        file.write_text(file.read_text().replace("white background", "red background"))
    for dataset, files in (("circus", source), ("circo", dummy("circo"))):
        build.prepare(dataset, None, tmp_path / "data", source=files, allow_partial=True)
    name = "circo:shortcut_free"
    partial = benchmarks.load(name, "", tmp_path / "data", allow_partial=True)
    assert [query.id for query in partial.queries] == [2] and partial.partial
    for check in ("incomplete", "_unfinished"):
        monkeypatch.setattr(benchmarks, check, lambda *args: "")
    with pytest.raises(DataError, match=r"1 of its 2 queries .*red background.*other annotations"):
        benchmarks.load(name, "", tmp_path / "data")


def test_damaged_lists_are_named(tmp_path):
    source = copy("circus", tmp_path)
    (file,) = (source / "shortcut_free_subsets/cirr/shortcut_free").glob("*modal.jsonl")
    whole = file.read_text()
    for content, message in (
        (whole + whole, "line 2: query 8:2 is there twice"),
        (whole[:-10], "line 1: not valid JSON"),
        (whole.replace("query_txt", "text"), "has no field 'query_txt'"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            build.survey("circus", source)
    with pytest.raises(DataError, match=r"holds nothing of circus(.|\n)*matteoattimonelli/CIRCUS"):
        build.survey("circus", tmp_path / "..")
    file.unlink()
    report = build.survey("circus", source).reports["shortcut_free"]
    assert not report.complete and "cirr: none, official 685" in str(report)


def _published(dataset: str) -> list[tuple[str, str]]:
    """Reference and text of M-BEIR's queries, made of the real annotations, in order."""
    text, found = circus.TEXTS[dataset], {}
    if dataset == "cirr":
        entries = json.loads((ANNOTATIONS / "cirr/captions/cap.rc2.val.json").read_text())
        # those without a fully right answer are not in M-BEIR, nor counted by its ids
        parts = [(e["reference"], [e["caption"]], e["target_soft"]) for e in entries]
        parts = [(r, t) for r, t, soft in parts if 1.0 in soft.values()]
    else:
        parts = [
            (e["candidate"], e["captions"])
            for category in ("dress", "shirt", "toptee")
            for e in json.loads(
                (ANNOTATIONS / f"fashioniq/captions/cap.{category}.val.json").read_text()
            )
        ]
    for reference, texts in parts:
        found.setdefault((reference, text(texts)))
    return list(found)


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="no real annotation files here")
@pytest.mark.parametrize(
    "dataset, count, samples",
    [
        ("cirr", 4170, {
            12: ("dev-940-1-img0", "Change the anmial type but preserve the environment."),
            39: ("dev-117-3-img0", "Show the entire closet but in gray."),
            1095: ("dev-178-3-img0", "It's a smaller dog and is not eating."),
            1498: ("dev-487-1-img1", "Shows two corner walls with similar sections of windows "
                   "with no window treatments on them."),
        }),
        ("fashioniq", 6003, {
            5792: ("B00DNR2OCO", "Has off-shoulder and color is black and is more revealing and "
                   "is black."),
            5880: ("B004S2QS9I", "Is lighter and is a man's shirt with design print and no "
                   "collar."),
            5978: ("B007ZQI72K", "Has blue and white patterns and is less plus size and more "
                   "casual."),
        }),
    ],
)  # fmt: skip
def test_texts_of_the_real_annotations_are_those_of_m_beir(dataset, count, samples):
    found = _published(dataset)
    assert len(found) == count
    for number, expected in samples.items():  # number: of the id in CIRCUS's own lists
        assert found[number - 1] == expected


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="no real annotation files here")
def test_queries_of_circo_are_told_apart_by_image_and_text():
    entries = json.loads((ANNOTATIONS / "circo/val.json").read_text())
    found = {
        (str(e["reference_img_id"]), circus.plain([e["relative_caption"]])): e["id"]
        for e in entries
    }
    assert len(found) == len(entries) == 220
    # of CIRCUS's own lists: 000000280105.jpg, circo_q_test_134
    assert found["280105", "instead of having a mirror has a window over the sink"] == 134
    assert found["15820", "has a plane instead of a truck"] == 210
