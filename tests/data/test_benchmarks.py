"""The benchmarks' builders on the dummy data: the official files in, the agreed tables out."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.input.tables import Table
from data import build
from data.benchmark import BenchmarkBuilder, Question, resolve
from data.coco_object import coco_object_dataset_builder as coco_object
from data.genecis.genecis_dataset_builder import dilated
from tests.data.dummies import copy, dummy, edit, rows

SIMPLE = ("fashioniq", "cirr", "circo", "genecis", "coco_captions")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """The dummy data of all but coco_object, built."""
    folder = tmp_path_factory.mktemp("data")
    for dataset in SIMPLE:
        build.prepare(dataset, None, folder, source=dummy(dataset), allow_partial=True)
    return folder


def numbers(values: Any) -> list[int]:
    return [int(value) for value in values]


@pytest.mark.parametrize("dataset", SIMPLE)
def test_whole_and_readable(data_dir, dataset):
    counts = build.check(dataset, None, data_dir)
    assert set(counts) == set(build.tables_of(dataset))
    for table in counts:
        split = next(iter(counts[table]))
        assert [r["id"] for r in rows(data_dir, dataset, table, split)][:1]
    mark = json.loads((build.table_dir(dataset, "gallery", data_dir) / build.MARK).read_text())
    assert not any(split["complete"] for split in mark["splits"].values())  # dummies are small


@pytest.mark.parametrize("dataset", ["circo", "cirr", "fashioniq", "genecis"])
def test_names_are_those_of_the_gallery(data_dir, dataset):
    for split in build.check(dataset, ["names"], data_dir)["names"]:
        fields = ("id", "name", "categories")
        gallery = rows(data_dir, dataset, "gallery", split)
        expected = [{field: record[field] for field in fields} for record in gallery]
        assert rows(data_dir, dataset, "names", split) == expected


def test_circo(data_dir):
    gallery = rows(data_dir, "circo", "gallery", "unlabeled")
    names = [record["name"].decode() for record in gallery]
    assert names == ["17", "4", "250", "33", "8", "91", "120", "66"]  # of the info file
    assert [record["id"] for record in gallery] == list(range(8))
    images = dummy("circo") / "COCO2017_unlabeled" / "unlabeled2017"
    for record in gallery:
        assert record["image"] == (images / f"{int(record['name']):012d}.jpg").read_bytes()
    val = rows(data_dir, "circo", "queries", "val")
    assert [record["id"] for record in val] == [0, 1, 2]
    assert [record["reference"] for record in val] == [0, 3, 6]
    assert [numbers(record["targets"]) for record in val] == [[1, 2, 3], [4], [5, 0]]
    assert val[0]["texts"] == [b"has two stars instead"]
    assert val[0]["shared_concept"] == b"a few plain shapes"
    assert val[0]["aspects"] == [b"cardinality", b"addition"]
    test = rows(data_dir, "circo", "queries", "test")
    assert [(r["id"], r["targets"], r["aspects"]) for r in test] == [(0, [], []), (1, [], [])]


def test_cirr(data_dir):
    assert len(Table(data_dir, "cirr", "gallery", "train")) == 8
    names = [r["name"].decode() for r in rows(data_dir, "cirr", "gallery", "val")]
    assert names[:2] == ["dev-0-0-img0", "dev-1-1-img1"]
    first, second = rows(data_dir, "cirr", "queries", "val")
    assert (first["id"], second["id"]) == (10, 13)
    assert numbers(second["candidates"]) == [1, 2, 3, 4, 5, 6]
    assert second["reference"] == 2 and numbers(second["targets"]) == [5]
    assert numbers(second["soft_targets"]) == [5, 3]
    assert np.array(second["soft_weights"]).tolist() == [1, -1]
    hidden = rows(data_dir, "cirr", "queries", "test1")[0]
    assert hidden["targets"] == hidden["soft_targets"] == [] and len(hidden["candidates"]) == 6


def test_fashioniq(data_dir):
    gallery = rows(data_dir, "fashioniq", "gallery", "val")
    names = [record["name"].decode() for record in gallery]
    order = ["B0VD000000", "B0VD000001", "B0VD000002", "B0VS000000", "B0VS000001", "B0VS000002"]
    order += ["B0VBOTH001", "B0VT000000", "B0VT000001", "B0VT000002"]
    assert names == order  # dress, shirt, toptee; each once
    assert gallery[6]["categories"] == [b"shirt", b"toptee"]
    assert gallery[6]["image"].startswith(b"\x89PNG") and gallery[0]["image"][:2] == b"\xff\xd8"
    queries = rows(data_dir, "fashioniq", "queries", "val")
    assert [r["id"] for r in queries] == list(range(6))
    assert [r["category"] for r in queries[::2]] == [b"dress", b"shirt", b"toptee"]
    assert queries[0]["texts"] == [b"is darker.", b"has dots? "]  # as they are in the file
    assert queries[4]["reference"] == 7 and numbers(queries[4]["targets"]) == [6]
    assert not any(r["targets"] for r in rows(data_dir, "fashioniq", "queries", "test"))


def test_genecis(data_dir):
    gallery = rows(data_dir, "genecis", "gallery", "val")
    queries = rows(data_dir, "genecis", "queries", "val")
    tasks = (b"focus_attribute", b"change_attribute", b"focus_object", b"change_object")
    assert [r["category"] for r in queries] == [task for task in tasks for _ in range(2)]
    assert [r["id"] for r in queries] == list(range(8))
    for record in queries:
        assert len(record["candidates"]) == 4
        assert record["candidates"][0] == record["targets"][0]
        assert record["reference"] not in record["candidates"]
        for position in (record["reference"], *record["candidates"]):
            whole = not any(gallery[position]["crop"])
            assert whole == record["category"].endswith(b"object")
    first = gallery[queries[0]["reference"]]
    assert first["name"] == b"1"
    assert first["crop"].tolist() == [0, 0, 17, 24]  # box 2, 9, 10, 14: cut at left and top
    assert not any(field in first for field in ("box", "instance_bbox"))


def test_genecis_crop_is_that_of_the_released_code():
    # margins of 0.7 at the left and the top; right and bottom count from the moved corner
    assert dilated((100, 50, 20, 10), (640, 480)) == (86, 43, 120, 60)
    assert dilated((5, 50, 20, 10), (640, 480)) == (0, 43, 34, 60)  # cut: the margin moves over
    assert dilated((600, 470, 30, 20), (640, 480)) == (579, 456, 630, 480)
    assert dilated((0.5, 0.5, 3, 3), (640, 480)) == (0, 0, 5, 5)  # 5.1
    # the released code gives PIL the floats, here of box 100.9, 51, 20.4, 10
    cut = Image.new("L", (640, 480)).crop((86.62, 44.0, 121.3, 61.0)).size
    left, top, right, bottom = dilated((100.9, 51, 20.4, 10), (640, 480))
    assert cut == (right - left, bottom - top) == (34, 17)


def test_genecis_keeps_the_usual_number_of_candidates(tmp_path):
    source = copy("genecis", tmp_path)
    file = source / "genecis" / "focus_object.json"
    edit(file, lambda entries: [*entries, entries[0] | {"gallery": entries[0]["gallery"][:1]}])
    report = build.survey("genecis", source).reports["val"]
    assert report.counts["queries focus_object"] == 2  # as in the released code
    assert "records of focus_object left out for their number of candidates: 1" in str(report)


def test_genecis_target_among_its_distractors_counts_once(tmp_path):
    source = copy("genecis", tmp_path)
    file = source / "genecis" / "change_object.json"
    edit(file, lambda entries: entries[0]["gallery"].append(entries[0]["target"]))
    edit(file, lambda entries: entries[1]["gallery"].append({"val_image_id": 144}))
    build.prepare("genecis", None, tmp_path / "data", source=source, allow_partial=True)
    record = rows(tmp_path / "data", "genecis", "queries", "val")[6]
    assert len(record["candidates"]) == 4 and record["candidates"][0] == record["targets"][0]


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    pytest.importorskip("pycocotools")
    folder = tmp_path_factory.mktemp("objects")
    source = dummy("coco_object")
    build.prepare("coco_object", None, folder, source=source, allow_partial=True)
    return folder


def test_coco_object(objects):
    queries, gallery, references = (
        rows(objects, "coco_object", table, "val") for table in ("queries", "gallery", "references")
    )
    # 1004 has one object, more than half as large as the image; 1005 none
    assert [r["name"] for r in gallery] == [b"000000001001", b"000000001002", b"000000001003"]
    assert [r["name"] for r in references] == [r["name"] for r in gallery]
    assert [r["reference"] for r in queries] == [0, 1, 2]
    assert [numbers(r["targets"]) for r in queries] == [[0], [1], [2]]
    assert queries[1]["query_class"] == b"traffic light" and queries[1]["classes"] == []
    assert queries[1]["texts"] == [b"traffic light and "]  # sic, as in the released code
    classes = {queries[2]["query_class"], *queries[2]["classes"]}
    assert classes == {b"ring", b"star", b"traffic light"}
    name, others = queries[2]["query_class"], queries[2]["classes"]
    assert queries[2]["texts"] == [name + b" and " + b" and ".join(others)]
    shown = Image.open(io.BytesIO(references[1]["image"]))
    assert shown.format == "PNG" and shown.size == (21, 21)  # box 4, 4, 21, 21.5
    pixels = np.asarray(shown)
    original = np.asarray(Image.open(io.BytesIO(gallery[1]["image"])))[4:25, 4:25]
    assert (pixels[0, :9] == original[0, :9]).all() and (
        pixels[17:, 17:] == original[17:, 17:]
    ).all()
    assert (pixels[12:16, :] == 255).all() and (pixels[0, 11:] == 255).all()


def test_coco_object_choice_is_seeded_and_recorded(objects):
    file = dummy("coco_object") / "annotations" / "instances_val2017.json"
    annotations = json.loads(file.read_text())
    chosen = coco_object.choose(annotations, file)
    assert chosen == coco_object.choose(annotations, file)
    rest = dict(annotations)
    rest["annotations"] = [a for a in annotations["annotations"] if a["image_id"] != 1001]
    assert coco_object.choose(rest, file) == chosen[1:]  # no image moves another's choice
    drawn = [coco_object._draw(i, 3) for i in range(3000)]
    assert all(900 < drawn.count(k) < 1100 for k in range(3))
    folder = build.table_dir("coco_object", "queries", objects)
    description = tfds.builder_from_directory(str(folder)).info.description
    assert f"seed {coco_object.SEED}" in description


def test_coco_run_lengths_and_polygons():
    pytest.importorskip("pycocotools")
    runs = {"size": [4, 6], "counts": [5, 2, 17]}  # down the columns
    inside = coco_object.mask(runs, 6, 4, "x")
    assert inside.shape == (4, 6) and np.argwhere(inside).tolist() == [[1, 1], [2, 1]]
    from pycocotools import mask

    packed = mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    assert (coco_object.mask(packed, 6, 4, "x") == inside).all()
    packed["counts"] = packed["counts"].decode()  # as JSON has it
    assert (coco_object.mask(packed, 6, 4, "x") == inside).all()
    square = [[1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]]
    assert np.argwhere(coco_object.mask(square, 6, 4, "x")).tolist() == [
        [y, x] for y in (1, 2) for x in (1, 2, 3)
    ]


def test_coco_object_names_the_package_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(DataError, match=r"pip install 'cir_jax\[coco\]'"):
        build.survey("coco_object", dummy("coco_object"))


def test_coco_captions(data_dir):
    gallery = rows(data_dir, "coco_captions", "gallery", "test")
    captions = rows(data_dir, "coco_captions", "captions", "test")
    assert [r["name"] for r in gallery] == [
        f"COCO_val2014_{i:012d}".encode() for i in (1004, 1003, 1002, 1001)
    ]  # in the order of coco_test_ids.npy
    assert [int(r["name"]) for r in captions[:6]] == [300, 307, 314, 321, 328, 200]
    assert captions[5]["text"] == b"Scene 2 in words, take 0." and captions[5]["image"] == 1
    assert len(captions) == 20  # the sixth caption of 1002 is not used
    truths = {t: rows(data_dir, "coco_captions", t, "test") for t in ("original", "cxc", "eccv")}
    for records in truths.values():
        assert [r["id"] for r in records] == list(range(len(records)))
    original, cxc = (
        {(r["direction"], int(r["query"])): numbers(r["targets"]) for r in truths[truth]}
        for truth in ("original", "cxc")
    )
    assert len(original) == 24 and original[b"i2t", 1] == [5, 6, 7, 8, 9]
    assert original[b"t2i", 5] == [1]
    assert cxc[b"i2t", 3] == [15, 16, 17, 18, 19, 10] and cxc[b"t2i", 15] == [3, 2]
    assert len(truths["eccv"]) == 12 and not any(r["outside"] for r in truths["eccv"])


def test_coco_captions_without_the_package(tmp_path):
    source = copy("coco_captions", tmp_path)
    shutil.rmtree(source / "eccv_caption")
    found = build.survey("coco_captions", source)
    assert found.skipped.keys() == {"table cxc", "table eccv"}
    build.prepare("coco_captions", None, tmp_path / "data", source=source, allow_partial=True)
    captions = rows(tmp_path / "data", "coco_captions", "captions", "test")
    assert [int(r["name"]) for r in captions[:6]] == [0, 7, 14, 21, 28, 100]  # of the other file
    truth = rows(tmp_path / "data", "coco_captions", "original", "test")
    assert len(truth) == 24 and numbers(truth[1]["targets"]) == [5, 6, 7, 8, 9]
    with pytest.raises(DataError, match="lacks what table 'eccv'"):
        build.prepare(
            "coco_captions", ["eccv"], tmp_path / "data", source=source, allow_partial=True
        )
    # what could be built is whole, and is asked for by no other name
    counts = build.check("coco_captions", None, tmp_path / "data")
    assert counts["original"] == {"test": 24} and counts["cxc"] == counts["eccv"] == {}
    assert build.prepare("coco_captions", None, tmp_path / "data").keys() == {
        "gallery", "captions", "original",
    }  # fmt: skip
    with pytest.raises(DataError, match="table 'cxc' is missing"):
        build.check("coco_captions", ["cxc"], tmp_path / "data")


def test_coco_captions_of_coco_s_own_file(tmp_path):
    source = copy("coco_captions", tmp_path)
    karpathy = json.loads((source / "dataset_coco.json").read_text())
    captions = [
        {"id": s["sentid"], "image_id": image["cocoid"], "caption": s["raw"]}
        for image in karpathy["images"]
        for s in image["sentences"]
    ]
    before = build.survey("coco_captions", source).splits
    (source / "dataset_coco.json").unlink()
    (source / "annotations").mkdir()
    file = source / "annotations" / "captions_val2014.json"
    file.write_text(json.dumps({"annotations": captions}))
    after = build.survey("coco_captions", source).splits
    for table in ("captions", "original", "cxc", "eccv"):
        assert after[table]["test"].records(0) == before[table]["test"].records(0)
    (source / "eccv_caption" / "data" / "coco_test_ids.npy").unlink()
    with pytest.raises(DataError, match="no .*dataset_coco.json, .*coco_test_ids.npy"):
        build.survey("coco_captions", source)


def test_lost_positives_are_counted(tmp_path):
    source = copy("coco_captions", tmp_path)
    (source / "val2014" / "COCO_val2014_000000001002.jpg").unlink()
    build.prepare("coco_captions", None, tmp_path / "data", source=source, allow_partial=True)
    cxc = rows(tmp_path / "data", "coco_captions", "cxc", "test")
    outside = {(r["direction"], int(r["query"])): int(r["outside"]) for r in cxc if r["outside"]}
    assert outside == {(b"i2t", 2): 1, (b"t2i", 10): 1}  # image 1001 and its first caption


@pytest.mark.parametrize("layout", ["flat", "one folder", "img_raw", "cirr/img_raw"])
def test_cirr_layouts(tmp_path, data_dir, layout):
    source = copy("cirr", tmp_path)
    for image in sorted(source.rglob("*.png")):
        folder = {
            "flat": image.parts[-2],
            "one folder": "images",
        }.get(layout, f"{layout}/dev")
        if layout == "flat" and image.parts[-3] == "train":
            folder = "train"  # was train/7
        (source / folder).mkdir(parents=True, exist_ok=True)
        image.rename(source / folder / image.name)
    splits = ("val",) if layout.endswith("img_raw") else None
    build.prepare("cirr", None, tmp_path / "data", source=source, splits=splits, allow_partial=True)
    expected = rows(data_dir, "cirr", "gallery", "val")
    assert rows(tmp_path / "data", "cirr", "gallery", "val") == expected


def test_cirr_annotations_may_lie_at_the_top(tmp_path):
    source = copy("cirr", tmp_path)
    for folder in list((source / "cirr").iterdir()):
        folder.rename(source / folder.name)
    (source / "cirr").rmdir()
    assert build.survey("cirr", source).reports.keys() == {"train", "val", "test1"}


def test_same_queries_and_positions_whatever_is_lost():
    questions = [
        Question("q0", 7, "a", ("x",), ("b", "c"), ("a", "b", "d"), soft={"b": 1.0, "c": 0.5}),
        Question("q1", 8, "c", ("x",), ("b",)),
        Question("q2", 9, "a", ("x",), ("c",)),
        Question("q3", 5, "d", ("x",)),
    ]
    records, lost = resolve(questions, {"a": 0, "b": 1, "d": 2})
    assert [record["id"] for record in records] == [7, 5]
    assert records[0]["targets"] == [1] and records[0]["candidates"] == [0, 1, 2]
    assert records[0]["soft_targets"] == [1] and records[0]["soft_weights"] == [1.0]
    assert lost == {"queries": 2, "some targets of queries": 1}
    assert all(issubclass(build._builder_class(d), BenchmarkBuilder) for d in SIMPLE[:4])
