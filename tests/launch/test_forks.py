"""Forked commands are like those that a shell starts."""

import os
import subprocess
import sys

import pytest

from tests.launch import forks

SCRIPT = """
import os, sys, jax
print(__name__, sys.argv[1:], os.environ.get("GIVEN"), jax.device_count(), sys.path[0])
if "fail" in sys.argv:
    raise ValueError("as told")
if "wait" in sys.argv:
    __import__("time").sleep(100)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*words, timeout=60, **variables):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        env = dict(os.environ) | variables
        command = [sys.executable, str(tmp_path / "script.py"), *words]
        return forks.run(command, env=env, log=log, timeout=timeout), log.read_text()

    return run


def test_a_command_has_its_own_flags_variables_and_devices(script, tmp_path):
    status, said = script("3", "--more", GIVEN="this", JAX_NUM_CPU_DEVICES="2")
    assert (status, said) == (3, f"__main__ ['3', '--more'] this 2 {tmp_path}\n")
    # nothing of it is left for the next one
    status, said = script("0", JAX_NUM_CPU_DEVICES="1")
    assert (status, said) == (0, f"__main__ ['0'] None 1 {tmp_path}\n")


def test_a_traceback_is_printed_and_what_hangs_is_killed(script):
    status, said = script("fail")
    assert status == 1 and said.splitlines()[-1] == "ValueError: as told"
    with pytest.raises(subprocess.TimeoutExpired):
        script("wait", timeout=3)
    assert script("0")[0] == 0
