"""Files for the test servers: what is written is accepted, and every mistake is found."""

import dataclasses
import json

import numpy as np
import pytest

from cir_jax.errors import DataError
from cir_jax.evaluation import protocols, submissions, validator
from cir_jax.evaluation.queries import Query
from cir_jax.evaluation.result import Result
from data.official import facts
from tests import tiny as factory
from tests.evaluation import worlds

SIZE = 60
QUERIES = {"circo": 80, "cirr": 148}
VAL = {"circo": 22, "cirr": 181}


@pytest.fixture(scope="module", autouse=True)
def smaller():
    """Official counts that are quick to check."""
    small = {
        name: dataclasses.replace(
            entry,
            counts={entry.aliases.get("test", "test"): (QUERIES[name], SIZE)}
            | {"val": (VAL[name], SIZE)},
        )
        for name, entry in validator.REGISTRY.items()
        if name in QUERIES
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validator, "REGISTRY", small)
        yield


def hidden(protocol):
    """A benchmark without public labels, as large as the server wants it."""
    rng, name = np.random.default_rng(0), protocol.name
    queries = []
    for i in range(QUERIES[name]):
        reference, *others = (int(x) for x in rng.choice(SIZE, 6, replace=False))
        queries.append(Query(i, reference, ("a",), candidates=(reference, *others)))
    names = [str(200000 + i) if name == "circo" else f"test1-{i}-0-img1" for i in range(SIZE)]
    gallery = [{"name": x.encode()} for x in names]
    split = "test" if name == "circo" else "test1"
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
            {"id": np.int64(q.id), "reference": q.reference, "candidates": q.candidates,
             "targets": q.targets, "aspects": q.aspects}
            for q in benchmark.queries
        ]  # fmt: skip
        tables[protocol.name, "queries"] = factory.MemoryTable(records)
        gallery = factory.MemoryTable(list(benchmark.gallery))
        gallery.identity = lambda name=protocol.name: f"gallery of {name}"
        tables[protocol.name, "gallery"] = gallery
    return dict(zip(("circo", "recall", "recall_subset"), paths, strict=True)), tables


@pytest.fixture(scope="module")
def known(written, annotations, tmp_path_factory):
    """What is official, twice: from tables (the splits of val are not there) and from files."""

    def table(directory, dataset, name, split):
        if name == "queries" and split != {"circo": "test", "cirr": "test1"}[dataset]:
            raise DataError("not prepared")
        return written[1][dataset, name]

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validator, "Table", table)
        patch.setenv("CIR_JAX_CACHE", str(folder))
        prepared = validator.prepared(folder)
    return prepared, facts(annotations)


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """The authors' files of the same benchmarks."""
    folder = tmp_path_factory.mktemp("annotations")

    def put(name, content):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))

    for protocol in (protocols.CIRCO, protocols.CIRR):
        benchmark = hidden(protocol)
        names = [record["name"].decode() for record in benchmark.gallery]
        if protocol.name == "circo":
            entries = [
                {"id": q.id, "reference_img_id": int(names[q.reference]), "relative_caption": "x",
                 "shared_concept": "y"}
                for q in benchmark.queries
            ]  # fmt: skip
            images = [{"id": int(name), "file_name": f"{int(name):012d}.jpg"} for name in names]
            put("annotations/test.json", entries)
            put("annotations/image_info_unlabeled2017.json", {"images": images})
        else:
            entries = [
                {"pairid": q.id, "reference": names[q.reference], "caption": "x",
                 "img_set": {"members": [names[c] for c in q.candidates]}}
                for q in benchmark.queries
            ]  # fmt: skip
            put("captions/cap.rc2.test1.json", entries)
            put("image_splits/split.rc2.test1.json", {n: f"./test1/{n}.png" for n in names})
    return folder


