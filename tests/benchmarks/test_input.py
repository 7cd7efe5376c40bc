"""benchmarks/input.py: what it measures, and the numbers that are committed."""

import json

import pytest

from benchmarks import input as reading

REPORT = json.loads((reading.ROOT / "benchmarks" / "input.json").read_text())
README = (reading.ROOT / "benchmarks" / "README.md").read_text()


def test_it_measures_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "SIZES", ((96, 64), (640, 480)))
    found = reading.pipelines(tmp_path, 4)
    whole, reduced = (found["jpeg_640x480"][way].example() for way in ("whole", "reduced"))
    assert whole["target_images"].shape == reduced["target_images"].shape == (4, 224, 224, 3)
    assert (whole["target_images"] != reduced["target_images"]).any()
    memory, disk = (found["features"][way].example() for way in ("memory", "disk"))
    assert (memory["target_features"] == disk["target_features"]).all()
    got = reading.rates(found["features"], batches=1, repeats=1)
    assert list(got) == ["memory", "disk"] and min(got.values()) > 0
    # ViT-L/14: 162 billion products and sums of an image
    assert reading.needs()["ViT-L/14"]["H100"] == pytest.approx(0.4 * 989e12 / 162e9, rel=0.01)


def test_the_readme_has_the_committed_numbers():
    assert reading.table(REPORT) in README and reading.needs_table(REPORT) in README
    for count, milliseconds in REPORT["texts_ms"].items():
        assert f"{milliseconds} ms for {count}" in README
    times = REPORT["per_core"]["jpeg_640x480"]
    assert f"{times['reduced'] / times['whole']:.1f} times as many of 640 x 480" in (
        (reading.ROOT / "docs" / "training.md").read_text()
    )


def test_what_was_gained():
    rates = REPORT["per_core"]
    assert rates["jpeg_640x480"]["reduced"] > 1.4 * rates["jpeg_640x480"]["whole"]
    assert rates["jpeg_1280x960"]["reduced"] > 2 * rates["jpeg_1280x960"]["whole"]
    # rows from the disk take little more
    assert rates["features"]["disk"] > 0.8 * rates["features"]["memory"]
