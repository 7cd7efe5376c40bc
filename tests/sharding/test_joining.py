"""Who belongs to a run, and who did not come."""

import ctypes
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cir_jax.errors import ConfigError
from cir_jax.sharding import joining


def free_port():
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]


def roll_call(count, present, seconds):
    coordinator = f"localhost:{free_port()}"
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(joining._roll_call, coordinator, count, i, seconds) for i in present]
        return [call.exception() for call in calls]


def test_sigterm_stays_ours_and_jax_still_gets_notice(monkeypatch):
    """jax.distributed.initialize puts a C function in the place of Python's handler."""
    libc, theirs, ours = ctypes.CDLL(None), [], []
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs.append)
    monkeypatch.setattr(joining, "_jax_handler", None)
    monkeypatch.setattr(
        joining.jax.distributed, "initialize", lambda *_, **__: libc.signal(signal.SIGTERM, handler)
    )
    before = signal.signal(signal.SIGTERM, lambda number, _: ours.append(number))
    try:
        assert not joining.owns_sigterm()
        joining.give_notice()  # to whoever listens
        joining._initialize("localhost:1", 2, 0)
        signal.raise_signal(signal.SIGTERM)
        assert (theirs, ours) == ([], [signal.SIGTERM] * 2) and joining.owns_sigterm()
        joining.give_notice()
        assert (theirs, ours) == ([signal.SIGTERM], [signal.SIGTERM] * 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_everybody_came():
    assert roll_call(3, (2, 0, 1), 20) == [None] * 3


def test_missing_processes_are_named_to_all():
    errors = roll_call(4, (0, 1), 1)
    for error in errors:
        assert isinstance(error, ConfigError)
        assert "process(es) 2,3 of 4 have not come" in str(error)
        assert "--process_id=ID" in str(error)


def test_missing_coordinator_is_named():
    (error,) = roll_call(2, (1,), 1)
    assert "process(es) 0 of 2 have not come" in str(error)


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, "slurm"),
        ({"SLURM_NTASKS": "4"}, None),  # inside an allocation, but not started by srun
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "tpu"),
    ],
)
def test_only_more_than_one_process_is_proof(environment, kind):
    assert joining.detect(environment) == kind


def test_flags_belong_together():
    with pytest.raises(ConfigError, match="give all three"):
        joining.initialize(num_processes=2)
    with pytest.raises(ConfigError, match=r"--process_id=2 is not in 0..1"):
        joining.initialize("localhost:1", 2, 2)
    with pytest.raises(ConfigError, match="is not host:port"):
        joining.initialize("localhost", 2, 1)


@pytest.mark.parametrize(
    ("kind", "environment", "expected"),
    [
        (
            "slurm",
            {"SLURM_JOB_NODELIST": "gpu[003-007,9],x1", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"},
            ("gpu003:8478", 4, 2),
        ),
        (
            "slurm",
            {"SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            ("a:8478", 2, 0),
        ),
        ("tpu", {"TPU_WORKER_HOSTNAMES": "h0,h1,h2", "TPU_WORKER_ID": "1"}, ("h0:8478", 3, 1)),
    ],
)
def test_rendezvous_of_a_cluster(kind, environment, expected):
    assert joining.rendezvous(kind, environment) == expected


def test_a_cluster_names_who_is_missing_and_goes_on_waiting(capsys):
    joined = threading.Event()
    where = (f"localhost:{free_port()}", 3, 0)
    joining._name_missing(where, 1, joined)
    assert "Still waiting: after 1 s process(es) 1,2 of 3 have not come" in capsys.readouterr().out
    joined.set()
    joining._name_missing(where, 1, joined)  # JAX got through: nothing to say
    assert capsys.readouterr().out == ""
