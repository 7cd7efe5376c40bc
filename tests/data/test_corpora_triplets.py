"""Triplet corpora: what their readers find in good and in damaged files."""

import json
from pathlib import Path

import pytest

from cir_jax.errors import DataError
from data import corpus
from data.image_triplets import readers as triplet_readers
from tests.data.corpora import jpeg, records, report, write_tar

DATA = Path(__file__).resolve().parents[2] / "data"
ANNOTATIONS = DATA.parents[1] / "shared" / "annotations"


def test_text_triplets_in_either_naming():
    found = records("text_triplets", DATA / "text_triplets/dummy")
    assert found[0]["reference_caption"] == "automobile model"
    assert found[0]["text"] == "without automobile"
    assert (
        found[2]["text"] == "turn red into blue" and found[2]["target_caption"] == "a blue square"
    )


def test_damaged_text_triplets(tmp_path):
    good = '{"source_caption": "a", "target_caption": "b", "relative_caption": "c"}'
    lines = [good, good[:-5], '{"source_caption": "a"}', "", good.replace('"b"', '""')]
    lines += [good.replace('"c"', "3"), good, good]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = report("text_triplets", tmp_path)
    assert found.counts == {"text triplets": 3, "entries with an empty text dropped": 1}
    assert "a.jsonl line 2: not valid JSON" in found.problems[0]
    assert (
        "a.jsonl line 3: no column for target_caption (target_caption or output), text"
        in found.problems[1]
    )
    assert "a.jsonl line 6: text is 3, expected a text" in found.problems[2]
    assert found.lost == {"text triplets": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"reference_caption": "a"}', r"line 1: no column for target_caption .*text .*--columns"),
        ('{"source": "a", "target": "b"}', "The columns are: source, target"),
        (
            '{"source_caption": "", "target_caption": "b", "relative_caption": "c"}\n'
            '{"source_caption": "a", "target_caption": " ", "relative_caption": "c"}\n'
            '{"source_caption": "a", "target_caption": "b", "relative_caption": null}',
            r"only 0 of 3 entries can be used \(0 unusable, 3 with an empty text\)",
        ),
        ('["a", "b", "c"]', r"only 0 of 3 entries .*a.json record 0: is 'a', expected an object"),
        ('[{"source_caption": "a", "target', "a.json record 0: malformed or cut off"),
        ("", "a.json: is empty"),
    ],
)
def test_files_that_hold_no_text_triplets(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=f"(?s){message}"):
        report("text_triplets", tmp_path)


def test_image_triplets_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"src": {"bytes": jpeg(i), "path": None}, "edited": jpeg(i + 1), "how": f"step {i}"}
        for i in range(9)
    ]
    rows[4]["src"] = {"bytes": None, "path": "a.jpg"}
    rows[5]["edited"] = b"no image"
    rows[6]["how"] = ""
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(DataError, match="reference .*target .*text.*: src, edited, how"):
        report("image_triplets", tmp_path)
    columns = {"reference": "src", "target": "edited", "text": "how"}
    found = report("image_triplets", tmp_path, columns=columns)
    assert found.counts["triplets"] == 6 and len(found.problems) == 2
    assert "row 4: reference is {'bytes': None" in found.problems[0]
    assert "row 5: target is no readable image" in found.problems[1]
    options = {"decode": "survey", "columns": columns}
    kept = records("image_triplets", tmp_path, **options)
    assert [r["text"] for r in kept] == [f"step {i}" for i in (0, 1, 2, 3, 7, 8)]
    assert kept[0]["reference"] == jpeg(0) and kept[0]["target"] == jpeg(1)
    assert kept[0]["texts"] == ["step 0"] and kept[0]["reference_caption"] == ""
    for start in range(7):
        assert records("image_triplets", tmp_path, start, **options) == kept[start:]


def test_image_triplets_in_tar_files(tmp_path):
    meta = json.dumps({"edit": "turn it blue"}).encode()
    files = [("1.in.jpg", jpeg(1)), ("1.out.jpg", jpeg(2)), ("1.json", meta)]
    write_tar(tmp_path / "0.tar", files)
    with pytest.raises(DataError, match="in.jpg, out.jpg, json, json.edit"):
        report("image_triplets", tmp_path)
    columns = {"reference": "in.jpg", "target": "out.jpg", "text": "json.edit"}
    (record,) = records("image_triplets", tmp_path, columns=columns)
    assert record["text"] == "turn it blue" and record["target"] == jpeg(2)
    columns["target"] = "json.edit"
    with pytest.raises(DataError, match="column json.edit is no file"):
        report("image_triplets", tmp_path, columns=columns)


