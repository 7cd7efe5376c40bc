"""The real annotation files through the builders, with one tiny image in the place of all.

Skipped where the files are absent: they are not ours to ship.
"""

import functools
import io
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.input.tables import Table
from data import build
from data.circo.circo_dataset_builder import Circo
from tests.data.dummies import rows

ANNOTATIONS = Path(__file__).resolve().parents[3] / "shared" / "annotations"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="no real annotation files here"),
]


@functools.cache
def _pixel(suffix: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (1, 1)).save(data, {".jpg": "JPEG", ".png": "PNG"}[suffix])
    return data.getvalue()


def _source(folder: Path, name: str, into: str, images: Iterable[str]) -> Path:
    """A dataset's folder with the real annotations, and every image a link to the same file."""
    (folder / into).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(ANNOTATIONS / name, folder / into)
    firsts: dict[str, Path] = {}
    for image in images:
        path = folder / image
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix not in firsts:
            path.write_bytes(_pixel(path.suffix))
            firsts[path.suffix] = path
        else:
            os.link(firsts[path.suffix], path)
    return folder


def _json(name: str):
    return json.loads((ANNOTATIONS / name).read_text())


def _complete(data_dir: Path, dataset: str) -> dict[str, bool]:
    mark = build.table_dir(dataset, "queries", data_dir) / build.MARK
    return {s: v["complete"] for s, v in json.loads(mark.read_text())["splits"].items()}


def test_annotations_of_circo(tmp_path, monkeypatch):
    """All images are counted; those that the annotations name are built."""
    queries = {split: _json(f"circo/{split}.json") for split in ("val", "test")}
    named = {q["reference_img_id"] for split in queries.values() for q in split}
    named |= {i for q in queries["val"] for i in q["gt_img_ids"]}
    others = range(10_000_000, 10_000_000 + 123_403 - len(named))
    source = _source(tmp_path / "CIRCO", "circo", "annotations", ())
    coco = source / "COCO2017_unlabeled"
    (coco / "annotations").mkdir(parents=True)
    (coco / "unlabeled2017").mkdir()
    (coco / "unlabeled2017" / "any.jpg").write_bytes(_pixel(".jpg"))
    info = coco / "annotations" / "image_info_unlabeled2017.json"

    def listed(ids: Iterable[int]) -> None:
        info.write_text(json.dumps({"images": [{"id": i, "file_name": "any.jpg"} for i in ids]}))

    listed([*sorted(named), *others])
    found = build.survey("circo", source, build.Options(decode="never"))
    assert {split: r.complete for split, r in found.reports.items()} == {"val": True, "test": True}
    assert {r.counts["gallery"] for r in found.reports.values()} == {123_403}

    data_dir, count = tmp_path / "data", len(named)
    few = {split: counts | {"gallery": count} for split, counts in Circo.OFFICIAL.items()}
    monkeypatch.setattr(Circo, "OFFICIAL", few)
    listed(sorted(named))
    build.prepare("circo", None, data_dir, source=source, decode=False)
    assert _complete(data_dir, "circo") == {"val": True, "test": True}
    gallery = Table(data_dir, "circo", "gallery", "unlabeled")
    val, test = (rows(data_dir, "circo", "queries", split) for split in ("val", "test"))
    assert (len(val), len(test), len(gallery)) == (220, 800, count)
    assert [r["id"] for r in val] == list(range(220))
    assert [r["id"] for r in test] == list(range(800))
    assert sum(len(r["targets"]) for r in val) == 916
    assert max(len(r["targets"]) for r in val) == 14
    for record, entry in zip(val, queries["val"], strict=True):
        names = [int(gallery[int(p)]["name"]) for p in (record["reference"], *record["targets"])]
        assert names[0] == entry["reference_img_id"] and names[1] == entry["target_img_id"]
        assert names[1:] == entry["gt_img_ids"] and names[0] not in names[1:]
        assert record["texts"] == [entry["relative_caption"].encode()]
        assert record["shared_concept"] == entry["shared_concept"].encode()
    assert not any(r["targets"] or r["aspects"] for r in test)
    assert len({a for r in val for a in r["aspects"]}) == 9

    listed([*sorted(named), 1])
    with pytest.raises(DataError, match=f"{count + 1:,}, official {count:,}"):
        build.prepare("circo", None, tmp_path / "other", source=source, decode=False)


