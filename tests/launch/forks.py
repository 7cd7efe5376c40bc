"""Commands in forks of one process that has imported what they import.

Most of a short run's time goes into the imports. A fork has them, and nothing else of another run:
no flags, no configuration, no compiled program.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = (
    "cir_jax.evaluation.runner",
    "cir_jax.loading",
    "cir_jax.training.stages",
    "data.shapes.shapes_dataset_builder",
)


class Fork:
    """`python script arguments`, with as much of `subprocess.Popen` as the tests use."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path = ROOT
    ):
        """command: with the interpreter. env: all variables there are. log: a file that output goes
        to."""
        self.args, self.returncode = list(command), None
        log.touch()
        order = {"command": command[1:], "env": dict(env), "log": str(log), "cwd": str(cwd)}
        self.pid = _ask(order)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"ended": self.pid})
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(command: Sequence[str], *, env: Mapping[str, str], log: Path, timeout: float) -> int:
    """Exit status of a whole run. TimeoutExpired as `subprocess.run`."""
    process = Fork(command, env=env, log=log)
    try:
        return process.wait(timeout)
    finally:
        process.kill()


def _ask(order: Mapping[str, Any]) -> int | None:
    server = _server()
    print(json.dumps(order), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen:
    """The one of this process."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, stdin=pipe, stdout=pipe, text=True
    )
    atexit.register(process.kill)
    return process


def _serve() -> Mapping[str, Any] | None:
    """Answers until nobody asks; in a fork, what it is to do."""
    for line in sys.stdin:
        order = json.loads(line)
        if "ended" in order:
            pid, status = os.waitpid(order["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            return order
        print(answer if answer is not None else "null", flush=True)
    return None


def _run_here(order: Mapping[str, Any]) -> None:
    """As `python script arguments` would, from here on."""
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    import jax

    for name, value in order["env"].items():  # jax has looked for them already
        if name.startswith("JAX_"):
            before = jax.config.values[name.lower()]
            kind = str if before is None else type(before)
            new = value not in ("False", "0") if kind is bool else kind(value)
            jax.config.update(name.lower(), new)
    sys.argv = order["command"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for name in IMPORTS:
        importlib.import_module(name)
    if found := _serve():
        _run_here(found)
