"""Ctrl-C, SIGTERM and full disks outside of the training loop: one sentence, nothing in halves."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from cir_jax.retrieval import features
from cir_jax.sharding.mesh import make_mesh
from cir_jax.storage import atomic, chunk_store
from data import build, shards
from launch import ending
from tests import tiny as factory
from tests.launch.binaries import ROOT, environment

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
both = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=NAMES.get)


def send(number):
    os.kill(os.getpid(), number)


def stopped(main, capsys, number):
    """Runs main, which is stopped: its last words."""
    handlers = [signal.getsignal(n) for n in NAMES]
    with pytest.raises(SystemExit) as caught:
        ending.run(main)
    assert caught.value.code == 128 + number
    assert [signal.getsignal(n) for n in NAMES] == handlers
    words = capsys.readouterr().err
    assert "Traceback" not in words
    return words.strip().splitlines()[-1]


@both
def test_one_sentence_and_the_status_of_the_signal(number, capsys):
    def main():
        ending.phase("doing this", "that is kept")
        send(number)
        pytest.fail("went on")

    words = stopped(main, capsys, number)
    assert words == (
        f"stopped by {NAMES[number]} while doing this: that is kept. The same command continues."
    )


def test_what_ends_otherwise_ends_as_it_did(capsys):
    ending.run(lambda: None)
    with pytest.raises(SystemExit) as caught:
        ending.run(lambda: sys.exit(7))
    assert caught.value.code == 7
    for error in (ValueError("a mistake of ours"), FileNotFoundError(errno.ENOENT, "no such file")):
        with pytest.raises(type(error)):
            ending.run(lambda error=error: (_ for _ in ()).throw(error))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_is_full_or_fails_is_one_message(code, capsys):
    def main():
        ending.phase("exporting", "what was trained is in DIR")
        raise OSError(code, os.strerror(code), "some/file")

    with pytest.raises(SystemExit) as caught:
        ending.run(main)
    assert caught.value.code == 2
    words = capsys.readouterr().err.strip()
    assert words == (
        f"error: some/file: {os.strerror(code)}, while exporting: what was trained is in DIR. "
        "Mend it, then run it again."
    )


def test_what_was_said_before_comes_before_the_last_words(tmp_path):
    """Both streams in one file, as `> log 2>&1` and cluster managers do."""
    program = """
from launch import ending

def main():
    print("said before")
    raise ending.Failed("that is all")

ending.run(main)
"""
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", program]
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
        buffered = environment(tmp_path) | {"PYTHONUNBUFFERED": ""}
        assert subprocess.run(command, env=buffered, cwd=ROOT, **streams).returncode == 2
    assert (tmp_path / "log").read_text().split("\n") == [
        "said before",
        "",
        "error: that is all",
        "",
    ]


TWICE = """
import signal, sys, time
from launch import ending

def main():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(60)

ending.run(main)
"""


def test_a_second_one_leaves_at_once(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE], cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE
    )
    for expected in (b"ready\n", b"cleaning\n"):
        assert process.stdout.readline() == expected
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in (-signal.SIGINT, 130)  # a shell calls both 130


DEAF = """
import hashlib
from launch import ending

def main():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes outside of Python, as a compilation

ending.run(main)
"""


def test_a_second_ctrl_c_leaves_a_program_that_cannot_listen(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


@both
def test_while_data_are_built(number, tmp_path, capsys, monkeypatch):
    add = shards._Journal.add

    def stops(self, name, count, size):
        add(self, name, count, size)
        (self.folder / "shard.part").write_bytes(b"half a shard")
        send(number)

    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    with monkeypatch.context() as patch:
        patch.setattr(shards._Journal, "add", stops)

        def main():
            ending.phase("preparing data", "finished shards are kept")
            build.prepare("shapes_tiny", ["captions"], tmp_path)

        assert "while preparing data: finished shards are kept" in stopped(main, capsys, number)
    folder = tmp_path / "shapes_tiny" / "captions"
    assert shards.finished_shards(folder / ".building") == 1
    assert not list(tmp_path.rglob("dataset_info.json"))
    made = build.prepare("shapes_tiny", ["captions"], tmp_path)["captions"]
    build.check("shapes_tiny", ["captions"], tmp_path)
    assert "keeping 1 finished shard" in capsys.readouterr().err and made.is_dir()


class Table(factory.MemoryTable):
    stops_at, number, reads = None, None, ()

    def identity(self):
        return "stopping"

    def __getitem__(self, index):
        if index == self.stops_at:
            send(self.number)  # in a thread: Python runs the handler in the main one
        self.reads = (*self.reads, int(index))
        return super().__getitem__(index)


@both
def test_while_features_are_computed(number, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chunk_store, "CHUNK_ROWS", 4)
    rng = np.random.default_rng(0)
    table = Table([{"image": factory.png(rng)} for _ in range(40)])

    def run(cache_dir):
        mesh = make_mesh({"data": 1}, jax.devices()[:1])
        return features.image_features(
            *tiny, table, "image", mesh=mesh, batch_size=4, cache_dir=cache_dir
        )

    whole = run(None)
    table.stops_at, table.number = 30, number
    stopped(lambda: run(tmp_path), capsys, number)
    assert not [t for t in threading.enumerate() if t.name.startswith("load")]
    kept = sorted(path.name for path in tmp_path.glob("*/chunk_*"))
    assert 4 <= len(kept) < 10 and not list(tmp_path.glob("*/.*"))
    table.stops_at, table.reads = None, ()
    np.testing.assert_allclose(run(tmp_path), whole, rtol=1e-5, atol=1e-6)
    assert min(table.reads) == 4 * len(kept)


@both
def test_while_a_file_is_written(number, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text('{"of": "before"}')

    def half(file):
        file.write(b"half")
        send(number)

    stopped(lambda: atomic.write_atomically(path, half), capsys, number)
    assert json.loads(path.read_text()) == {"of": "before"}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