def test_what_evaluation_writes_is_accepted(written, known):
    files = written[0]
    assert [path.name for path in files.values()] == [
        "circo_test.json",
        "cirr_test1_recall.json",
        "cirr_test1_recall_subset.json",
    ]
    for kind, queries in (("circo", 80), ("recall", 148), ("recall_subset", 148)):
        verdict = validator.validate(files[kind], known[0])
        assert verdict.kind == "accepted"
        assert f"{queries} queries, compared with the prepared" in verdict.text, verdict.text
        alone = validator.validate(files[kind])
        assert alone.kind == "form" and "compared with nothing" in alone.text
        assert "because there has nothing" in validator.validate(files[kind], {}, "there").text
    content = json.loads(files["recall"].read_text())
    assert list(content)[:2] == ["version", "metric"] and content["version"] == "rc2"
    assert isinstance(json.loads(files["circo"].read_text())["7"][0], int)


def as_searle_writes(content):
    """sort_keys=True: as texts, "version" last; CIRCO's ids are texts."""
    text = json.dumps(
        {k: [str(x) for x in v] if isinstance(v, list) else v for k, v in content.items()},
        sort_keys=True,
    )
    return text


def as_longer_files(content):
    """Indented; CIRCO's ids with leading zeros, like the names of its files."""
    longer = {
        k: [f"{x:012d}" if isinstance(x, int) else x for x in v] if isinstance(v, list) else v
        for k, v in reversed(content.items())
    }
    return json.dumps(longer, indent=0, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("writer", [as_searle_writes, as_longer_files])
def test_files_of_other_writers_are_accepted(writer, written, known, tmp_path):
    for one in known:
        for kind, file in written[0].items():
            text = writer(json.loads(file.read_text()))
            if writer is as_searle_writes and kind == "circo":
                assert list(json.loads(text))[:3] == ["0", "1", "10"]
            (tmp_path / "x.json").write_text(text)
            assert validator.validate(tmp_path / "x.json", one).kind == "accepted"


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
    ("circo", plus("80"), "query '80': is no query of the split"),
    ("circo", plus("x"), "query 'x': is no query"),
    ("circo", row(lambda x: x[:49]), "query 5: 49 images, expected 50"),
    ("circo", row(lambda x: x[:49] + x[:1]), "query 5: [0-9]+ is there more than once"),
    ("circo", row(lambda x: [*x[:49], 999]), "query 5: 999 is no image of the gallery"),
    ("circo", row(lambda x: [*x[:49], "a.jpg"]), "query 5: 'a.jpg' is no image id"),
    ("circo", row(lambda x: [*x[:49], -3]), "query 5: -3 is no image id"),
    ("circo", row(lambda x: [*x[:49], True]), "query 5: True is no image id"),
    ("circo", row(lambda x: [*x[:49], 1.5]), "query 5: 1.5 is no image id"),
    ("circo", row(lambda x: "200002"), "query 5: holds a str, expected a list"),
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
    ("recall", lambda c: dict(list(c.items())[:-1]), "query 147: is missing"),
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
def test_every_mistake_is_found(kind, mistake, message, written, known, tmp_path):
    content = json.loads(written[0][kind].read_text())
    path = tmp_path / "submission.json"
    path.write_text(json.dumps(mistake(content)))
    for one in known:
        with pytest.raises(DataError, match=message) as error:
            validator.validate(path, one)
        assert str(error.value).startswith(str(path))


def test_an_image_outside_the_set_is_found(written, known, tmp_path):
    content = json.loads(written[0]["recall_subset"].read_text())
    recall = json.loads(written[0]["recall"].read_text())
    members = {*content["5"], f"test1-{REFERENCE_OF_5}-0-img1"}
    queries = written[1]["cirr", "queries"].records[5]["candidates"]
    members |= {f"test1-{i}-0-img1" for i in queries}
    content["5"][2] = next(name for name in recall["5"] if name not in members)
    path = tmp_path / "submission.json"
    path.write_text(json.dumps(content))
    for one in known:
        with pytest.raises(DataError, match="query 5: .* is not in its image set"):
            validator.validate(path, one)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": [1', "not valid JSON"),
        ("[1, 2]", "holds a list, expected one JSON object"),
        ('{"0": [], "0": []}', "the key '0' is there"),
        ('\ufeff{"0": []}', "not valid JSON in UTF-8"),
    ],
)
def test_what_is_no_submission_is_named(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        validator.validate(path)
    with pytest.raises(DataError, match="cannot be read"):
        validator.validate(tmp_path / "absent.json")


def test_without_facts_counts_and_forms_are_checked(written, tmp_path):
    path = tmp_path / "x.json"
    content = json.loads(written[0]["recall"].read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "5"}))
    with pytest.raises(DataError, match=r"147 queries, test1 has 148"):
        validator.validate(path)
    short = content | {"5": content["5"][:3]}
    path.write_text(json.dumps(short))
    with pytest.raises(DataError, match="query 5: 3 images"):
        validator.validate(path)
    path.write_text(json.dumps(content | {"5": [*content["5"][:49], "dev-1-1-img0"]}))
    with pytest.raises(DataError, match="query 5: dev-1-1-img0 is no image of the gallery"):
        validator.validate(path)
    names = {k: v for k, v in content.items() if k not in submissions.HEADER}
    path.write_text(json.dumps(names))
    with pytest.raises(DataError, match='"metric" is None, expected "recall"'):
        validator.validate(path)
    path.write_text(json.dumps({str(i): [x % 60 for x in range(i, i + 50)] for i in range(80)}))
    with pytest.raises(DataError, match="all image ids are below 60: positions in the gallery"):
        validator.validate(path)