def fashioniq(folder, names="abcd"):
    for kind in ("captions", "image_splits", "images"):
        (folder / kind).mkdir(parents=True)
    for category in ("dress", "shirt", "toptee"):
        queries = [
            {"candidate": names[0], "target": names[1], "captions": [" is Red.", "and long ,"]},
            {"candidate": names[2], "target": names[0], "captions": ["", f"{category}"]},
        ]
        (folder / f"captions/cap.{category}.train.json").write_text(json.dumps(queries))
        listed = json.dumps(list(names))
        (folder / f"image_splits/split.{category}.train.json").write_text(listed)
    for i, name in enumerate(names):
        (folder / "images" / f"{name}.{'png' if i % 2 else 'jpg'}").write_bytes(jpeg(i))


def test_fashioniq_train(tmp_path):
    fashioniq(tmp_path)
    found = records("image_triplets", tmp_path)
    assert len(found) == 6
    assert found[0]["text"] == "is Red and and long"  # "and long" is how the caption begins
    assert found[0]["texts"] == [" is Red.", "and long ,"]
    assert found[0]["reference"] == jpeg(0) and found[0]["target"] == jpeg(1)
    assert [r["text"] for r in found[1::2]] == ["dress", "shirt", "toptee"]
    (tmp_path / "images" / "c.jpg").unlink()
    problems = report("image_triplets", tmp_path).problems
    assert len(problems) == 3 and "cap.dress.train.json record 1: " in problems[0]
    (tmp_path / "captions/cap.shirt.train.json").write_text("[{]")
    with pytest.raises(DataError, match="cap.shirt.train.json"):
        report("image_triplets", tmp_path)
    (tmp_path / "captions/cap.shirt.train.json").unlink()
    with pytest.raises(DataError, match="cap.shirt.train.json: no such file"):
        report("image_triplets", tmp_path)


def test_cirr_train(tmp_path):
    (tmp_path / "captions").mkdir()
    (tmp_path / "image_splits").mkdir()
    (tmp_path / "train" / "34").mkdir(parents=True)
    names = [f"train-{i}-0-img0" for i in range(6)]
    for i, name in enumerate(names):
        (tmp_path / "train" / "34" / f"{name}.png").write_bytes(jpeg(i))
    paths = {name: f"./train/34/{name}.png" for name in names}
    (tmp_path / "image_splits" / "split.rc2.train.json").write_text(json.dumps(paths))
    query = {
        "pairid": 7,
        "reference": names[1],
        "target_hard": names[3],
        "target_soft": {names[3]: 1.0},
        "caption": "Two of them. ",
        "img_set": {"id": 1, "members": names},
    }
    file = tmp_path / "captions" / "cap.rc2.train.json"
    file.write_text(json.dumps([query]))
    (record,) = records("image_triplets", tmp_path)
    assert record["text"] == "Two of them. " and record["texts"] == ["Two of them. "]
    assert record["reference"] == jpeg(1) and record["target"] == jpeg(3)
    file.write_text(json.dumps([query | {"target_hard": "train-9-0-img0"}]))
    with pytest.raises(DataError, match="pairid 7.*train-9-0-img0 is in no list"):
        report("image_triplets", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="no real annotation files here")
def test_fashioniq_train_annotations_are_read_in_full(monkeypatch):
    """Their images are not there: only the texts and names are looked at."""
    monkeypatch.setattr(corpus, "stat_image", lambda path: ("", ()))
    found = report("image_triplets", ANNOTATIONS / "fashioniq", decode="never")
    assert found.counts == {"triplets": 18000} and found.complete


def test_many_problems_are_counted_but_not_all_kept(tmp_path):
    lines = ['{"text": "a"}'] * 1100 + ["{"] * 1050
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = report("texts", tmp_path)
    assert found.lost == {"texts": 1050} and len(found.problems) == 1001
    assert found.problems[-1] == "and 50 more entries"


def test_no_triplets(tmp_path):
    with pytest.raises(DataError, match="holds no image triplets.*\n.*\n.*FashionIQ"):
        report("image_triplets", tmp_path)
    with pytest.raises(DataError, match="no .parquet or .tar"):
        triplet_readers.find(tmp_path, {"text": "a"})
