"""The doctor finds files by other names, says what is odd, and lists all that is missing."""

import json

import pytest

from cir_jax.errors import DataError
from cir_jax.input import links
from cir_jax.input.tables import Table
from data import build, lookup
from tests.data.dummies import copy, dummy, edit, rows

UNLABELED = "COCO2017_unlabeled/unlabeled2017"


@pytest.mark.parametrize(
    "name",
    ["B0.jpg", "B0.JPG", "B0.jpeg", "B0.PNG", "b0.webp", "COCO_unlabeled2017_B0.jpg"],
)
def test_files_are_found_by_nearly_their_names(name, tmp_path):
    wanted = [tmp_path / "a" / "B0.jpg", tmp_path / "b" / "B0.jpg"]
    assert lookup.first_image(*wanted) == wanted[0]  # no folder
    (tmp_path / "b").mkdir()
    for other in ("B0.txt", "B0.jpg.part", "B00.jpg", "xB0.jpg"):
        (tmp_path / "b" / other).write_bytes(b"x")
    assert lookup.first_image(*wanted) == wanted[0]
    (tmp_path / "b" / name).write_bytes(b"x")
    assert lookup.first_image(*wanted) == tmp_path / "b" / name


def test_the_file_itself_comes_before_others(tmp_path):
    for name in ("B0.png", "B0.JPG", "B0.jpg"):
        (tmp_path / name).write_bytes(b"x")
        assert lookup.first_image(tmp_path / "B0.jpg").name == name  # the listing is not stale


def test_other_names_are_used_and_told(tmp_path):
    source = copy("circo", tmp_path)
    images = source / UNLABELED
    (images / "000000000120.jpg").rename(images / "000000000120.JPG")
    (images / "000000000033.jpg").rename(images / "COCO_unlabeled2017_000000000033.jpg")
    val = build.survey("circo", source).reports["val"]
    assert not val.problems and val.counts == {"queries": 3, "gallery": 8}
    assert "note: 2 image(s) have files of another case, suffix or prefix, such as" in str(val)
    build.prepare("circo", None, tmp_path / "data", source=source, allow_partial=True)
    found = rows(tmp_path / "data", "circo", "gallery", "unlabeled")
    as_usual = (dummy("circo") / UNLABELED / "000000000120.jpg").read_bytes()
    assert {r["name"]: r["image"] for r in found}[b"120"] == as_usual


@pytest.mark.parametrize(
    ("dataset", "folder", "names", "split"),
    [
        (
            "coco_object",
            "val2017",
            ["{}.JPEG", "COCO_val2017_{}.PNG", "{}.Jpg"],
            "val",
        ),
        ("coco_captions", "val2014", ["COCO_val2014_{}.jpeg", "{}.PNG", "{}.jpg"], "test"),
    ],
)
def test_coco_by_other_names_is_told_and_makes_the_same_tables(
    dataset, folder, names, split, tmp_path
):
    if dataset == "coco_object":
        pytest.importorskip("pycocotools")
    build.prepare(dataset, None, tmp_path / "usual", source=dummy(dataset), allow_partial=True)
    source = copy(dataset, tmp_path)
    files = sorted((source / folder).iterdir())[: len(names)]
    examples = []
    for file, name in zip(files, names, strict=True):
        new = file.rename(file.with_name(name.format(file.stem[-12:])))
        examples.append(f"such as {new.name} of image {file.stem}")
    report = build.survey(dataset, source).reports[split]
    assert not report.problems and not any(report.lost.values())
    (remark,) = report.remarks
    told, _, example = remark.partition(", such")
    assert told == f"{len(names)} image(s) have files of another case, suffix or prefix"
    assert f"such{example}" in examples
    build.prepare(dataset, None, tmp_path / "d", source=source, allow_partial=True)
    for table in build.tables_of(dataset):
        usual, found = (rows(tmp_path / d, dataset, table, split) for d in ("usual", "d"))
        assert repr(found) == repr(usual)


def test_odd_annotations_are_told_and_are_no_errors(tmp_path):
    source = copy("circo", tmp_path)

    def change(entries):
        first = entries[0]
        first["gt_img_ids"] = [*first["gt_img_ids"], first["gt_img_ids"][1]]
        entries[1]["gt_img_ids"] = [x for x in entries[1]["gt_img_ids"]
                                    if x != entries[1]["target_img_id"]]  # fmt: skip
        entries[2]["gt_img_ids"].append(entries[2]["reference_img_id"])
        entries[2]["relative_caption"] = " "

    edit(source / "annotations" / "val.json", change)
    remarks = build.survey("circo", source).reports["val"].remarks
    assert [text.partition("val.json record ")[2] for text in remarks] == [
        "0 (id 0): gt_img_ids has 250 2 times",
        "1 (id 1): target_img_id 8 is not among its gt_img_ids",
        "2 (id 2): its reference 120 is a ground truth",
        "2 (id 2): 1 of its 1 caption(s) are empty",
    ]


