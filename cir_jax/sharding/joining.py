"""One program for one process and for many: who am I, and is everybody here?"""

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax._src.clusters import ClusterEnv, K8sCluster

from cir_jax.errors import ConfigError
from cir_jax.sharding import last_words

WAIT_SECONDS = 60
COMPLETION = "JOB_COMPLETION_INDEX"
"""Which pod of a job of Kubernetes this is."""


class Cluster(NamedTuple):
    """name: JAX's for it: "gcetpu", "gketpu", "slurm", "ompi", "K8sCluster". coordinator:
    "host:port" of process 0. processes, index: how many there are, and which one this is."""

    name: str
    coordinator: str
    processes: int
    index: int


def detect(wait_seconds: int = WAIT_SECONDS) -> Cluster | None:
    """Where JAX's own detection says that this process belongs (the metadata server of a TPU VM,
    GKE, SLURM's, Open MPI's, Kubernetes' variables); None = it is alone.

    One process of a cluster is alone: a TPU VM with one host, a SLURM job of one task, a pod of
    Kubernetes that belongs to no indexed job.
    Raises ConfigError where a cluster cannot be asked.
    """
    # what jax.distributed.initialize asks; no public name tells it beforehand
    for kind in ClusterEnv._cluster_types:
        name = kind.name or kind.__name__
        try:
            if kind.opt_in_only_method or (kind is K8sCluster and COMPLETION not in os.environ):
                continue
            if not kind.is_env_present():
                continue
            processes = kind.get_process_count()
            if processes < 2:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            coordinator = kind.get_coordinator_address(wait_seconds, port)
            return Cluster(name, coordinator, processes, kind.get_process_id())
        except Exception as error:  # of whatever library a cluster is asked with
            raise ConfigError(
                f"JAX could not ask the cluster that it found ({name}): "
                f"{error!r}. Give --coordinator=HOST:PORT --num_processes=N --process_id=ID; "
                "localhost:1, 1 and 0 where this process is alone."
            ) from error
    return None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_seconds: int = WAIT_SECONDS,
) -> None:
    """Joins the other processes, if there are any; before any other use of JAX.

    coordinator: "host:port" of process 0, with num_processes and process_id; else `detect` decides.
    Raises ConfigError naming the processes that did not come.
    """
    given = [x is not None for x in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ConfigError(
            "--coordinator, --num_processes and --process_id belong together: give all three "
            "(for example --coordinator=host0:8476 --num_processes=4 --process_id=0), or none."
        )
    if all(given):
        if not 0 <= process_id < num_processes:
            raise ConfigError(f"--process_id={process_id} is not in 0..{num_processes - 1}.")
        if num_processes == 1:
            return
        _roll_call(coordinator, num_processes, process_id, wait_seconds)
        _initialize(coordinator, num_processes, process_id, initialization_timeout=wait_seconds)
    elif cluster := detect(wait_seconds):
        joined = threading.Event()
        watch = (roll_call_of(cluster), wait_seconds, joined)
        threading.Thread(target=_name_missing, args=watch, daemon=True).start()
        # itself, so that JAX finds out which devices of a host are this process's
        _initialize(initialization_timeout=5 * wait_seconds)
        joined.set()


_jax_handler: Callable[[int], None] | None = None


def _initialize(*args: Any, **kwargs: Any) -> None:
    """jax.distributed.initialize, after which SIGTERM goes where it went before.

    JAX puts a C function in its place, which Python can neither see nor restore; it stays within
    reach of `give_notice`.
    """
    global _jax_handler
    if "jax_cpu_collectives_implementation" in jax.config.values:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    before = libc.signal(signal.SIGTERM, None)
    jax.distributed.initialize(*args, **kwargs)
    theirs = libc.signal(signal.SIGTERM, before)
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # with Python's own flags, not libc's
    if theirs:
        _jax_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs)
    last_words.listen()


def owns_sigterm() -> bool:
    """Whether SIGTERM is free for a handler of ours, as after `initialize`."""
    return _jax_handler is not None


def give_notice() -> None:
    """Tells all processes, as SIGTERM tells JAX, to agree on a step to stop at."""
    if _jax_handler is not None:
        _jax_handler(signal.SIGTERM)
    else:
        signal.raise_signal(signal.SIGTERM)


def roll_call_of(cluster: Cluster) -> tuple[str, int, int]:
    """Where to call the roll, beside JAX's own port; how many processes there are; which one this
    is."""
    host, _, port = cluster.coordinator.rpartition(":")
    return f"{host}:{int(port) - 1}", cluster.processes, cluster.index


def _name_missing(where: tuple[str, int, int], seconds: int, joined: threading.Event) -> None:
    """Says who has not come after a while; JAX goes on waiting, for a firewall may only stop us."""
    try:
        _roll_call(*where, seconds)
    except ConfigError as error:
        if not joined.is_set():
            print(
                f"Still waiting: {error}\nOn SLURM, start it with srun python launch/main.py ...; "
                "on a TPU pod with gcloud compute tpus tpu-vm ssh NAME --worker=all --command=...",
                flush=True,
            )


def _roll_call(coordinator: str, count: int, index: int, seconds: int) -> None:
    """Every process says its number to process 0, which names those that are missing.

    JAX's own rendezvous ends the program without saying who did not come.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator={coordinator!r} is not host:port.")
    deadline = time.monotonic() + seconds
    if index == 0:
        missing = _collect(int(port), count, deadline)
    else:
        missing = _report(host, int(port), index, deadline)
    if missing:
        raise ConfigError(
            f"after {seconds} s process(es) {missing} of {count} have not come to {coordinator}. "
            "Was the same command started there, with that --process_id, and is the port open? "
            f"Launch line: python launch/main.py --config=... --coordinator={coordinator} "
            f"--num_processes={count} --process_id=ID"
        )


def _collect(port: int, count: int, deadline: float) -> str:
    waiting = set(range(1, count))
    connections = []
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ConfigError(
            f"port {port} of process 0 cannot be used ({error.strerror}): choose another one in "
            "--coordinator."
        ) from error
    with server:
        while waiting and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(5)
                waiting.discard(int(connection.recv(16) or b"-1"))
                connections.append(connection)
            except (TimeoutError, ValueError, OSError):
                continue
        missing = ",".join(map(str, sorted(waiting)))
        for connection in connections:
            with connection:
                connection.sendall(missing.encode() or b"ok")
    return missing


def _report(host: str, port: int, index: int, deadline: float) -> str:
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=min(left, 5)) as connection:
                connection.sendall(str(index).encode())
                connection.settimeout(left + 5)
                answer = connection.recv(4096).decode()
        except OSError:
            time.sleep(0.2)
            continue
        if answer:
            return "" if answer == "ok" else answer
        time.sleep(0.2)
    return "0"