def test_annotations_of_cirr(tmp_path):
    lists = {
        split: _json(f"cirr/image_splits/split.rc2.{split}.json") for split in ("val", "test1")
    }
    images = [path for split in lists.values() for path in split.values()]
    source = _source(tmp_path / "CIRR", "cirr", "cirr", images)
    data_dir = tmp_path / "data"
    build.prepare("cirr", None, data_dir, source=source)
    assert _complete(data_dir, "cirr") == {"val": True, "test1": True}  # no captions of train
    for split, count, images in (("val", 4181, 2297), ("test1", 4148, 2315)):
        queries, gallery = (rows(data_dir, "cirr", t, split) for t in ("queries", "gallery"))
        assert (len(queries), len(gallery)) == (count, images)
        names = [record["name"].decode() for record in gallery]
        assert names == list(lists[split])
        references = set()
        entries = _json(f"cirr/captions/cap.rc2.{split}.json")
        for record, entry in zip(queries, entries, strict=True):
            references.add(int(record["reference"]))
            assert record["id"] == entry["pairid"]
            assert names[record["reference"]] == entry["reference"]
            assert [names[i] for i in record["candidates"]] == entry["img_set"]["members"]
            soft = dict(zip(record["soft_targets"], record["soft_weights"], strict=True))
            assert {names[i]: round(float(w), 6) for i, w in soft.items()} == entry.get(
                "target_soft", {}
            )
            target = [entry["target_hard"]] if split == "val" else []
            assert [names[i] for i in record["targets"]] == target
        assert len(references) == {"val": 2165, "test1": 2178}[split]
        assert len({entry["img_set"]["id"] for entry in entries}) == 503


def test_annotations_of_fashioniq(tmp_path):
    splits = ("train", "val", "test")
    lists = {
        (c, s): _json(f"fashioniq/image_splits/split.{c}.{s}.json")
        for c in ("dress", "shirt", "toptee")
        for s in splits
    }
    asins = {asin for names in lists.values() for asin in names}
    assert len(asins) == 74_381
    images = [f"images/{asin}{'.png' if i % 2 else '.jpg'}" for i, asin in enumerate(sorted(asins))]
    source = _source(tmp_path / "FashionIQ", "fashioniq/captions", "captions", images)
    os.symlink(ANNOTATIONS / "fashioniq" / "image_splits", source / "image_splits")
    found = build.survey("fashioniq", source, build.Options(decode="never"))
    assert {split: report.complete for split, report in found.reports.items()} == dict.fromkeys(
        splits, True
    )
    assert found.reports["train"].counts["queries"] == 18000
    assert found.reports["train"].counts["gallery"] == 45429
    data_dir = tmp_path / "data"
    wanted = splits[1:]
    build.prepare("fashioniq", None, data_dir, source=source, decode=False, splits=wanted)
    for split, queries, images, per_category in (
        ("val", 6016, 15415, (3817, 6346, 5373)),
        ("test", 6118, 15417, (3818, 6346, 5374)),
    ):
        table = rows(data_dir, "fashioniq", "queries", split)
        gallery = rows(data_dir, "fashioniq", "gallery", split)
        assert (len(table), len(gallery)) == (queries, images)
        names, found = [], {b"dress": [], b"shirt": [], b"toptee": []}
        for record in gallery:
            names.append(record["name"].decode())
            for category in record["categories"]:
                found[category].append(names[-1])
        assert tuple(map(len, found.values())) == per_category
        assert all(set(n) == set(lists[c.decode(), split]) for c, n in found.items())
        assert [r["id"] for r in table] == list(range(queries))
        entries = [
            (c, entry)
            for c in ("dress", "shirt", "toptee")
            for entry in _json(f"fashioniq/captions/cap.{c}.{split}.json")
        ]
        for record, (category, entry) in zip(table, entries, strict=True):
            assert record["category"] == category.encode()
            assert [text.decode() for text in record["texts"]] == entry["captions"]
            assert names[record["reference"]] == entry["candidate"]
            target = [entry["target"]] if split != "test" else []
            assert [names[i] for i in record["targets"]] == target


def test_annotations_of_genecis(tmp_path):
    tasks = ("focus_object", "change_object")
    entries = {task: _json(f"genecis/{task}.json") for task in tasks}

    def named(entry: dict) -> list[int]:
        images = (entry["reference"], entry["target"], *entry["gallery"])
        return [image["val_image_id"] for image in images]

    ids = {i for task in entries.values() for entry in task for i in named(entry)}
    images = [f"val2017/{i:012d}.jpg" for i in ids]
    source = _source(tmp_path / "GeneCIS", "genecis", "genecis", images)
    with pytest.raises(DataError, match=r"focus_attribute\.json: is missing"):
        build.prepare("genecis", None, tmp_path / "data", source=source)
    build.prepare("genecis", None, tmp_path / "data", source=source, allow_partial=True)
    assert _complete(tmp_path / "data", "genecis") == {"val": False}
    queries = rows(tmp_path / "data", "genecis", "queries", "val")
    gallery = rows(tmp_path / "data", "genecis", "gallery", "val")
    names = [int(record["name"]) for record in gallery]
    assert Counter(r["category"].decode() for r in queries) == dict.fromkeys(tasks, 1960)
    assert set(names) == ids and len(names) == len(ids)
    sizes = Counter(len(record["candidates"]) for record in queries)
    assert sizes == {15: 3919, 14: 1}  # one query lists its target among the others, too
    for record, entry in zip(
        queries, entries["focus_object"] + entries["change_object"], strict=True
    ):
        expected = named(entry)
        assert names[record["reference"]] == expected[0]
        assert [names[i] for i in record["candidates"]] == list(dict.fromkeys(expected[1:]))
        assert record["targets"] == record["candidates"][:1]
        assert record["texts"] == [entry["condition"].encode()]