def test_the_report_has_every_missing_image_and_lost_query(tmp_path):
    source = copy("circo", tmp_path)
    images = source / UNLABELED
    (images / "000000000120.jpg").unlink()
    file = images / "000000000008.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    (images / "000000000033.jpg").write_bytes(b"")
    found = build.survey("circo", source)
    build.write_report(tmp_path / "x" / "report.json", "circo", found)
    content = json.loads((tmp_path / "x" / "report.json").read_text())
    assert content["dataset"] == "circo" and content["source"] == str(source)
    val = content["splits"]["val"]
    assert val["problems"] == []  # all are in `damaged`
    assert not val["complete"] and val["lost_queries"] == [1, 2]
    damaged = {one["image"]: one for one in val["damaged"]}
    assert set(damaged) == {"33", "8", "120"}
    assert damaged["120"]["problem"] == "is missing" and damaged["120"]["queries"] == [2]
    assert damaged["120"]["file"] == str(images / "000000000120.jpg")
    assert damaged["33"]["queries"] == [1] and "unreadable" in damaged["8"]["problem"]
    text = build.describe(found)
    assert "val:\n  1 image(s) missing, 2 unreadable, 2 queries lost\n" in text
    # what both splits share is listed once
    assert text.count("000000000120.jpg: is missing") == 1
    assert "3 problem(s), 3 of them above" in text


def test_a_folder_of_annotations_alone_is_diagnosed(tmp_path):
    """Before the first image is there: all of them are missing, by name."""
    source = copy("fashioniq", tmp_path)
    for file in (source / "images").iterdir():
        file.unlink()
    val = build.survey("fashioniq", source).reports["val"]
    assert val.counts["gallery"] == 0 and len(val.damaged) == val.lost["gallery"] > 0
    assert len(val.lost_queries) == val.lost["queries"] > 0
    for allow in (False, True):
        message = "has no image of fashioniq" if allow else "fashioniq is not complete"
        with pytest.raises(DataError, match=message):
            build.prepare("fashioniq", None, tmp_path / "d", source=source, allow_partial=allow)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("dataset", ["circo", "genecis"])
def test_linked_images_are_those_that_would_be_copied(dataset, tmp_path):
    source = copy(dataset, tmp_path)
    kwargs = {"source": source, "allow_partial": True}
    build.prepare(dataset, None, tmp_path / "copied", **kwargs)
    build.prepare(dataset, None, tmp_path / "linked", link=True, **kwargs)
    build.check(dataset, None, tmp_path / "linked")
    split = "unlabeled" if dataset == "circo" else "val"
    copied, linked = (rows(tmp_path / d, dataset, "gallery", split) for d in ("copied", "linked"))
    for one, other in zip(copied, linked, strict=True):
        assert one.keys() == other.keys() and one["image"] == other["image"]
    table = Table(tmp_path / "linked", dataset, "gallery", split)
    assert all(table._source[i]["image"].startswith(links.MAGIC) for i in range(len(table)))
    with pytest.raises(DataError, match="made of other files"):  # another kind of table
        build.prepare(dataset, None, tmp_path / "linked", **kwargs)


def test_linked_images_that_are_gone_or_changed_are_named(tmp_path):
    source = copy("circo", tmp_path)
    kwargs = {"source": source, "allow_partial": True, "link": True}
    build.prepare("circo", None, tmp_path / "d", **kwargs)
    table = Table(tmp_path / "d", "circo", "gallery", "unlabeled")
    file = source / UNLABELED / f"{int(table[2]['name']):012d}.jpg"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"record 2: its image .* has \d+ bytes, \d+ when the"):
        table[2]
    file.unlink()
    with pytest.raises(DataError, match="record 2: its image .*cannot be read.*--images=link"):
        table[2]
    with pytest.raises(DataError, match="gallery/unlabeled record 2"):
        build.check("circo", None, tmp_path / "d")
    with pytest.raises(DataError, match="pairs copies its images; those of fashioniq, cirr, circo"):
        build.prepare("pairs", None, tmp_path / "d", source=dummy("pairs"), link=True)
