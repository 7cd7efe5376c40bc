"""A store that is searched by two processes together, each with two devices."""

import json
import socket
import subprocess
import sys

import pytest

from tests.launch.binaries import ROOT, environment
from tests.library.test_indexes import Photos

pytestmark = pytest.mark.slow


def test_two_processes_find_what_one_finds(tmp_path):
    photos = Photos(tmp_path / "s.sqlite")
    photos.add([f"{i}" for i in range(100)], 1)
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "tests.library.on_mesh", str(port), "2"]
    env = environment(tmp_path, devices=2)
    processes = [
        subprocess.Popen([*command, str(i), str(photos.store.path)], cwd=ROOT, env=env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(2)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    first, second = (
        [json.loads(line) for line in out.splitlines() if line[0] == "{"] for out, _ in ended
    )
    assert len(first) == len(second) == 3
    for change, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        assert (mine["found"], mine["count"]) == (theirs["found"], theirs["count"])
        assert mine["count"] == 100 + 31 * change
        assert sorted(mine["held"] + theirs["held"]) == sorted(set(mine["held"] + theirs["held"]))
        assert len(mine["held"]) + len(theirs["held"]) == mine["count"]
        assert min(len(mine["held"]), len(theirs["held"])) > 0.4 * mine["count"]
    assert first[-1]["found"] != first[0]["found"]
    photos.store.close()
