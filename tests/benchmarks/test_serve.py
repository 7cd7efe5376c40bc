"""benchmarks/serve.py: what it measures, and the numbers that are committed."""

import json
from pathlib import Path

from PIL import Image

from tests.library import serving

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures(tmp_path):
    serving.installed()
    from benchmarks import serve

    for year in ("2023", "2024"):
        (tmp_path / year).mkdir()
    found = serve.measure(tmp_path, 100, 16, 5)
    assert set(found) == {"encoding", "both", "filtered", "explained", "about"}
    assert found["encoding"]["ms"] > 0 and found["about"]["cpu_ms"] > 0


def test_the_committed_numbers_keep_what_was_promised():
    report = json.loads((ROOT / "benchmarks" / "serve.json").read_text())
    assert (report["photos"], report["dim"]) == (120_000, 512)
    for query in ("both", "filtered", "explained"):
        assert report[query]["ms"] <= 300, query
    both, explained = report["both"], report["explained"]
    said = (
        f"an answer over 120,000 photos takes {both['ms']:.0f} ms on one core, with what each part "
        f"alone would give {explained['ms']:.0f} ("
    )
    assert said in " ".join((ROOT / "docs" / "search.md").read_text().split())


def test_the_pictures_are_small():
    for name in ("serve.png", "serve_narrow.png"):
        file = ROOT / "benchmarks" / name
        assert file.stat().st_size < 150_000 and Image.open(file).width > 800
