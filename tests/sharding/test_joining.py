"""Who belongs to a run, and who did not come."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jax._src.clusters import cloud_tpu_cluster

from cir_jax.errors import ConfigError
from cir_jax.sharding import joining

ROOT = Path(__file__).resolve().parents[2]


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


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "gpu[003-007,9],x1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE = {
    "TPU_WORKER_HOSTNAMES": "localhost,127.0.0.1",
    "TPU_WORKER_ID": "1",
    "TPU_SKIP_MDS_QUERY": "true",
}


@pytest.fixture
def alone(monkeypatch):
    """No cluster around; what a test sets in the environment is all there is."""
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JAX_COORD")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (SLURM, ("slurm", "gpu003:61517", 4, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # not by srun
        (OMPI, ("ompi", "10.96.0.1:62624", 3, 1)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod of no job
        (SLURM | {"JAX_COORDINATOR_PORT": "1234"}, ("slurm", "gpu003:1234", 4, 2)),
    ],
)
def test_jax_says_who_belongs_together(alone, environment, expected):
    for name, value in environment.items():
        alone.setenv(name, value)
    assert joining.detect() == expected


def test_a_pod_of_no_indexed_job_is_not_asked(alone):
    """JAX, where it can ask Kubernetes, takes every pod for one of a job."""
    alone.setattr(joining.K8sCluster, "is_env_present", lambda: True)
    alone.setattr(joining.K8sCluster, "get_process_count", lambda: 2)
    alone.setattr(joining.K8sCluster, "get_coordinator_address", lambda *_: "job-0:1234")
    alone.setattr(joining.K8sCluster, "get_process_id", lambda: 1)
    assert joining.detect() is None
    alone.setenv("JOB_COMPLETION_INDEX", "1")
    assert joining.detect() == ("K8sCluster", "job-0:1234", 2, 1)


def test_hosts_of_a_tpu_in_kubernetes(alone):
    for name, value in GKE.items():
        alone.setenv(name, value)
    assert joining.detect() is None  # no TPU is here
    alone.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    alone.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 200))
    assert joining.detect() == ("gketpu", "localhost:8482", 2, 1)
    alone.setenv("TPU_WORKER_HOSTNAMES", "localhost")  # one host carries a pod's variables, too
    assert joining.detect() is None


def test_a_tpu_pod_is_found_by_its_metadata(alone):
    """gcloud ... --worker=all sets no variable: the metadata server knows the workers."""
    metadata = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "a:0:127.0.0.1,b:1:127.0.0.2",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nWORKER_ID: '1'",
    }
    alone.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    alone.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    assert joining.detect() == ("gcetpu", "127.0.0.1:8482", 2, 1)
    assert joining.roll_call_of(joining.detect()) == ("127.0.0.1:8481", 2, 1)
    metadata["tpu-env"] += "\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'"
    assert joining.detect()[2:] == (4, 3)

    def broken(key):
        raise OSError("no route to host")

    alone.setattr(cloud_tpu_cluster, "get_metadata", broken)
    with pytest.raises(ConfigError, match=r"\(gcetpu\): OSError.*no route.*Give --coordinator"):
        joining.detect()


TASK = """
import jax
jax.config.update("jax_platforms", "cpu")
from cir_jax.sharding import joining
joining.initialize()
from jax.experimental import multihost_utils
import numpy as np
print("sum", multihost_utils.process_allgather(np.float32(jax.process_index() + 1)).sum(),
      jax.process_count(), jax.local_device_count())
"""


@pytest.mark.slow
def test_tasks_of_slurm_join(alone):
    """Two tasks on one node that see all its devices, as with --gres=gpu:2."""
    tasks = []
    for index in range(2):
        own = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "SLURM_NTASKS": "2"}
        # a job of its own, whose number decides the port
        job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
        tasks.append(
            subprocess.Popen(
                [sys.executable, "-c", TASK],
                env={**os.environ, **SLURM, **job, **own, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [task.communicate(timeout=120)[0] for task in tasks]
    assert all("sum 3.0 2" in text for text in said), said


def test_flags_belong_together():
    with pytest.raises(ConfigError, match="give all three"):
        joining.initialize(num_processes=2)
    with pytest.raises(ConfigError, match=r"--process_id=2 is not in 0..1"):
        joining.initialize("localhost:1", 2, 2)
    with pytest.raises(ConfigError, match="is not host:port"):
        joining.initialize("localhost", 2, 1)


def test_a_cluster_names_who_is_missing_and_goes_on_waiting(capsys):
    joined = threading.Event()
    where = (f"localhost:{free_port()}", 3, 0)
    joining._name_missing(where, 1, joined)
    assert "Still waiting: after 1 s process(es) 1,2 of 3 have not come" in capsys.readouterr().out
    joined.set()
    joining._name_missing(where, 1, joined)  # JAX got through: nothing to say
    assert capsys.readouterr().out == ""
