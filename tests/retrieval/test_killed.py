"""kill -9 in the middle of an extraction: what was stored is kept, the rest is computed."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from cir_jax.retrieval import features
from cir_jax.sharding.mesh import make_mesh
from tests.launch.binaries import ROOT
from tests.retrieval.killed import CHUNK, ROWS, records

pytestmark = pytest.mark.slow


def start(directory, output):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "tests.retrieval.killed", str(directory), str(output)]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def test_a_killed_process_loses_at_most_one_chunk(tiny, tmp_path):
    stored, output = tmp_path / "cache", tmp_path / "features.npy"
    log = output.with_suffix(".log")
    process = start(stored, output)
    while len(list(stored.glob("*/chunk_*"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(stored.glob("*/chunk_*.npy")))
    assert kept * CHUNK < ROWS and not output.exists()
    log.unlink()
    assert start(stored, output).wait() == 0
    assert sorted(map(int, log.read_text().split())) == list(range(kept * CHUNK, ROWS))
    backbone, params = tiny
    whole = features.image_features(
        backbone, params, records(), mesh=make_mesh({"data": 1}, jax.devices()[:1]), batch_size=4
    )
    np.testing.assert_allclose(np.load(output), whole, rtol=1e-5, atol=1e-6)