def test_files_of_val_are_scored_and_never_called_valid_for_a_server(tmp_path):
    """mAP@K and R@K as CIRCO's script counts them: over the list, one by one."""
    rng = np.random.default_rng(0)
    entries, lists = [], {}
    for i in range(VAL["circo"]):
        ids = [int(x) for x in rng.choice(500_000, 60, replace=False)]
        right = ids[: 1 + i % 7]
        entries.append(
            {
                "id": i, "reference_img_id": ids[-1], "target_img_id": right[0],
                "gt_img_ids": right, "relative_caption": "x", "shared_concept": "y",
                "semantic_aspects": ["addition"] if i % 2 else ["negation"],
            }
        )  # fmt: skip
        lists[str(i)] = [int(x) for x in rng.permutation(ids)[:50]]
    assert any(len(str(x)) < 6 for row in lists.values() for x in row)
    source = tmp_path / "source"
    (source / "annotations").mkdir(parents=True)
    (source / "annotations" / "val.json").write_text(json.dumps(entries))
    hidden = {"id": 0, "reference_img_id": 1, "relative_caption": "x", "shared_concept": "y"}
    (source / "annotations" / "test.json").write_text(json.dumps([hidden]))
    path = tmp_path / "val.json"
    padded = {i: [f"{x:012d}" for x in row] if int(i) % 2 else row for i, row in lists.items()}
    path.write_text(json.dumps(padded))
    alone = validator.validate(path)
    assert alone.kind == "local" and "never send it" in alone.text and not alone.metrics
    assert f"score it locally: python launch/eval.py --validate_submission={path}" in alone.text
    verdict = validator.validate(path, facts(source))
    assert verdict.kind == "local" and "never send it" in verdict.text
    assert validator.STATUS[verdict.kind] != 0
    for k in (5, 10, 25, 50):
        precisions, recalls = [], []
        for entry in entries:
            hits, total = 0, 0.0
            for place, image in enumerate(lists[str(entry["id"])][:k], 1):
                if image in entry["gt_img_ids"]:
                    hits += 1
                    total += hits / place
            precisions.append(total / min(k, len(entry["gt_img_ids"])))
            recalls.append(entry["target_img_id"] in lists[str(entry["id"])][:k])
        assert verdict.metrics[f"mAP@{k}"].value == pytest.approx(100 * np.mean(precisions), 1e-12)
        assert verdict.metrics[f"R@{k}"].value == pytest.approx(100 * np.mean(recalls), 1e-12)
        if k == 10:
            odd = 100 * np.mean(precisions[1::2])
            assert verdict.metrics["mAP@10/addition"].value == pytest.approx(odd, 1e-12)


