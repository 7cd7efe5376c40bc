"""Runs the binaries as a user would: real processes, on the tiny world."""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.launch import forks

ROOT = Path(__file__).resolve().parents[2]
SMOKE = "experiments/compodiff.py:smoke"
LIMIT = 420


def environment(scratch: Path, devices: int = 1) -> dict[str, str]:
    """Everything a run writes outside its workdir goes under `scratch`, but compiled programs."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "CIR_"))}
    return inherited | {
        "CIR_JAX_DATA": str(scratch / "data"),
        "CIR_JAX_CACHE": str(scratch / "features"),
        # cheap compilations, as in tests/conftest.py
        "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def start(
    binary: str, *flags: str, scratch: Path, devices: int = 1, log: Path, **variables: str
) -> forks.Fork:
    """Starts `python launch/<binary>.py flags`; its output goes to the file `log`."""
    command = [sys.executable, f"launch/{binary}.py", *flags]
    return forks.Fork(command, env=environment(scratch, devices) | variables, log=log)


def start_together(
    binary: str, *flags: str, scratch: Path, devices: int, logs: Sequence[Path]
) -> list[forks.Fork]:
    """Starts one process per log, which find each other at a free port.

    Without stored programs: a process that has read one would wait in a collective for another that
    still compiles it, and Gloo gives up after 30 seconds.
    """
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    flags = (*flags, f"--coordinator=localhost:{port}", f"--num_processes={len(logs)}")
    options = dict(scratch=scratch, devices=devices)
    return [
        start(binary, *flags, f"--process_id={i}", log=log, **options) for i, log in enumerate(logs)
    ]


def run(binary: str, *flags: str, scratch: Path, devices: int = 1) -> tuple[int, str]:
    """Exit status and output of a whole run."""
    return run_command(
        [sys.executable, f"launch/{binary}.py", *flags], environment(scratch, devices)
    )


def run_command(command: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and output of `python ...` in the project's folder."""
    with tempfile.NamedTemporaryFile("r") as log:
        status = forks.run(command, env=env, log=Path(log.name), timeout=LIMIT)
        return status, log.read()


def kill_when(process: forks.Fork, condition: Callable[[], bool], log: Path) -> bool:
    """kill -9 as soon as the condition holds; False if the process ended before."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True
