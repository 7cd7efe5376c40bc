"""Files for the test servers: what is written is accepted, and every mistake is found."""

import dataclasses
import json

import numpy as np
import pytest

from cir_jax.errors import DataError
from cir_jax.evaluation import protocols, submissions
from cir_jax.evaluation.queries import Query
from cir_jax.evaluation.result import Result
from tests import tiny as factory
from tests.evaluation import worlds

SIZE = 60
QUERIES = {"circo": 220, "cirr": 4148}


def hidden(protocol):
    """A benchmark without public labels, as large as the server wants it."""
    rng, name = np.random.default_rng(0), protocol.name
    queries = []
    for i in range(QUERIES[name]):
        reference, *others = (int(x) for x in rng.choice(SIZE, 6, replace=False))
        queries.append(Query(i, reference, ("a",), candidates=(reference, *others)))
    names = [str(1000 + i) if name == "circo" else f"test1-{i}-0-img1" for i in range(SIZE)]
    gallery = [{"name": x.encode()} for x in names]
    split = "val" if name == "circo" else "test1"
    return worlds.benchmark(
        protocol, name=name, split=split, gallery=gallery, queries=tuple(queries)
    )


def ranked(benchmark):
    """A result with a ranking that follows the protocol, and is otherwise random."""
    rng = np.random.default_rng(1)
    removed = benchmark.protocol.remove_reference
    top = np.empty((len(benchmark.queries), 50), np.int32)
    for line, query in zip(top, benchmark.queries, strict=True):
        order = rng.permutation(SIZE)
        line[:] = order[order != query.reference][:50] if removed else order[:50]
    nothing = np.zeros(top.shape, np.float32)
    subset = benchmark.candidate_table(without_reference=True) if removed else top[:, :0]
    return Result(
        "method", benchmark.name, benchmark.split, benchmark.protocol, {}, (), benchmark.counts,
        "weights@0", 0, 1.0, 1.0, top, nothing, subset, None, partial=benchmark.partial,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{kind: file} as evaluation writes them, and the tables to compare them with."""
    output = tmp_path_factory.mktemp("submissions")
    paths, tables = [], {}
    for protocol in (protocols.CIRCO, protocols.CIRR):
        benchmark = hidden(protocol)
        paths += submissions.write(ranked(benchmark), benchmark, output)
        records = [
            {"id": np.int64(q.id), "reference": q.reference, "candidates": q.candidates}
            for q in benchmark.queries
        ]
        tables[protocol.name, "queries"] = factory.MemoryTable(records)
        gallery = factory.MemoryTable(list(benchmark.gallery))
        gallery.identity = lambda name=protocol.name: f"gallery of {name}"
        tables[protocol.name, "gallery"] = gallery
    return dict(zip(("circo", "recall", "recall_subset"), paths, strict=True)), tables


@pytest.fixture
def official(written, monkeypatch, tmp_path):
    """The prepared tables are there; the other split of each benchmark is not."""

    def table(directory, dataset, name, split):
        if name == "queries" and split != {"circo": "val", "cirr": "test1"}[dataset]:
            raise DataError("not prepared")
        return written[1][dataset, name]

    monkeypatch.setattr(submissions, "Table", table)
    small = {
        name: dataclasses.replace(
            entry, counts={s: (queries, SIZE) for s, (queries, _) in entry.counts.items()}
        )
        for name, entry in submissions.REGISTRY.items()
    }
    monkeypatch.setattr(submissions, "REGISTRY", small)
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path))
    return tmp_path


def test_what_evaluation_writes_is_accepted(written, official):
    files = written[0]
    assert [path.name for path in files.values()] == [
        "circo_val.json",
        "cirr_test1_recall.json",
        "cirr_test1_recall_subset.json",
    ]
    for kind, queries in (("circo", 220), ("recall", 4148), ("recall_subset", 4148)):
        line = submissions.validate(files[kind], official)
        assert f"{queries} queries, compared with the prepared" in line, line
        assert "NOT compared" in submissions.validate(files[kind])
    content = json.loads(files["recall"].read_text())
    assert list(content)[:2] == ["version", "metric"] and content["version"] == "rc2"
    assert isinstance(json.loads(files["circo"].read_text())["7"][0], int)


def swap(content, a, b):
    """The same content with two keys in each other's place."""
    keys = [b if key == a else a if key == b else key for key in content]
    return {key: content[key] for key in keys}


def row(change):
    """A mistake in the list of query 5."""

    def apply(content):
        content["5"] = change(content["5"])
        return content

    return apply


def without(key):
    return lambda content: {k: v for k, v in content.items() if k != key}


def plus(key, value=None):
    return lambda content: content | {key: content["4"] if value is None else value}


REFERENCE_OF_5 = hidden(protocols.CIRR).queries[5].reference

MISTAKES = [
    ("circo", without("7"), "query 7: is missing"),
    ("circo", plus("220"), "query '220': is no query of the split"),
    ("circo", plus("x"), "query 'x': is no query"),
    ("circo", lambda c: swap(c, "3", "4"), "query 4: out of order"),
    ("circo", row(lambda x: x[:49]), "query 5: 49 images, expected 50"),
    ("circo", row(lambda x: x[:49] + x[:1]), "query 5: [0-9]+ is there more than once"),
    ("circo", row(lambda x: [*x[:49], 999]), "query 5: 999 is no image of the gallery"),
    ("circo", row(lambda x: [*x[:49], "a.jpg"]), "query 5: 'a.jpg' is no image id"),
    ("circo", row(lambda x: [*x[:49], -3]), "query 5: -3 is no image id"),
    ("circo", row(lambda x: [*x[:49], 1.5]), "query 5: 1.5 is no image id"),
    ("circo", row(lambda x: "1002"), "query 5: holds a str, expected a list"),
    ("circo", plus("version", "rc2"), '"metric" is None'),
    ("recall", without("version"), '"version" is None, expected "rc2"'),
    ("recall", plus("version", "rc1"), "\"version\" is 'rc1'"),
    ("recall", without("metric"), '"metric" is None, expected "recall" or'),
    ("recall", plus("metric", "mAP"), "\"metric\" is 'mAP'"),
    ("recall", plus("metric", "recall_subset"), "50 images, expected 3"),
    ("recall", without("17"), "query 17: is missing"),
    ("recall", plus("9999"), "query '9999': is no query"),
    ("recall", row(lambda x: [*x, x[0]]), "query 5: 51 images, expected 50"),
    ("recall", row(lambda x: [*x[:49], x[3]]), "query 5: test1-.* is there more than once"),
    ("recall", row(lambda x: [*x[:49], "dev-1-1-img0"]), "dev-1-1-img0 is no image of the"),
    ("recall", row(lambda x: [*x[:49], x[49] + ".png"]), "png' is no image name"),
    ("recall", row(lambda x: [*x[:49], 7]), "7 is no image name"),
    (
        "recall",
        row(lambda x: [*x[:49], f"test1-{REFERENCE_OF_5}-0-img1"]),
        f"its reference test1-{REFERENCE_OF_5}-0-img1 is in the list",
    ),
    ("recall", plus("4", [f"test1-{'1' * 3000}-{i}" for i in range(3000)]), "the server takes"),
    ("recall_subset", row(lambda x: x[:2]), "query 5: 2 images, expected 3"),
    (
        "recall_subset",
        row(lambda x: [*x[:2], f"test1-{REFERENCE_OF_5}-0-img1"]),
        "its reference",
    ),
    ("recall_subset", row(lambda x: [*x[:2], None]), "None is no image name"),
]


def short(x):
    """Test names that all workers agree on: a function's repr holds its address."""
    return getattr(x, "__name__", str(x))[:40]


@pytest.mark.parametrize(("kind", "mistake", "message"), MISTAKES, ids=short)
def test_every_mistake_is_found(kind, mistake, message, written, official):
    content = json.loads(written[0][kind].read_text())
    path = official / "submission.json"
    path.write_text(json.dumps(mistake(content)))
    with pytest.raises(DataError, match=message) as error:
        submissions.validate(path, official)
    assert str(error.value).startswith(str(path))


def test_an_image_outside_the_set_is_found(written, official):
    content = json.loads(written[0]["recall_subset"].read_text())
    recall = json.loads(written[0]["recall"].read_text())
    members = {*content["5"], f"test1-{REFERENCE_OF_5}-0-img1"}
    queries = written[1]["cirr", "queries"].records[5]["candidates"]
    members |= {f"test1-{i}-0-img1" for i in queries}
    content["5"][2] = next(name for name in recall["5"] if name not in members)
    path = official / "submission.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="query 5: .* is not in its image set"):
        submissions.validate(path, official)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": [1', "not valid JSON"),
        ("[1, 2]", "holds a list, expected one JSON object"),
        ('{"0": [], "0": []}', "the key '0' is there"),
    ],
)
def test_what_is_no_submission_is_named(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        submissions.validate(path)
    with pytest.raises(DataError, match="cannot be read"):
        submissions.validate(tmp_path / "absent.json")


def test_without_tables_counts_and_forms_are_checked(written, tmp_path):
    path = tmp_path / "x.json"
    content = json.loads(written[0]["recall"].read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "5"}))
    with pytest.raises(DataError, match=r"4147 queries, the official splits have"):
        submissions.validate(path)
    content["5"] = content["5"][:3]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="query 5: 3 images"):
        submissions.validate(path)


def test_partial_data_are_marked_in_the_name(tmp_path):
    benchmark = dataclasses.replace(hidden(protocols.CIRCO), name="circo (partial)", partial=True)
    (path,) = submissions.write(ranked(benchmark), benchmark, tmp_path)
    assert path.name == "circo_partial_val.json"


def test_benchmarks_without_a_server_get_no_file(tmp_path):
    benchmark = worlds.benchmark(protocols.GENECIS)
    assert submissions.write(ranked(hidden(protocols.CIRCO)), benchmark, tmp_path) == []
    assert not list(tmp_path.iterdir())
