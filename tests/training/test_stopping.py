"""SIGTERM and Ctrl-C while a stage trains: it saves first, and goes on to the same numbers."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cir_jax.sharding import joining
from cir_jax.storage import digests
from cir_jax.training import logs, loop
from cir_jax.training.loop import Preempted
from tests.launch.binaries import ROOT
from tests.training.line import trainer


def losses(directory):
    return [row["loss"] for row in logs.read(directory / "metrics.jsonl")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    return jax.device_get(trainer(steps=6).run(directory)), losses(directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_the_run_goes_on(unbroken, tmp_path, number, capfd):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def send(step):
        if step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(Preempted, match="line: stopped and saved after step 3") as caught:
        trainer(steps=6, before=send, checkpoint_every=100).run(tmp_path)
    assert caught.value.signal == number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert ("Ctrl-C once more leaves at once" in capfd.readouterr().err) == (number == 2)
    assert digests.damage(tmp_path / "checkpoints" / "3") == []
    params = trainer(steps=6, checkpoint_every=100).run(tmp_path)
    assert losses(tmp_path) == unbroken[1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), unbroken[0])


def test_a_signal_after_the_last_step_waits_for_its_checkpoint(tmp_path, monkeypatch):
    wait = loop.Checkpoints.wait

    def late(self):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(self)

    class Outside(BaseException):
        pass

    def outside(*_):
        raise Outside

    monkeypatch.setattr(loop.Checkpoints, "wait", late)
    before = signal.signal(signal.SIGTERM, outside)
    try:
        with pytest.raises(Outside):  # passed on to whoever handles it, but not before it is saved
            trainer(steps=2).run(tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert digests.damage(tmp_path / "checkpoints" / "2") == []


TWICE = """
import jax, sys, time
jax.config.update("jax_platforms", "cpu")
from pathlib import Path
from cir_jax.training import loop
from tests.training.line import trainer

def wait(self):
    print("saving", flush=True)
    time.sleep(60)

loop.Checkpoints.wait = wait
trainer(steps=10**6, before=lambda step: print(step, flush=True), checkpoint_every=10**6).run(
    Path(sys.argv[1]))
"""


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE, str(tmp_path)], env=environment, stdout=subprocess.PIPE
    )
    for line in process.stdout:
        if line == b"2\n":
            process.send_signal(signal.SIGINT)
        if line == b"saving\n":
            break
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT  # what a shell calls 130
    assert time.monotonic() - began < 10


def test_ctrl_c_with_several_processes_goes_where_sigterm_goes(monkeypatch):
    noticed, agreed = [], [False]
    monkeypatch.setattr(joining, "_jax_handler", noticed.append)
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        loop.multihost_utils, "reached_preemption_sync_point", lambda step: agreed[0]
    )
    with pytest.raises(Preempted):
        with loop._preemption() as preempted:
            os.kill(os.getpid(), signal.SIGINT)
            assert noticed == [signal.SIGTERM] and preempted(1) == 0
            agreed[0] = True  # all processes stop at this step
            assert preempted(2) == signal.SIGINT
            raise Preempted("saved", preempted(2))


def test_a_process_that_got_no_signal_stops_with_the_others(monkeypatch):
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        loop.multihost_utils, "reached_preemption_sync_point", lambda step: step > 1
    )
    with loop._preemption() as preempted:
        assert [preempted(1), preempted(2)] == [0, signal.SIGTERM]
