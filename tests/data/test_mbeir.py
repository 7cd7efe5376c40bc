"""M-BEIR's copies: Parquet files as the hub has them in, the tables of a benchmark out."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.evaluation import benchmarks, circus
from data import build
from data.held import Held
from tests.data.dummies import copy, dummy, rows

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for dataset in ("cirr_mbeir", "fashioniq_mbeir"):
        build.prepare(dataset, None, folder, source=dummy(dataset), allow_partial=True)
    return folder


def parquet(name: str, dataset: str = "cirr_mbeir"):
    return dummy(dataset) / f"{name}-00000-of-00001.parquet"


def change(file, edit) -> None:
    """Writes a Parquet file again with other rows."""
    found = pyarrow.parquet.read_table(file).to_pylist()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(edit(found)), file)


@pytest.mark.parametrize("dataset", ["cirr_mbeir", "fashioniq_mbeir"])
def test_tables_are_those_of_the_files(data_dir, dataset):
    assert all(set(splits) == {"test"} for splits in build.check(dataset, None, data_dir).values())
    corpus, query, qrels = (
        pyarrow.parquet.read_table(parquet(name, dataset)).to_pylist()
        for name in ("corpus", "query", "qrels")
    )
    gallery = rows(data_dir, dataset, "gallery", "test")
    assert [r["image"] for r in gallery] == [r["image"]["bytes"] for r in corpus]
    names = [r["image"]["path"].removesuffix(".jpg") for r in corpus]
    assert [r["name"].decode() for r in gallery] == names
    references = rows(data_dir, dataset, "references", "test")
    assert len({r["image"] for r in references}) == len(references) <= len(query)
    place = {r["id"]: i for i, r in enumerate(corpus)}
    found = rows(data_dir, dataset, "queries", "test")
    for i, (record, row) in enumerate(zip(found, query, strict=True)):
        assert record["id"] == i and record["qid"].decode() == row["id"]
        assert [text.decode() for text in record["texts"]] == [row["text"]]
        assert references[record["reference"]]["image"] == row["image"]["bytes"]
        right = [place[r["corpus-id"]] for r in qrels if r["query-id"] == row["id"]]
        assert list(record["targets"]) == right


def test_two_queries_of_one_image_and_text_are_one_with_two_answers(data_dir):
    found = rows(data_dir, "fashioniq_mbeir", "queries", "test")
    assert [len(record["targets"]) for record in found] == [1, 1, 1, 2, 1]
    benchmark = benchmarks.load("fashioniq:mbeir", "val", data_dir, allow_partial=True)
    assert benchmark.split == "test" and benchmark.target_table()[3].min() >= 0
    assert benchmark.reference(benchmark.queries[3])["name"].decode() == "B0VBOTH001"


def test_folders_names_and_rows_as_the_hub_also_has_them(data_dir, tmp_path):
    source = copy("cirr_mbeir", tmp_path)
    for role, folder in (("corpus", "corpus"), ("query", "queries"), ("qrels", "default")):
        (source / folder).mkdir()
        file = source / folder / "test-00000-of-00001.parquet"
        (source / f"{role}-00000-of-00001.parquet").rename(file)
    # two shards, another name of the id, and what the hub's client leaves behind
    whole = pyarrow.parquet.read_table(source / "corpus" / "test-00000-of-00001.parquet")
    whole = whole.rename_columns({"id": "_id"})
    (source / "corpus" / "test-00000-of-00001.parquet").unlink()
    for i, part in enumerate((whole.slice(0, 10), whole.slice(10))):
        file = source / "corpus" / f"test-0000{i}-of-00002.parquet"
        pyarrow.parquet.write_table(part, file)
    (source / ".cache").mkdir()
    shutil.copy(parquet("qrels"), source / ".cache" / "corpus.parquet")
    change(
        source / "default" / "test-00000-of-00001.parquet",
        lambda found: [*found, found[0] | {"corpus-id": "8:1", "score": 0}],
    )
    build.prepare("cirr_mbeir", None, tmp_path / "data", source=source, allow_partial=True)
    for table in ("gallery", "references", "queries"):
        expected = rows(data_dir, "cirr_mbeir", table, "test")
        assert str(rows(tmp_path / "data", "cirr_mbeir", table, "test")) == str(expected)


def test_missing_and_damaged_images_are_counted_with_their_queries(tmp_path):
    source = copy("cirr_mbeir", tmp_path)

    def broken(found):
        found[0]["image"] = None
        found[1]["image"]["bytes"] = b"no image"
        return found

    change(source / "query-00000-of-00001.parquet", broken)
    change(source / "corpus-00000-of-00001.parquet", broken)
    report = build.survey("cirr_mbeir", source).reports["test"]
    assert report.lost["queries"] == 2 and report.lost["gallery"] == 2
    assert report.summary == "2 image(s) missing, 2 unreadable, 2 queries lost"
    assert sorted(one["queries"] for one in report.damaged) == [[], [], [0], [1]]
    assert any("row 1: is unreadable" in problem for problem in report.problems)


def test_queries_without_answer_are_left_out_and_told(tmp_path):
    source = copy("cirr_mbeir", tmp_path)
    change(source / "qrels-00000-of-00001.parquet", lambda found: found[1:])
    report = build.survey("cirr_mbeir", source).reports["test"]
    assert report.counts["queries"] == 1
    assert "queries without a right answer, left out: 1" in str(report)


@pytest.mark.parametrize(
    "name, edit, message",
    [
        ("corpus", lambda found: [found[0], *found], "id .* is there 2 times"),
        ("qrels", lambda found: [found[0] | {"corpus-id": "9:9"}], "target 9:9 is no image of"),
        ("qrels", lambda found: [found[0] | {"query-id": "9:9"}], "qrels.*query 9:9 is in no file"),
        ("query", lambda found: [{"id": r["id"], "image": r["image"]} for r in found],
         "no column for text"),
        ("query", lambda found: [{"id": r["id"], "text": "x"} for r in found],
         "expected id and image"),
        ("corpus", lambda found: [r | {"image": b"x"} for r in found], "expected bytes and path"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(tmp_path, name, edit, message):
    source = copy("cirr_mbeir", tmp_path)
    change(source / f"{name}-00000-of-00001.parquet", edit)
    with pytest.raises(DataError, match=message):
        build.survey("cirr_mbeir", source)


def test_a_missing_file_is_named(tmp_path):
    source = copy("fashioniq_mbeir", tmp_path)
    (source / "qrels-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"no .*qrels-\*\.parquet(.|\n)*huggingface-cli download"):
        build.survey("fashioniq_mbeir", source)
    with pytest.raises(DataError, match="More in data/mbeir/README.md"):
        build.survey("cirr_mbeir", None)


def test_images_are_read_by_row_in_any_order(tmp_path):
    images = []
    for i in range(23):
        data = io.BytesIO()
        Image.new("RGB", (4, 4), (i, 0, 0)).save(data, "PNG")
        images.append({"image": {"bytes": data.getvalue(), "path": None}})
    file = tmp_path / "corpus.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(images), file, row_group_size=3)
    for row in np.random.default_rng(0).permutation(23):
        assert Held(file, int(row)).read_bytes() == images[row]["image"]["bytes"]


def test_the_text_is_made_as_by_uniir():
    assert circus.sentence([' "is red" \r']) == "Is red."
    assert circus.sentence(["Why not?"]) == "Why not?" and circus.sentence([" "]) == ""
    assert circus.joined([" Is darker. ", "has dots? "]) == "Is darker and has dots?"
    assert circus.joined(["", "Is A-line"]) == "Is A-line."
