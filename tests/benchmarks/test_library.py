"""benchmarks/library.py: what it measures, and the numbers that are committed."""

import json

import numpy as np
import pytest

from benchmarks import library


def test_it_measures_what_it_checks(tmp_path):
    library.prepare(tmp_path, 300, 16)
    asked = library.queries(6, 16)
    found = library.ours(tmp_path, 300, 16, asked)
    assert found["query_ms"] > 0 and found["open_seconds"] > 0
    assert found["memory_mib"] >= 0  # in a process that has grown before, nothing is added
    scores = np.concatenate([piece @ asked[0, 0] for piece in library.vectors(300, 16)])
    order = np.argsort(-scores)[: library.K]
    library.check(asked[0], (order, scores[order]), 300, 16)
    for wrong in ((order[::-1], scores[order]), (order, scores[order] + 0.001)):
        with pytest.raises(AssertionError):
            library.check(asked[0], wrong, 300, 16)


def test_the_committed_numbers_keep_what_was_promised():
    report = json.loads((library.ROOT / "benchmarks" / "library.json").read_text())
    ours, faiss = (report["contenders"][name] for name in ("cir_jax", "faiss"))
    assert (report["photos"], report["dim"]) == (120_000, 512)
    assert ours["query_ms"] <= 30 and ours["open_seconds"] <= 1 and ours["times_float16"] <= 1.5
    readme = (library.ROOT / "docs" / "search.md").read_text()
    said = (
        f"a query of 120,000 photos takes {ours['query_ms']:.0f} ms on one core (FAISS's exact "
        f"index {faiss['query_ms']:.0f}), opening them {ours['open_seconds']:.1f} s"
    )
    assert said in " ".join(readme.split())
