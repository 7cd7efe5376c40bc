"""benchmarks/objectives.py: the two objectives, and a run of it at a small size."""

import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import objectives


def test_objectives(tiny):
    target = jax.random.normal(jax.random.key(0), (6, tiny[0].dim))

    def loss(objective, predicted):
        composer = objectives.Perceptron(tiny[0], objective)
        return float(composer.objective({}, {"predicted": predicted, "target": target})[0])

    assert loss("squared error", target + 2) == pytest.approx(4, rel=1e-5)
    # the direction alone, and whose it is
    right = loss("InfoNCE", target)
    assert loss("InfoNCE", 3 * target) == pytest.approx(right, rel=1e-4)
    assert right < np.log(6) < loss("InfoNCE", target[::-1])


@pytest.mark.slow
def test_it_scores_on_val_while_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CIR_JAX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(objectives, "STEPS", 20)
    monkeypatch.setattr(objectives, "EVERY", 10)
    monkeypatch.setattr(objectives, "OBJECTIVES", objectives.OBJECTIVES[1:])
    monkeypatch.setattr(objectives, "SEEDS", (0, 1))
    output = tmp_path / "objectives.json"
    monkeypatch.setattr(sys, "argv", ["objectives", "--preset=smoke", f"--output={output}"])
    objectives.main()
    measured = json.loads(output.read_text())
    assert list(measured["mAP@10"]) == ["10", "20"]
    for row in measured["mAP@10"].values():
        assert list(row) == list(objectives.OBJECTIVES)
        assert all(len(set(values)) == 2 and max(values) <= 100 for values in row.values())
    assert 0 < measured["slerp"] <= 100
    assert f"Slerp: {measured['slerp']:.1f}" in capsys.readouterr().out
