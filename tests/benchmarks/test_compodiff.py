"""benchmarks/compodiff.py at a small size: its transcription of the release is the release."""

import argparse
import json
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import compodiff
from tests.launch.binaries import environment, run_command

TINY = "--size=tiny --batches=2 --steps=2 --rounds=1 --batch=8"
PARTS = ("sampler", "alone", "training")  # test_conditions.py measures the steps: it trains


def test_both_sides_find_the_same_embeddings(capsys):
    args = argparse.Namespace(size="tiny", batches=(3,), steps=(1, 3), rounds=1)
    report = compodiff.measure_sampler(args)  # asserts them
    assert [row["steps"] for row in report["rows"]] == [1, 3]
    for row in report["rows"]:
        assert row["largest_difference"] < 1e-4
        assert min(*row["wall_seconds"].values(), *row["cpu_seconds"].values()) > 0
    assert "batch 3, 3 steps" in capsys.readouterr().out


def test_other_noise_is_seen(monkeypatch):
    args = argparse.Namespace(size="tiny", batches=(2,), steps=(2,), rounds=1)
    drawn = compodiff.drawn
    monkeypatch.setattr(compodiff, "drawn", lambda *args: np.ascontiguousarray(drawn(*args)[::-1]))
    with pytest.raises(AssertionError, match="batch 2, 2 steps: they differ by"):
        compodiff.measure_sampler(args)


@pytest.mark.slow
def test_the_command_measures_the_parts(tmp_path):
    output = tmp_path / "compodiff.json"
    status, text = run_command(
        [
            *(sys.executable, compodiff.__file__, *TINY.split()),
            *(f"--parts={','.join(PARTS)}", f"--output={output}"),
        ],
        environment(tmp_path),
    )
    assert status == 0, text
    found = {part: json.loads(output.read_text())[part]["measured"] for part in PARTS}
    assert len(found["sampler"]["rows"]) == len(found["sampler"]["profile"]) == 1
    alone = found["alone"]
    assert [row["rows"] for row in alone["products"]] == list(compodiff.ROWS)
    for row in (*alone["queries"], *alone["products"]):
        assert set(row["wall_seconds"]) == {"as_trained", "for_one_query"}
    training = found["training"]
    assert (
        training["two, fsdp"]["parameters_mib_per_device"]
        <= training["one device"]["parameters_mib_per_device"]
    )
    assert 0 < training["one device"]["share_of_matrix_rate"] < 1
