"""Two processes: a signal to one stops both at one step; damage that one finds, both find."""

import re
import signal
import socket
import sys
import time

import numpy as np
import pytest

from cir_jax.storage import digests
from cir_jax.training import logs
from tests.launch import forks
from tests.launch.binaries import environment
from tests.training.line import trainer
from tests.training.several import STEPS

pytestmark = pytest.mark.slow
LIMIT = 120


class Two:
    """Both processes, and what they have said so far."""

    def __init__(self, directory, folder, *fails):
        with socket.socket() as server:
            server.bind(("", 0))
            port = server.getsockname()[1]
        folder.mkdir()
        self.logs = [folder / "0", folder / "1"]
        self.processes = []
        for number, log in enumerate(self.logs):
            command = [sys.executable, "tests/training/several.py", str(port), "2", str(number)]
            command += [str(directory), *fails]
            self.processes.append(forks.Fork(command, env=environment(folder), log=log))

    def said(self):
        return [log.read_text() for log in self.logs]

    def until(self, pattern):
        deadline = time.monotonic() + LIMIT
        while not all(re.search(pattern, text, re.M) for text in self.said()):
            assert time.monotonic() < deadline, self.said()
            assert [p.poll() for p in self.processes] == [None, None], self.said()
            time.sleep(0.02)

    def end(self):
        return [process.wait(timeout=LIMIT) for process in self.processes]


def test_two_processes_stop_together_and_agree_on_damage(tmp_path):
    directory = tmp_path / "run"
    first = Two(directory, tmp_path / "first")
    first.until(r"step 5$")
    first.processes[1].send_signal(signal.SIGINT)
    assert first.end() == [143, 130], first.said()
    stops = [re.search("stopped and saved after step ([0-9]+)", text) for text in first.said()]
    (step,) = {stop[1] for stop in stops}
    assert digests.damage(directory / "checkpoints" / step) == []

    second = Two(directory, tmp_path / "second")
    second.until(rf"step {int(step) + 5}$")
    second.processes[0].send_signal(signal.SIGTERM)
    assert second.end() == [143, 143], second.said()
    kept = sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())
    assert len(kept) == 2 and kept[1] < STEPS

    # the smallest file: of the two parts of the files, it is in that of one process only
    files = [p for p in (directory / "checkpoints" / str(kept[1])).rglob("*") if p.is_file()]
    small = min(files, key=lambda path: path.stat().st_size)
    small.write_bytes(b"X" * small.stat().st_size)
    third = Two(directory, tmp_path / "third")
    third.until("trained$")
    for text in third.said():
        assert f"checkpoints/{kept[1]} is not readable (damaged" in text, text
        assert f"step {kept[0] + 1}\n" in text
    third.processes[0].send_signal(signal.SIGTERM)
    assert third.processes[0].wait(timeout=20) == 143
    third.processes[1].send_signal(signal.SIGINT)
    third.processes[1].wait(timeout=LIMIT)
    assert "stopped by SIGTERM while waiting: all is kept" in third.said()[0]

    trainer(steps=STEPS, checkpoint_every=STEPS).run(tmp_path / "unbroken")
    ours, alone = (
        [(row["step"], row["loss"]) for row in logs.read(where / "metrics.jsonl")]
        for where in (directory, tmp_path / "unbroken")
    )
    np.testing.assert_allclose(ours, alone, rtol=1e-4)


@pytest.mark.parametrize(
    ("number", "what", "status", "words"),
    [
        (1, "data", 2, "error: shard 3: record 7 is no image."),
        (0, "bug", 1, "error: KeyError: 'caption', while starting: nothing was written."),
    ],
)
def test_what_one_process_finds_wrong_ends_both_with_its_words(
    tmp_path, number, what, status, words
):
    both = Two(tmp_path / "run", tmp_path / "logs", f"{number}={what}")
    both.until("step 4$")
    began = time.monotonic()
    assert both.end() == [status, status], both.said()
    assert time.monotonic() - began < 10
    for text in both.said():
        assert words in text and "Check failure" not in text, text
    texts = both.said()
    assert f"(process {number})" in texts[1 - number] and "Traceback" not in texts[1 - number]
    assert ("Traceback" in texts[number]) == (what == "bug")


def test_a_full_disk_ends_both_and_keeps_what_was_saved(small_disk, tmp_path_factory):
    both = Two(small_disk / "run", tmp_path_factory.mktemp("two") / "logs")
    both.until("step 99$")
    began = time.monotonic()
    assert both.end() == [2, 2], both.said()
    assert time.monotonic() - began < 10
    for text in both.said():
        last = text.splitlines()[-2:]  # before it, tensorstore may tell of what it gave up
        assert "checkpoint could not be written: No space left on device" in "".join(last), text
        assert "Check failure" not in text
    checkpoints = small_disk / "run" / "checkpoints"
    (kept,) = (int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    assert kept < 100 and digests.damage(checkpoints / str(kept)) == []
