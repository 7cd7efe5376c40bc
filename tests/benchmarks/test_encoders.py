"""The benchmark of the encoders: it runs, and the recorded result is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import encoders

SIDE = {"seconds", "fastest_s", "per_second", "share", "extra_mb"}
ALWAYS = {"model", "dtype", "kind", "batch"}
MEASURED = {*encoders.SIDES, "ratio", "ratio_fastest", "error", "rounds"}


def check(measured):
    assert {"date", "command", "machine", "versions", "settings", "matrix_rate", "cells"} == set(
        measured
    )
    assert measured["machine"].keys() == {"device", "platform", "cpu", "threads", "load_before"}
    assert measured["versions"].keys() >= {"python", "jax", "jaxlib", "torch", "transformers"}
    for cell in measured["cells"]:
        assert set(cell) >= ALWAYS | ({"skipped"} if "skipped" in cell else MEASURED)
        assert ("length" in cell) == (cell["kind"] != "image")
        if "skipped" in cell:
            assert "over the limit of" in cell["skipped"]
            continue
        assert cell["error"] < encoders.TOLERANCE[cell["dtype"]]
        assert set(cell["torch"]) == SIDE and set(cell["jax"]) == SIDE | {"compile_s"}
        for side in encoders.SIDES:
            assert cell[side]["fastest_s"] <= cell[side]["seconds"]
            rate = cell["batch"] / cell[side]["seconds"]
            assert cell[side]["per_second"] == pytest.approx(rate, rel=1e-2)
            assert measured["matrix_rate"][cell["dtype"]][side] > 0


def test_the_recorded_result_is_whole():
    measured = json.loads((encoders.ROOT / "benchmarks" / "encoders.json").read_text())
    check(measured)
    cells = {(c["model"], c["dtype"], c["kind"], c["batch"]): c for c in measured["cells"]}
    assert set(cells) == {
        (model, dtype, kind, batch)
        for model in ("ViT-B/32", "ViT-L/14")
        for dtype in encoders.TOLERANCE
        for kind in encoders.KINDS
        for batch in (1, 32, 256)
    }
    # the target: on CPU in float32 at least as fast as PyTorch, wherever both were measured
    exact = [c for key, c in cells.items() if key[1] == "float32" and "skipped" not in c]
    assert len(exact) >= 15 and all(cell["ratio"] >= 1 for cell in exact)
    # every cell has its line in the table, the skipped ones with the reason
    lines = list(encoders.table(measured))
    assert len(lines) == 2 + len(cells)
    assert sum("skipped: expected" in line for line in lines) == len(cells) - sum(
        "ratio" in cell for cell in cells.values()
    )


def test_operations_are_counted():
    """ViT-B/32's image tower: 4.4 G multiply-adds in the literature (arXiv 2103.00020, fig. 10)."""
    config = {
        "projection_dim": 512,
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "image_size": 224,
            "patch_size": 32,
        },
    }
    assert encoders.flops(config, "image", 0) / 2e9 == pytest.approx(4.4, abs=0.1)


@pytest.mark.peer
def test_it_runs_and_says_what_it_skips(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    output = tmp_path / "result.json"
    script = Path(encoders.__file__)
    command = [sys.executable, str(script), "--models=tiny", "--quick", "--dtypes=float32"]
    done = subprocess.run(
        [*command, "--batches=2,10000000", f"--output={output}"], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    measured = json.loads(output.read_text())
    check(measured)
    assert [cell["batch"] for cell in measured["cells"]] == 3 * [2, 10_000_000]
    assert ["skipped" in cell for cell in measured["cells"]] == 3 * [False, True]
    assert "skipped: expected" in done.stdout and measured["cells"][0]["jax"]["compile_s"] > 0


def test_unknown_model_is_named():
    script = Path(encoders.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--models=ViT-B"], capture_output=True, text=True
    )
    assert done.returncode and "unknown ViT-B; there are ViT-B/32, ViT-L/14" in done.stderr
