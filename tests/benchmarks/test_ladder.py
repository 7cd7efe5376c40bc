"""benchmarks/ladder.py: what it measures, and the numbers that are committed."""

import json

import numpy as np
import pytest

from benchmarks import ladder


def test_it_measures_what_it_says(tmp_path):
    ladder.prepare(tmp_path, 300, 16)
    asked = ladder.queries(5, 16)
    np.testing.assert_allclose(np.linalg.norm(asked, axis=1), 1, atol=1e-5)
    found = ladder.measured("exact", tmp_path, asked)
    assert found["query_ms"] > 0 and found["open_seconds"] > 0 and found["recall"] == 1
    pytest.importorskip("faiss")
    made = ladder.measured("faiss", tmp_path, asked)
    assert list(made) == ["make_seconds", "make_cpu_seconds"]
    found = ladder.measured("faiss", tmp_path, asked)
    assert found["recall"] == 1 and found["file_mib"] >= 0 and found["lists"] == 1


def test_the_readme_has_the_committed_numbers():
    report = json.loads((ladder.ROOT / "benchmarks" / "ladder.json").read_text())
    assert ladder.table(report) in (ladder.ROOT / "docs" / "search.md").read_text()
    for count, rungs in report["photos"].items():
        assert set(rungs) == set(ladder.RUNGS)
        assert rungs["exact"]["recall"] == rungs["sharded"]["recall"] == 1
        assert rungs["faiss"]["recall"] > 0.95
        assert rungs["faiss"]["query_cpu_ms"] < rungs["exact"]["query_cpu_ms"], count
