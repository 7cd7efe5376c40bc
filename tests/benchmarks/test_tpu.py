"""What TPUs' compiler says of the papers' steps: the table is of the files, and they still hold."""

import json
import os

import pytest

from benchmarks import tpu
from tests.launch.binaries import environment, run_command

REPORTS = tpu.read()
TOLERANCE = 0.1


def test_the_table_is_of_the_files():
    text = tpu.README.read_text()
    written = text.split(tpu.MARKERS[0])[1].split(tpu.MARKERS[1])[0]
    assert written.strip() == tpu.table(REPORTS)
    assert {file.stem for file in tpu.FOLDER.glob("*.json")} == set(REPORTS)


@pytest.mark.parametrize("name", REPORTS)
def test_a_file_is_of_the_command_that_makes_it(name):
    """And of one compiler, where all stages fitted."""
    report = REPORTS[name]
    assert report["command"].split()[2:] == tpu.ENTRIES[name]
    assert report["compiler"].startswith("libtpu ") and not report["too_big"]
    assert all(stage["peak"] > stage["arguments"] > 0 for stage in report["stages"])


def dearest(report):
    return sum(stage["cpu_seconds"] for stage in report["stages"])


CHEAPEST = min(REPORTS, key=lambda name: dearest(REPORTS[name]))
ASKED = os.environ.get("CIR_JAX_TEST_TPU", CHEAPEST)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS if ASKED == "all" else [ASKED])
def test_compiled_again_it_takes_the_same(name, tmp_path):
    """The cheapest one; $CIR_JAX_TEST_TPU names another, or all."""
    libtpu = pytest.importorskip("libtpu", reason="pip install cir_jax[tpu-aot]; it needs no TPU")
    del libtpu
    file = tmp_path / "report.json"
    command = ["python", "launch/compile.py", *tpu.ENTRIES[name], f"--json={file}"]
    # as a user compiles: this suite's other programs are not optimised
    cheap = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    variables = {k: v for k, v in environment(tmp_path).items() if k not in cheap}
    status, output = run_command(command, variables)
    assert status == 0, output[-3000:]
    found = json.loads(file.read_text())
    if found["compiler"] != REPORTS[name]["compiler"]:
        pytest.skip(f"kept of {REPORTS[name]['compiler']}, this is {found['compiler']}")
    for was, now in zip(REPORTS[name]["stages"], found["stages"], strict=True):
        assert now["stage"] == was["stage"] and now["mesh"] == was["mesh"]
        for field in ("trained", "frozen", "flops"):
            assert now[field] == was[field], field
        for field in ("peak", "arguments", "compiled_flops"):
            assert now[field] == pytest.approx(was[field], rel=TOLERANCE), field
        moved = [{k: v["bytes"] for k, v in each["collectives"].items()} for each in (was, now)]
        small = sum(moved[0].values()) / 100  # of a kind that hardly moves anything
        assert moved[1] == pytest.approx(moved[0], rel=TOLERANCE, abs=small)


def test_what_the_table_says_of_a_report():
    stage = {
        "stage": "one",
        "mesh": {"data": 4, "fsdp": 2, "tensor": 1},
        "batch_size": 4096,
        "trained": 1 << 20,
        "frozen": 3 << 20,
        "seconds": 61.2,
        "cpu_seconds": 80.4,
        "peak": 3 << 29,
        "unread": 1 << 28,
        "flops": 16e12,
        "compiled_flops": 2.5e12,
        "collectives": {
            "all-gather": {"count": 3, "bytes": 8 << 20},
            "reduce-scatter": {"count": 1, "bytes": 3 << 20},
            "all-reduce": {"count": 2, "bytes": 1 << 20},
        },
    }
    command = "python launch/compile.py --config=experiments/x.py:big --topology=v5e:2x4"
    report = {"command": command, "topology": "v5e:2x4", "slices": 2, "stages": [stage]}
    row = tpu.table({"x": report}).splitlines()[2]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        *("x.py:big one", "2 x v5e:2x4 (data 4 x fsdp 2)", "4,096", "1.50 + 0.25", "16.0", "20.0"),
        *("8", "4", "0.75", "80"),
    ]
