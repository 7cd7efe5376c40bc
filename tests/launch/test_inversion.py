"""The inversion methods from start to end, on the tiny world."""

import json
import signal
import time

import pytest

from cir_jax.training import logs
from tests.launch.binaries import run, start

pytestmark = pytest.mark.slow

LESS = ("--config.evaluation.benchmarks=('shapes_tiny/circo',)",)


def results(workdir):
    found = json.loads((workdir / "results.json").read_text())["results"]
    return {r["method"]: r["metrics"] for r in found}


def losses(workdir, stage):
    return [(row["step"], row["loss"]) for row in logs.read(workdir / stage / "metrics.jsonl")]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.parametrize("name", ["rtd", "lincir"])
def test_smoke(name, scratch, tmp_path):
    flags = (f"--config=experiments/{name}.py:smoke", *LESS)
    if name == "rtd":  # around pic2word; as the papers' presets: this is training's type alone
        flags += ("--config.dtype=bfloat16", "--config.stage.rtd.batch_size=8")
    if name == "lincir":  # as its release chooses
        flags = (*flags, "--config.checkpoint.best=shapes_tiny/cirr R@1")
    exported = tmp_path / "exported"
    status, output = run(
        "main",
        *flags,
        f"--workdir={tmp_path / 'run'}",
        f"--config.export_to={exported}",
        scratch=scratch,
    )
    assert status == 0, output
    files = f"{exported}.word,{exported}" if name == "rtd" else exported
    status, output = run(
        "eval",
        *flags,
        f"--workdir={tmp_path / 'again'}",
        f"--config.init_from=official:{files}",
        scratch=scratch,
    )
    assert status == 0, output
    trained, read = results(tmp_path / "run"), results(tmp_path / "again")
    stored = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert {r["setting"]["dtype"] for r in stored} == {"float32"}
    if name == "lincir":
        rows = logs.read(tmp_path / "run" / "smp" / "metrics.jsonl")
        assert [row["step"] for row in rows if "val/shapes_tiny/cirr R@1" in row] == [4, 8]
    assert trained == read and 0 <= trained[name]["mAP@10"]["value"] <= 100


def test_searle_killed_and_resumed(scratch, tmp_path):
    flags = ("--config=experiments/searle.py:smoke", *LESS)
    status, output = run("main", *flags, f"--workdir={tmp_path / 'whole'}", scratch=scratch)
    assert status == 0, output
    workdir, log = tmp_path / "killed", tmp_path / "log"
    process = start("main", *flags, f"--workdir={workdir}", scratch=scratch, log=log)
    while process.poll() is None and not (workdir / "oti" / "words_00000.array_record").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (workdir / "results.json").exists()
    status, output = run("main", *flags, f"--workdir={workdir}", scratch=scratch)
    assert status == 0, output
    assert losses(workdir, "distil") == losses(tmp_path / "whole", "distil")
    assert results(workdir) == results(tmp_path / "whole")
