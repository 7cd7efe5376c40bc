"""benchmarks/joint.py at a small size: both sides compute the same losses, step after step."""

import argparse
import functools
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import joint, oti


@pytest.mark.slow
def test_both_sides_compute_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "LEARNING_RATE", 1e-3)  # so that updates show in the losses
    small = {"hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 2}
    monkeypatch.setattr(joint, "IMAGE", small)
    monkeypatch.setattr(joint, "PROJECTION", 12)
    monkeypatch.setattr(joint, "HIDDEN", 16)
    rate = functools.partial(oti.matrix_gflops, size=64)
    monkeypatch.setattr(oti, "matrix_gflops", rate)
    args = argparse.Namespace(
        platform="cpu", batch=4, steps=3, rounds=1, layers=1, width=64, output=tmp_path
    )
    report = joint.measure(args, tmp_path)  # asserts the losses
    assert set(report["methods"]) == {"rtd", "tat", "combiner"}
    for found in report["methods"].values():
        assert found["largest_loss_difference"] < 1e-4
        assert min(found["seconds_per_step"].values()) > 0 and found["speedup"] > 0


def test_the_readme_has_the_committed_numbers():
    folder = Path(joint.__file__).parent
    report = json.loads((folder / "joint.json").read_text())
    said = " ".join((folder / "README.md").read_text().split())
    for name, found in report["methods"].items():
        ours, theirs = found["seconds_per_step"].values()
        times = re.escape(f"({found['speedup']:.1f} times)")
        assert re.search(
            f"{name} {ours:.1f}( s)? where (PyTorch|it) takes {theirs:.1f} {times}", said, re.I
        )
    assert f"{report['machine']['matrix_gflops']['jax']} GFLOP/s that matrix products reach" in said
