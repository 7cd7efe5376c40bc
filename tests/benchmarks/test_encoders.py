"""The benchmark of the encoders: it runs, and the recorded result is whole."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import encoders

SIDE = {"seconds", "fastest_s", "per_second", "rate", "extra_mb", "error"}
ALWAYS = {"model", "dtype", "kind", "batch"}
MEASURED = {"jax", "torch", "missing", "ratio", "ratio_fastest", "rounds"}


def check(measured):
    head = {"date", "command", "machine", "versions", "settings", "matrix_rate"}
    assert head | {"cells"} == set(measured) - {"resumed"}
    assert all(set(run) == head for run in measured.get("resumed", ()))
    assert measured["machine"].keys() == {"device", "platform", "cpu", "threads", "load_before"}
    assert measured["versions"].keys() >= {"python", "jax", "jaxlib", "torch", "transformers"}
    for cell in measured["cells"]:
        assert set(cell) >= ALWAYS | ({"skipped"} if "skipped" in cell else MEASURED)
        assert ("length" in cell) == (cell["kind"] != "image")
        if "skipped" in cell:
            assert "over the limit of" in cell["skipped"]
            continue
        present = [side for side in encoders.SIDES if side in cell]
        assert {*present, *cell["missing"]} == set(encoders.SIDES)
        assert all(cell["missing"].values()) and not set(present) & set(cell["missing"])
        assert set(cell["ratio"]) == set(present) - {"jax"}
        for side in present:
            extra = {"jax": {"share", "compile_s"}, "torch": {"share"}}.get(side, {"compile_s"})
            assert set(cell[side]) == SIDE | extra
            assert cell[side]["error"] < encoders.TOLERANCE[cell["dtype"]]
            assert cell[side]["fastest_s"] <= cell[side]["seconds"]
            rate = cell["batch"] / cell[side]["seconds"]
            assert cell[side]["per_second"] == pytest.approx(rate, rel=1e-2)
            ratio = cell[side]["seconds"] / cell["jax"]["seconds"]
            assert side == "jax" or cell["ratio"][side] == pytest.approx(ratio, rel=1e-2)


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
    assert len(exact) >= 15 and all(cell["ratio"]["torch"] >= 1 for cell in exact)
    # every cell has its line in the table, the skipped ones with the reason
    lines = [line for line in encoders.table(measured) if line.startswith("|")]
    assert len(lines) == 2 + len(cells)
    assert sum("skipped: expected" in line for line in lines) == len(cells) - sum(
        "ratio" in cell for cell in cells.values()
    )


def test_the_table_names_what_is_missing_and_the_fastest_other():
    seconds = {"jax": 2.0, "torch": 4.0, "onnxruntime": 1.0}
    side = {"share": 0.5, "extra_mb": None, "compile_s": 1.0}
    cell = {"model": "tiny", "dtype": "float32", "kind": "image", "batch": 4}
    cell |= {name: side | {"per_second": 4 / s} for name, s in seconds.items()}
    cell["ratio"] = {"torch": 2.0, "onnxruntime": 0.5}
    cell["missing"] = {"compile": "its features differ by 1.0e+00"}
    _, _, row, _, reason = encoders.table({"cells": [cell]})
    assert row.startswith(
        "| tiny | float32 | image | 4 | 2.0 | 1.0 | missing | 4.0 | 2.00 | **0.50**"
    )
    assert reason == "* missing: compile, tiny float32: its features differ by 1.0e+00"


def test_a_side_that_fails_or_dies_is_missing_with_the_reason(tmp_path):
    """Not known, not able, dead: the others answer, and the next model revives it."""
    workers = {side: encoders.Worker(side, 1, tmp_path) for side in ("jax", "nothing")}
    try:
        missing = {}
        about = encoders.ask(workers, missing, "about", dtypes=["float32"])
        assert about.keys() == {"jax"} and about["jax"]["platform"] == "cpu"
        assert missing == {"nothing": "KeyError: 'nothing'"}
        with pytest.raises(encoders.SideMissing, match="AttributeError: .* no attribute 'dance'"):
            workers["jax"]("dance")
        workers["jax"].process.kill()
        with pytest.raises(encoders.SideMissing, match="process ended with status -9 at about"):
            workers["jax"]("about", dtypes=[])
        workers["jax"].revive()
        assert workers["jax"]("about", dtypes=[])["platform"] == "cpu"
    finally:
        for worker in workers.values():
            worker.close()


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
    command += ["--batches=2,10000000", f"--output={output}"]
    sides = ("jax", "torch", "onnxruntime")  # torch.compile takes half a minute of g++
    if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "onnxscript")):
        sides = sides[:2]
    done = subprocess.run([*command, f"--sides={','.join(sides)}"], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    measured = json.loads(output.read_text())
    check(measured)
    assert [cell["batch"] for cell in measured["cells"]] == 3 * [2, 10_000_000]
    assert ["skipped" in cell for cell in measured["cells"]] == 3 * [False, True]
    assert all(
        cell["missing"].keys() == set(encoders.SIDES) - set(sides)
        for cell in measured["cells"][::2]
    )
    assert "skipped: expected" in done.stdout and measured["cells"][0]["jax"]["compile_s"] > 0


class Instant:
    """A side that computes nothing, in the place of `encoders.Worker`."""

    def __init__(self, side, threads, directory):
        self.side, self.features = side, directory / f"{side}.npy"

    def __call__(self, do, **request):
        if do == "prepare":
            np.save(self.features, np.ones(3))
            compiled = {"compile_s": 1.0} if self.side == "jax" else {}
            return {"pass_s": 1.0, "extra_mb": None} | compiled
        about = {"platform": "cpu", "device": "none", "settings": {}}
        config = encoders.complete(encoders.MODELS["tiny"])
        config["text_config"] |= {"eos_token_id": 99}
        return {"about": about, "matrix": 1e9, "make": config, "load": None, "time": 0.5}[do]

    def revive(self):
        pass

    close = revive


def test_another_batch_is_added_to_what_was_measured(monkeypatch):
    """What was measured stands, and so does what is still too long."""
    monkeypatch.setattr(encoders, "Worker", Instant)
    plan = [["tiny"], ["float32"], ["jax", "torch"]]
    given = dict(threads=1, seconds=0.0, limit=20.0, write=lambda so_far: None)
    first = encoders.run(*plan, [2, 10_000_000], **given)
    check(first)
    assert ["skipped" in cell for cell in first["cells"]] == 3 * [False, True]
    again = encoders.run(*plan, [3, 10_000_000], before=first, **given)
    check(again)
    assert [c for c in again["cells"] if c["batch"] == 2] == first["cells"][::2]
    assert sorted(c["batch"] for c in again["cells"]) == sorted(3 * [2, 3, 10_000_000])
    assert [run["date"] for run in again["resumed"]] == [first["date"]]


def test_only_a_record_of_this_machine_and_these_versions_is_resumed(tmp_path):
    same = {"versions": {"jax": "1"}, "settings": {}, "machine": {"cpu": "a", "load_before": 0.1}}
    key = ("tiny", "float32", "image", 4)
    cell = dict(zip(("model", "dtype", "kind", "batch"), key, strict=True))
    before, now = same | {"cells": [cell]}, same | {"machine": {"cpu": "a", "load_before": 9.0}}
    assert encoders.resumable(before, now) == {key: cell} and now["resumed"] == [same]
    with pytest.raises(SystemExit, match="the record is of another versions: .*'jax': '1'"):
        encoders.resumable(before | {"versions": {"jax": "0"}}, dict(now))
    script, absent = Path(encoders.__file__), tmp_path / "none.json"
    command = [sys.executable, str(script), "--resume", f"--output={absent}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "Leave --resume out for a first run" in done.stderr


def test_unknown_model_is_named():
    script = Path(encoders.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--models=ViT-B"], capture_output=True, text=True
    )
    assert done.returncode and "unknown ViT-B; there are ViT-B/32, ViT-L/14" in done.stderr
