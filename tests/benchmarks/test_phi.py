"""benchmarks/phi.py at a small size: both sides compute the same losses, step after step."""

import argparse
import functools

import pytest

pytest.importorskip("torch")

from benchmarks import oti, phi


@pytest.mark.slow
def test_both_sides_compute_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(oti, "CONCEPTS", 15)
    monkeypatch.setattr(oti, "PHRASES", 2)
    # so that updates show in the losses
    monkeypatch.setattr(phi, "LEARNING_RATE", 1e-2)
    sides, alternate = {}, oti.alternate

    def keep(given, *rest):
        sides.update(given)
        return alternate(given, *rest)

    monkeypatch.setattr(oti, "alternate", keep)
    rate = functools.partial(oti.matrix_gflops, size=64)
    monkeypatch.setattr(oti, "matrix_gflops", rate)
    args = argparse.Namespace(
        platform="cpu", batch=6, steps=3, rounds=1, layers=1, width=64, output=tmp_path
    )
    report = phi.measure(args, tmp_path)  # asserts the losses
    assert report["largest_loss_difference"] < 1e-4
    ours = {"cir_jax", "cir_jax, cached phrases"}
    for name in ours:
        losses = sides[name]()
        assert losses.shape == (3,) and losses[0] - losses[2] > 0.01
    assert set(report["results"]) == ours | {"pytorch, frozen", "pytorch, released"}
    assert all(side["images_per_second"] > 0 for side in report["results"].values())
    assert report["results"]["pytorch, released"]["saved_for_backward_mib"] >= 0
