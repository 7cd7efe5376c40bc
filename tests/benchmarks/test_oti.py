"""benchmarks/oti.py at a small size: both sides compute the same losses."""

import argparse
import functools

import pytest

pytest.importorskip("torch")

from benchmarks import oti


@pytest.mark.slow
def test_both_sides_compute_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(oti, "CONCEPTS", 15)
    monkeypatch.setattr(oti, "PHRASES", 2)
    rate = functools.partial(oti.matrix_gflops, size=64)
    monkeypatch.setattr(oti, "matrix_gflops", rate)
    args = argparse.Namespace(
        platform="cpu", batch=2, iterations=2, rounds=1, layers=1, width=64, output=tmp_path
    )
    report = oti.measure(args, tmp_path)  # asserts the losses
    assert report["largest_loss_difference"] < 1e-4
    assert set(report["results"]) == {
        "cir_jax", "cir_jax, cached phrases", "pytorch, frozen", "pytorch, released",
    }  # fmt: skip
    assert all(side["seconds_per_iteration"] > 0 for side in report["results"].values())
    assert report["results"]["pytorch, released"]["saved_for_backward_mib"] >= 0
