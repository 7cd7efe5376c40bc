"""Commands in forks of one process that has imported what they import.

Most of a short run's time goes into the imports. A fork has them, and nothing else of another run:
no flags, no configuration, no compiled program. `start` of binaries.py and test_*.py that kill,
join or measure processes start real ones.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = (
    "cir_jax.evaluation.runner",
    "cir_jax.loading",
    "cir_jax.training.stages",
    "data.shapes.shapes_dataset_builder",
)


def run(
    command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path = ROOT, timeout: float
) -> int:
    """Exit status of `python ...`; its output goes to the file `log`.

    Variables other than env's, which are the test's own, are not seen. TimeoutExpired as
    `subprocess.run`.
    """
    order = {"command": command[1:], "env": dict(env), "log": str(log), "cwd": str(cwd)}
    server = _server()
    print(json.dumps(order | {"timeout": timeout}), file=server.stdin, flush=True)
    status = json.loads(server.stdout.readline())
    if status is None:
        raise subprocess.TimeoutExpired(list(command), timeout)
    return status


@functools.cache
def _server() -> subprocess.Popen:
    """Of this process; one command after the other."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, stdin=pipe, stdout=pipe, text=True
    )
    atexit.register(process.kill)
    return process


def _run_here(order: Mapping) -> None:
    """As `python script args` would, from here on."""
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    import jax

    for name, value in order["env"].items():  # which jax has read already
        if name.startswith("JAX_"):
            known = jax.config.values[name.lower()]
            new = value if known is None else type(known)({"True": 1, "False": 0}.get(value, value))
            jax.config.update(name.lower(), new)
    sys.argv = order["command"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _serve() -> Mapping | None:
    """Answers orders until there are no more; in a fork, what it is to do."""
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            return order
        ended, _, _ = select.select([os.pidfd_open(child)], [], [], order["timeout"])
        if not ended:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps(status if ended else None), flush=True)
    return None


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for name in IMPORTS:
        importlib.import_module(name)
    if found := _serve():
        _run_here(found)
