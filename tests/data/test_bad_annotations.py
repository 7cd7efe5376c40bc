"""Annotation files that are damaged or contradict each other: errors name file and record."""

from pathlib import Path
from typing import Any

import pytest

from cir_jax.errors import DataError
from data import build
from data.build import Options
from tests.data.dummies import copy, edit


def _set(path: list, value: Any):
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def _drop(path: list):
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


INFO = "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
CIRR = "cirr/captions/cap.rc2.val.json"
INSTANCES = "annotations/instances_val2017.json"
ECCV = "eccv_caption/data"
BAD = {
    "circo list": ("circo", "annotations/val.json", lambda c: {}, "val.json: holds a dict, expect"),
    "circo info": ("circo", INFO, lambda c: [], "unlabeled2017.json: holds a list, expected an"),
    "circo no images": ("circo", INFO, _drop(["images"]), "has no field 'images'"),
    "circo unknown": (
        "circo", "annotations/val.json", _set([1, "reference_img_id"], 999),
        r"val.json record 1 \(id 1\): reference 999 is no image of .*image_info_unlabeled2017",
    ),
    "circo target": (
        "circo", "annotations/val.json", _set([0, "gt_img_ids", 2], 998),
        r"val.json record 0 \(id 0\): target 998 is no image",
    ),
    "circo targets": (
        "circo", "annotations/val.json", _set([0, "gt_img_ids", 2], [33]),
        r"record 0 \(id 0\): target \[33\] is no image",
    ),
    "circo type": (
        "circo", "annotations/val.json", _set([0, "target_img_id"], "4"),
        r"val.json record 0 \(id 0\): target_img_id is '4', expected int",
    ),
    "circo bool": ("circo", "annotations/val.json", _set([0, "id"], True), "id is True, expected"),
    "circo field": (
        "circo", "annotations/test.json", _drop([1, "relative_caption"]),
        r"test.json record 1 \(id 1\): has no field 'relative_caption'",
    ),
    "circo twice": (
        "circo", "annotations/val.json", _set([2, "id"], 0),
        r"record 2 \(id 0\): its id 0 is also that of .*val.json record 0 \(id 0\)",
    ),
    "circo image twice": ("circo", INFO, _set(["images", 3, "id"], 17), "lists image 17 twice"),
    "circo record": ("circo", "annotations/val.json", _set([0], 5), "record 0: has no field 'id'"),
    "cirr member": (
        "cirr", CIRR, _set([0, "img_set", "members", 5], "ghost"),
        r"cap.rc2.val.json record 0 \(pairid 10\): candidate ghost is no image of .*split.rc2.val",
    ),
    "cirr type": (
        "cirr", CIRR, _set([0, "img_set", "members", 5], {}),
        r"record 0 \(pairid 10\): members holds {}, expected texts",
    ),
    "cirr soft": ("cirr", CIRR, _set([1, "target_soft", "ghost"], 0.5), "soft target ghost is no"),
    "cirr weight": ("cirr", CIRR, _set([1, "target_soft", "ghost"], "1"), "ghost is '1', expected"),
    "cirr hidden": ("cirr", CIRR, _drop([1, "target_hard"]), "has no field 'target_hard'"),
    "cirr path": (
        "cirr", "cirr/image_splits/split.rc2.val.json", _set(["dev-0-0-img0"], 3),
        "the path of dev-0-0-img0 is 3, expected a text",
    ),
    "fashioniq category": (
        "fashioniq", "captions/cap.dress.val.json", _set([0, "target"], "B0VBOTH001"),
        "cap.dress.val.json record 0: image B0VBOTH001 is not listed in .*split.dress.val.json",
    ),
    "fashioniq captions": (
        "fashioniq", "captions/cap.shirt.val.json", _set([1, "captions"], ["one"]),
        r"cap.shirt.val.json record 1: captions is \('one',\), expected two texts",
    ),
    "fashioniq twice": (
        "fashioniq", "image_splits/split.toptee.val.json", _set([1], "B0VT000000"),
        "split.toptee.val.json: lists an image twice",
    ),
    "fashioniq number": (
        "fashioniq", "image_splits/split.toptee.val.json", _set([1], 3), "lists 3, expected names",
    ),
    "genecis empty": ("genecis", "genecis/focus_object.json", lambda c: [], "has no records"),
    "genecis box": (
        "genecis", "genecis/focus_attribute.json", _set([0, "target", "instance_bbox"], [1, 2]),
        r"focus_attribute.json record 0: instance_bbox is \[1, 2\], expected \[x, y, width, height",
    ),
    "genecis crop": (
        "genecis", "genecis/focus_attribute.json",
        _set([0, "target", "instance_bbox"], [200, 5, 9, 9]),
        r"VG_100K_all/2.jpg: the box \(200, 5, 9, 9\) is empty or outside the image of 32 x 32",
    ),
    "object class": (
        "coco_object", INSTANCES, _set(["annotations", 2, "category_id"], 77),
        "annotation 2: image_id 1002 or category_id 77 is not listed",
    ),
    "object box": (
        "coco_object", INSTANCES, _set(["annotations", 2, "bbox"], [1]),
        r"annotation 2: bbox is \[1",
    ),
    "object size": (
        "coco_object", INSTANCES, _set(["images", 1, "width"], 640),
        "000000001002.jpg: 32 x 32 pixels, the annotations say 640 x 32",
    ),
    "object mask": (
        "coco_object", INSTANCES, _set(["annotations", 2, "segmentation"], {"counts": "?"}),
        "000000001002.jpg: segmentation cannot be drawn",
    ),
    "captions query": (
        "coco_captions", f"{ECCV}/cxc_image_to_caption.json", _set(["55"], [0]),
        "cxc_image_to_caption.json query 55: is no image or caption of the test split",
    ),
    "captions ids": (
        "coco_captions", f"{ECCV}/cxc_caption_to_image.json", _set(["0"], ["x"]),
        "cxc_caption_to_image.json query 0: holds .*expected a list of ids",
    ),
    "captions twice": (
        "coco_captions", "dataset_coco.json", _set(["images", 0, "sentences", 1, "sentid"], 0),
        "caption 0 is there twice",
    ),
    "captions unknown": (
        "coco_captions", "dataset_coco.json", _set(["images", 0, "sentences", 1, "sentid"], 5),
        "coco_test_ids.npy: caption 7 is not in .*dataset_coco.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_annotations_are_refused(tmp_path, name):
    dataset, file, change, message = BAD[name]
    if dataset == "coco_object":
        pytest.importorskip("pycocotools")
    source = copy(dataset, tmp_path)
    edit(source / file, change)
    with pytest.raises(DataError, match=message):
        build.prepare(dataset, None, tmp_path / "data", source=source, allow_partial=True)
    built = [f.parents[1].name for f in (tmp_path / "data").rglob("dataset_info.json")]
    assert "queries" not in built and "captions" not in built


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("circo", "annotations/val.json"),
        ("circo", INFO),
        ("cirr", "cirr/image_splits/split.rc2.val.json"),
        ("fashioniq", "captions/cap.shirt.val.json"),
        ("genecis", "genecis/change_attribute.json"),
        ("coco_captions", f"{ECCV}/eccv_caption_to_image.json"),
        ("coco_captions", f"{ECCV}/coco_test_ids.npy"),
    ],
)
def test_truncated_files_are_named(tmp_path, dataset, file):
    source = copy(dataset, tmp_path)
    (source / file).write_bytes((source / file).read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{Path(file).name}: not readable"):
        build.survey(dataset, source, Options(decode="never"))


def test_gallery_file_that_is_missing(tmp_path):
    source = copy("circo", tmp_path)
    (source / INFO).unlink()
    with pytest.raises(DataError, match="image_info_unlabeled2017.json: no such file"):
        build.survey("circo", source)


def test_undecodable_attribute_image_is_named(tmp_path):
    source = copy("genecis", tmp_path)
    (source / "VG_100K_all" / "3.jpg").write_bytes(b"no image")
    kwargs = {"source": source, "allow_partial": True, "decode": False}
    with pytest.raises(DataError, match="VG_100K_all/3.jpg: not a readable image"):
        build.prepare("genecis", None, tmp_path / "data", **kwargs)
