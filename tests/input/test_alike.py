"""Texts are cut alike on all processes, as short as the longest of all allows."""

import json
import socket
import subprocess
import sys

import jax
import pytest

from cir_jax.sharding import largest
from tests.input import alike
from tests.launch.binaries import ROOT, environment


def test_two_processes_cut_texts_alike(tmp_path):
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "tests.input.alike", str(port), "2"]
    peers = [
        subprocess.Popen(
            [*command, str(number)], cwd=ROOT, env=environment(tmp_path), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [peer.communicate(timeout=120) for peer in peers]
    assert [peer.returncode for peer in peers] == [0, 0], said
    for number, (output, _) in enumerate(said):
        alone, together, again, kept = json.loads(output.splitlines()[-1])
        needed = [-(-lengths[number] // 4) * 4 for lengths in alike.LENGTHS]
        assert alone == [[2, length] for length in needed]
        longest = [-(-max(lengths) // 4) * 4 for lengths in alike.LENGTHS]
        assert together == again == [[2, length] for length in longest]
        assert alone != together
        if not number:  # what was said does not pile up: the last batches of both passes at the
            assert kept <= 2 * 2 * 3  # most (process 0 deletes it, when it comes to it)


class Store:
    """JAX's key-value store, where process 1 says nothing."""

    def __init__(self, error):
        self.error = error

    def key_value_set(self, key, value):
        pass

    def key_value_dir_get(self, prefix):
        return [(f"{prefix}0", "8")]

    def blocking_key_value_get(self, key, milliseconds):
        raise jax.errors.JaxRuntimeError(self.error)


def test_one_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(largest, "LIMIT", 3)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for error in ("DEADLINE_EXCEEDED: of this look", "UNAVAILABLE: the service has ended"):
        agreed = largest.Largest()
        agreed._client = Store(error)
        agreed.say(8)
        with pytest.raises(jax.errors.JaxRuntimeError, match=error.partition(":")[0]):
            agreed.hear()
