"""benchmarks/query.py: what it counts, and the numbers that are committed."""

import json

import pytest

from benchmarks import query


def test_it_counts_and_times(tmp_path):
    rows = query.measure(["mobilenetv2_100"], 64, 2)
    (row,) = rows.values()
    assert row["parameters_m"] == pytest.approx(3.5, abs=0.05) and row["milliseconds"] > 0
    # that many fewer pixels than at 224, as many tokens
    assert row["multiply_adds_g"] == pytest.approx(0.35 * (64 / 224) ** 2 + 0.006, rel=0.2)
    assert "| mobilenetv2_100 | 3.5 (3.5) | 0.03 (0.35) |" in query.table(rows)


def test_the_committed_numbers_are_table_1s():
    rows = json.loads((query.ROOT / "benchmarks" / "query.json").read_text())["rows"]
    assert list(rows) == list(query.PAPER)
    for name, (adds, parameters, _) in query.PAPER.items():
        assert rows[name]["multiply_adds_g"] == pytest.approx(adds, rel=0.06), name
        assert rows[name]["parameters_m"] == pytest.approx(parameters, rel=0.07), name
    large = rows.pop("blip")["milliseconds"]
    assert all(row["milliseconds"] < large for row in rows.values())
    readme = (query.ROOT / "benchmarks" / "README.md").read_text()
    assert (
        query.table(json.loads((query.ROOT / "benchmarks" / "query.json").read_text())["rows"])
        in readme
    )
