"""The binaries from start to end, interrupted, on many devices and in several processes."""

import json
import re
import signal
import time

import numpy as np
import pytest
from PIL import Image

import cir_jax
from cir_jax.errors import CheckpointError
from cir_jax.storage import buckets, lease
from cir_jax.training import checkpoints, logs
from cir_jax.training import workdir as workdirs
from tests import object_store
from tests.launch.binaries import SMOKE, kill_when, run, start, start_together

pytestmark = pytest.mark.slow

LONGER = (  # so that there is time to interrupt, in small steps
    "--config.stage.stage1.duration=24 steps",
    "--config.stage.stage2.duration=24 steps",
    "--config.stage.stage1.batch_size=8",
    "--config.stage.stage2.batch_size=8",
    "--config.evaluation.benchmarks=('shapes_tiny/circo',)",
)


def metrics(workdir):
    results = json.loads((workdir / "results.json").read_bytes())["results"]
    return {(r["benchmark"], r["method"]): r["metrics"] for r in results}


def losses(workdir, stage):
    return [(row["step"], row["loss"]) for row in logs.read(workdir / stage / "metrics.jsonl")]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def finished(scratch, tmp_path_factory):
    """An unbroken run on one device."""
    workdir = tmp_path_factory.mktemp("run") / "compodiff"
    status, output = run(
        "main", f"--config={SMOKE}", f"--workdir={workdir}", *LONGER, scratch=scratch
    )
    assert status == 0, output
    return workdir, output


def test_main_trains_evaluates_and_draws(finished):
    workdir, output = finished
    assert "protocol circo(gallery=all" in output and "compodiff" in output
    found = metrics(workdir)
    for method in ("image_only", "text_only", "image_text", "compodiff"):
        assert 0 <= found["shapes_tiny/circo", method]["mAP@10"]["value"] <= 100
    assert Image.open(workdir / "shapes_tiny_circo.png").width > 1000
    assert [step for step, _ in losses(workdir, "stage1")] == list(range(2, 25, 2))


def test_eval_of_the_workdir_gives_the_same_numbers(finished, scratch):
    workdir, _ = finished
    before = metrics(workdir)
    flags = (f"--config={SMOKE}", f"--workdir={workdir}", *LONGER)
    status, output = run("eval", *flags, scratch=scratch, devices=4)
    assert status == 0, output
    assert metrics(workdir) == before


def test_load_gives_a_search_of_a_folder(finished, tmp_path):
    workdir, _ = finished
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / f"{i}.png")
    search = cir_jax.load(workdir)
    search.index(tmp_path)
    found = search.search(tmp_path / "3.png", "is red", k=3)
    assert len(found) == 3 and len({path for path, _ in found}) == 3
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)