@pytest.mark.parametrize("kind", ["recall", "recall_subset"])
def test_cirr_files_of_val_are_scored(kind, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"dev-{i}-0-img0" for i in range(70)]
    entries, lists = [], {"version": "rc2", "metric": kind}
    for i in range(VAL["cirr"]):
        reference, *others = (names[j] for j in rng.choice(70, 6, replace=False))
        hard = others[int(rng.integers(5))]
        entries.append(
            {
                "pairid": 3 * i, "reference": reference, "target_hard": hard, "caption": "x",
                "target_soft": {hard: 1.0}, "img_set": {"members": [reference, *others]},
            }
        )  # fmt: skip
        pool = others if kind == "recall_subset" else [n for n in names if n != reference]
        order = [pool[j] for j in rng.permutation(len(pool))]
        lists[str(3 * i)] = order[: submissions.LENGTH[kind]]
    for folder, content in (
        ("captions/cap", entries),
        ("image_splits/split", dict.fromkeys(names, "x")),
    ):
        file = tmp_path / f"{folder}.rc2.val.json"
        file.parent.mkdir()
        file.write_text(json.dumps(content))
    path = tmp_path / "cirr.json"
    path.write_text(json.dumps(lists, sort_keys=True))
    metrics = validator.validate(path, facts(tmp_path)).metrics
    name, ks = ("R", (1, 5, 10, 50)) if kind == "recall" else ("Rs", (1, 2, 3))
    assert list(metrics) == [f"{name}@{k}" for k in ks]
    for k in ks:
        right = np.mean([e["target_hard"] in lists[str(e["pairid"])][:k] for e in entries])
        assert metrics[f"{name}@{k}"].value == pytest.approx(100 * right, 1e-12)


def test_a_part_of_the_annotations_does_not_make_a_file_valid(written, annotations, tmp_path):
    """A truncated list of queries, or none of this benchmark: form only, or wrong."""
    content = json.loads(written[0]["circo"].read_text())
    file = annotations / "annotations" / "test.json"
    source = tmp_path / "source" / "annotations"
    source.mkdir(parents=True)
    (source / "test.json").write_text(json.dumps(json.loads(file.read_text())[:70]))
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="query '70': is no query of the split"):
        validator.validate(path, facts(source.parent))
    path.write_text(json.dumps({k: content[k] for k in list(content)[:70]}))
    verdict = validator.validate(path, facts(source.parent))
    assert verdict.kind == "form" and "70 of the 80 official queries" in verdict.text
    cirr = validator.validate(written[0]["recall"], facts(source.parent), "DIR")
    assert cirr.kind == "form" and "DIR has nothing of cirr's test1" in cirr.text


def test_a_folder_without_annotations_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        facts(tmp_path / "absent")
    with pytest.raises(DataError, match="(?s)no annotations of CIRCO or CIRR.*circo test"):
        facts(tmp_path)
    entry = {"id": 0, "reference_img_id": 1, "relative_caption": "x", "shared_concept": "y"}
    (tmp_path / "test.json").write_text(json.dumps([entry, entry]))
    with pytest.raises(DataError, match="record 1 .*its id 0 is also that of"):
        facts(tmp_path)


def test_partial_data_are_marked_in_the_name(tmp_path):
    benchmark = dataclasses.replace(hidden(protocols.CIRCO), name="circo (partial)", partial=True)
    (path,) = submissions.write(ranked(benchmark), benchmark, tmp_path)
    assert path.name == "circo_partial_test.json"


def test_benchmarks_without_a_server_get_no_file(tmp_path):
    benchmark = worlds.benchmark(protocols.GENECIS)
    assert submissions.write(ranked(hidden(protocols.CIRCO)), benchmark, tmp_path) == []
    assert not list(tmp_path.iterdir())