def test_isa_is_trained_and_its_attention_drawn(scratch, tmp_path):
    folder, workdir = tmp_path / "images", tmp_path / "isa"
    (folder / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("b.png", "a.png", "below/c.jpg"):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(folder / name)
    status, output = run(
        "main",
        "--config=experiments/isa.py:smoke",
        "--config.composer.query_encoder=",  # the backbone's tower: compiled in half the time
        "--config.evaluation.benchmarks=()",
        f"--workdir={workdir}",
        scratch=scratch,
    )
    assert status == 0, output
    flags = (f"--workdir={workdir}", f"--output={tmp_path / 'out'}")
    status, output = run("attention", *flags, f"--images={folder}", "--limit=2", scratch=scratch)
    assert status == 0, output
    found = np.load(tmp_path / "out" / "attention.npz")
    assert found["names"].tolist() == [str(folder / "a.png"), str(folder / "b.png")]
    assert len(found["cross"]) == 2
    tile, tokens = 128, found["cross"].shape[1]
    assert Image.open(tmp_path / "out" / "attention.png").width > tile * (1 + tokens)
    status, output = run("attention", *flags, f"--images={workdir / 'distil'}", scratch=scratch)
    assert status == 2 and "no images. Give a folder" in output


def test_interrupted_at_any_moment_the_same_command_ends_with_the_same_numbers(finished, tmp_path):
    """By kill -9, or by a signal, which is answered with a sentence."""
    unbroken, _ = finished
    scratch, workdir = tmp_path / "scratch", tmp_path / "run"
    scratch.mkdir()
    flags = (f"--config={SMOKE}", f"--workdir={workdir}", *LONGER)

    def lines(stage):
        file = workdir / stage / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def writing(stage):
        return any((workdir / stage / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def scraps():
        return {path for root in (workdir, scratch) for path in root.rglob(".*.json.*")}

    moments = (
        (signal.SIGTERM, "while preparing data: finished shards in .*data are kept",
         lambda: any((scratch / "data").rglob(".building/*"))),
        (signal.SIGINT, "stage1: stopped and saved after step [0-9]+", lambda: lines("stage1")),
        (signal.SIGKILL, "", lambda: lines("stage2") >= 6 and writing("stage2")),
        (signal.SIGTERM, "while (evaluating|exporting|running the stages): .* kept",
         (workdir / "stage2" / "checkpoints" / "24").exists),
    )  # fmt: skip
    for i, (number, words, reached) in enumerate(moments):
        log, before = tmp_path / f"log{i}", scraps()
        process = start("main", *flags, scratch=scratch, log=log)
        while process.poll() is None and not reached():
            time.sleep(0.002)
        process.send_signal(number)
        status, said = process.wait(), log.read_text()
        assert status == (-number if number == signal.SIGKILL else 128 + number), said[-3000:]
        assert "Traceback" not in said and not (workdir / "results.json").exists()
        if words:
            assert re.search(words, said.strip().splitlines()[-1]), said[-3000:]
            assert scraps() <= before
    stopped, next_one = ((tmp_path / f"log{i}").read_text() for i in (1, 2))
    step = re.search("saved after step ([0-9]+)", stopped)[1]
    assert f"stage1: resuming after step {step}\n" in next_one
    status, output = run("main", *flags, scratch=scratch)
    assert status == 0, output
    for stage in ("stage1", "stage2"):
        assert losses(workdir, stage) == losses(unbroken, stage)
    assert metrics(workdir) == metrics(unbroken)


def test_in_a_bucket_as_on_a_disk(finished, scratch, tmp_path, monkeypatch):
    """Trained, refused to a second run, killed, resumed, evaluated, loaded, found elsewhere."""
    unbroken, _ = finished
    log = tmp_path / "log"
    with object_store.serving(monkeypatch) as bucket:
        workdir = buckets.place(f"{bucket}/run")
        flags = (f"--config={SMOKE}", f"--workdir={workdir}", *LONGER)

        def half_written():  # behind one of its stage that is whole
            files = buckets.files_below(workdir)
            begun = {name.partition("/params/")[0] for name in files if "/params/" in name}
            whole = {step for step in begun if f"{step}/commit_success.txt" in files}
            stages = ({step.partition("/")[0] for step in some} for some in (whole, begun - whole))
            return set.intersection(*stages)

        process = start("main", *flags, scratch=scratch, log=log)
        while not (workdir / lease.FOLDER).is_dir():
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        with pytest.raises(CheckpointError, match=f"another run .*process {process.pid} of"):
            with workdirs.only_run(workdir):
                pass
        assert kill_when(process, half_written, log), log.read_text()
        process = start("main", *flags, scratch=scratch, log=log)
        assert process.wait() == 0, log.read_text()[-3000:]
        assert re.search("stage[12]: resuming after step", log.read_text())
        for stage in ("stage1", "stage2"):
            assert losses(workdir, stage) == losses(unbroken, stage)
        assert metrics(workdir) == metrics(unbroken)
        assert any("tfevents" in name for name in buckets.files_below(workdir / "stage2"))
        assert cir_jax.load(str(workdir)).composer.trained
        status, output = run(
            "main", f"--config={SMOKE}", "--config.stages=stage2", "--dry_run",
            f"--config.init_from={workdir}", f"--workdir={tmp_path / 'here'}", scratch=scratch,
        )  # fmt: skip
        assert status == 0, output
    assert not list(tmp_path.rglob("gs:*"))


def test_two_processes_killed_and_resumed_train_the_same_run(finished, scratch, tmp_path):
    unbroken, _ = finished
    workdir, text = tmp_path / "run", [tmp_path / "log0", tmp_path / "log1"]
    flags = [f"--config={SMOKE}", f"--workdir={workdir}", *LONGER, "--config.stages=stage1"]
    flags += ["--config.mesh.fsdp=2"]

    def together():
        return start_together("main", *flags, scratch=scratch, devices=2, logs=text)

    def underway():  # with something to resume from: on a busy disk that comes late
        return bool(checkpoints.finished(workdir / "stage1" / "checkpoints"))

    first, second = together()
    assert kill_when(first, underway, text[0]), text[0].read_text()[-3000:]
    second.kill()
    second.wait()
    assert [p.wait() for p in together()] == [0, 0], text[0].read_text()[-3000:]
    for log in text:
        assert "stage1: resuming after step" in log.read_text()
    np.testing.assert_allclose(losses(workdir, "stage1"), losses(unbroken, "stage1"), rtol=1e-5)
    before = metrics(workdir)
    assert "protocol" not in text[1].read_text()  # reports come from process 0
    status, output = run("eval", *flags[:-1], scratch=scratch)  # one process, one device
    assert status == 0, output
    assert metrics(workdir) == before


def test_dry_run_prints_and_writes_nothing(scratch, tmp_path):
    workdir = tmp_path / "run"
    flags = (f"--config={SMOKE}", f"--workdir={workdir}", "--config.mesh.fsdp=4", "--dry_run")
    status, output = run("main", *flags, scratch=scratch, devices=8)
    assert status == 0, output
    assert "stage stage2: 12 steps, mesh {'data': 2, 'fsdp': 4, 'tensor': 1}" in output
    assert "per device" in output and "['target_features'] float32[32, 128]" in output
    assert not workdir.exists()


@pytest.mark.slow
def test_dry_run_encodes_nothing(tmp_path):
    flags = ("--config=experiments/searle.py:smoke", f"--workdir={tmp_path}/run", "--dry_run")
    status, output = run("main", *flags, scratch=tmp_path)
    assert status == 0, output
    assert "images of" in output and "stage distil" in output
    assert not (tmp_path / "run").exists() and not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config=experiments/compodif.py"],
            "unknown experiment 'compodif'. Did you mean 'compodiff'",
        ),
        (["--config=compodiff"], "Give .*experiments/compodiff.py"),
        (["--config=experimets/compodiff"], "is no file. Give .*experiments/compodiff.py"),
        (["--config=experiments/compodiff.py:smok"], "preset .*'smok'. Did you mean 'smoke'"),
        ([f"--config={SMOKE}", "--config.composer.step=2"], "'step'. Did you mean \"steps\""),
        ([f"--config={SMOKE}", "--config.mesh.tensor=64"], "1 devices are not divisible by 64"),
        (
            [f"--config={SMOKE}", "--config.stage.stage2.microbatches=3"],
            "stage2.batch_size=32 is not divisible by microbatches=3",
        ),
        ([f"--config={SMOKE}", "--config.backbone=/nowhere"], "/nowhere.*hf download"),
        ([f"--config={SMOKE}", "--config.checkpoint.keep=0"], "checkpoint.keep=0; it must be 1"),
        (
            [
                f"--config={SMOKE}",
                "--config.stages=stage2",
                "--config.init_from=/nowhere",
                "--dry_run",
            ],
            "no checkpoint in /nowhere/stage1 or /nowhere",
        ),
        ([], "--config is missing"),
    ],
    ids=str,
)
def test_mistakes_are_one_message_and_leave_nothing(flags, message, scratch, tmp_path):
    workdir = tmp_path / "run"
    status, output = run("main", *flags, f"--workdir={workdir}", scratch=scratch, devices=1)
    assert status == 2, output
    assert re.search(message, output.splitlines()[-1]), output
    assert "Traceback" not in output
    assert not workdir.exists()
