"""What TPUs' compiler says of the papers' steps: the table is of the files, and they still hold."""

import importlib
import json
import math
import os
import pkgutil
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml

import experiments
from benchmarks import tpu
from cir_jax import experiment as experiment_of
from cir_jax.loading import read_experiment
from cir_jax.models import light
from cir_jax.sharding import topologies
from cir_jax.training import ahead, flops, stages
from data import build
from tests.launch.binaries import LIMIT, environment, run_command

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
# a second or two each
TRACED = ["searle_vit_l14", "lincir_vit_l14", "combiner_vit_l14", "artemis_clip_rn50"]


def test_every_experiment_that_trains_is_here():
    """But what is the embedded world's own, and a method's stages inside of another one's."""
    trained = set()
    for module in pkgutil.iter_modules(experiments.__path__):
        if module.name not in ("base", "pretrain"):
            config = importlib.import_module(f"experiments.{module.name}").get_config()
            own = config.composer.name
            if any(stage.composer.get("name", own) == own for stage in config.stage.values()):
                trained.add(module.name)
    listed = {re.search(r"experiments/(\w+)", flags[0])[1] for flags in tpu.ENTRIES.values()}
    assert trained == listed | {"searle_oti"}  # which is SEARLE's first stage
    assert set(REPORTS) == set(tpu.ENTRIES)  # none lacks its line
    assert len({report["compiler"] for report in REPORTS.values()}) == 1


def config_of(name):
    """The config of an entry, its tables the world's."""
    experiment, *changes = (
        flag.removeprefix("--config") for flag in tpu.ENTRIES[name] if flag.startswith("--config")
    )
    config = read_experiment(experiment.removeprefix("=experiments/").replace(".py", ""))
    fields = dict(change.removeprefix(".").split("=", 1) for change in changes)
    config.update_from_flattened_dict({k: yaml.safe_load(v) for k, v in fields.items()})
    return ahead.stand_in(config)


def kernels_of_convolutions(config):
    """Values of those that are trained, which lie whole: their sides divide by no mesh."""
    if not config.composer.get("query_encoder"):
        return 0
    model = light.create(config.composer.query_encoder)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    tree = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if len(leaf.shape) == 4)


@pytest.mark.parametrize("name", REPORTS)
def test_what_a_file_says_fits_together(name):
    """By arithmetic, from what the config says."""
    config, report = config_of(name), REPORTS[name]
    assert [stage["stage"] for stage in report["stages"]] == list(config.stages)
    for stage in report["stages"]:
        recipe, chips = config.stage[stage["stage"]], report["devices"]
        assert (
            stage["batch_size"] == recipe.batch_size and math.prod(stage["mesh"].values()) == chips
        )
        # float32 of what is trained, of Adam's moments and of an average, and of what is frozen
        copies = 3 + (recipe.get("ema", 0) > 0)
        whole = copies * kernels_of_convolutions(config)
        split = copies * stage["trained"] + stage["frozen"] - whole
        weights = 4 * (split / config.mesh.fsdp + whole)
        images = 2 * 224 * 224 * 3 * recipe.batch_size / chips  # a row has at most two
        assert weights <= stage["arguments"] < 1.05 * weights + images
        assert stage["peak"] + stage["unread"] < 2**30 * topologies.memory_gib(report["topology"])
        if recipe.kind == "train" and not config.scan:  # the compiler counts loops once
            assert stage["compiled_flops"] * chips == pytest.approx(stage["flops"], rel=TOLERANCE)


def moved(stage):
    return {kind: each["bytes"] for kind, each in stage["collectives"].items()}


def test_what_the_readme_says_of_loops():
    """Half of the time, two thirds of the memory, the same exchanged."""
    plain, loops = (REPORTS[f"compodiff_vit_l14{end}"]["stages"] for end in ("", "_scan"))
    for was, now in zip(plain, loops, strict=True):
        assert 0.4 < now["cpu_seconds"] / was["cpu_seconds"] < 0.6
        assert 0.55 < now["peak"] / was["peak"] < 0.75
        assert sum(moved(now).values()) == pytest.approx(sum(moved(was).values()), rel=0.02)
        assert now["flops"] == was["flops"] and now["arguments"] == was["arguments"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS if ASKED == "all" else TRACED)
def test_a_file_is_of_the_program_that_there_is(name, tmp_path):
    """Traced again, without libtpu: operations and weights do not depend on devices."""
    config = config_of(name)
    build.prepare_needed(stages.required_tables(config), data_dir=tmp_path)
    config.data_dir = str(tmp_path)
    experiment = experiment_of.setup(config, devices=topologies.devices("cpu:8"))
    for kept in REPORTS[name]["stages"]:
        traced, *given = ahead.trace_stage(experiment, kept["stage"])
        fields = ("trained", "frozen", "unread", "flops")
        found = (*ahead.parameters(traced, *given), flops.of_products(traced.jaxpr))
        now = dict(zip(fields, found, strict=True))
        assert now == {field: kept[field] for field in now}


@pytest.fixture
def compiled(tmp_path):
    pytest.importorskip("libtpu", reason="pip install cir_jax[tpu-aot]; it needs no TPU")
    # as a user compiles: this suite's other programs are not optimised
    cheap = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    variables = {k: v for k, v in environment(tmp_path).items() if k not in cheap}
    return lambda *flags: run_command(["python", "launch/compile.py", *flags], variables)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS if ASKED == "all" else [ASKED])
def test_compiled_again_it_takes_the_same(name, tmp_path, compiled):
    """The cheapest one; $CIR_JAX_TEST_TPU names another, or all."""
    file = tmp_path / "report.json"
    status, output = compiled(*tpu.ENTRIES[name], f"--json={file}")
    assert status == 0, output[-3000:]
    found = json.loads(file.read_text())
    same = ("stage", "mesh", "batch_size", "trained", "frozen", "unread", "flops")
    pairs = list(zip(REPORTS[name]["stages"], found["stages"], strict=True))
    for was, now in pairs:
        kept = [field for field in same if field in was]
        assert [now[field] for field in kept] == [was[field] for field in kept]
    if found["compiler"] != REPORTS[name]["compiler"]:
        pytest.skip(f"kept of {REPORTS[name]['compiler']}, this is {found['compiler']}")
    for was, now in pairs:
        for field in ("peak", "arguments", "compiled_flops"):
            assert now[field] == pytest.approx(was[field], rel=TOLERANCE), field
        small = sum(moved(was).values()) / 100  # of a kind that hardly moves anything
        assert moved(now) == pytest.approx(moved(was), rel=TOLERANCE, abs=small)


@pytest.mark.slow
def test_what_does_not_fit_says_what_helps(tmp_path, compiled):
    file = tmp_path / "report.json"
    flags = ("--config=experiments/artemis.py:clip_rn50", "--topology=v5e:2x2", f"--json={file}")
    status, output = compiled(*flags, "--config.stage.match.batch_size=1048576")
    assert status == 2, output[-3000:]
    assert re.search(r"a step needs .* of the 15\.75GiB of a chip \(a chip of 16 GiB\)", output)
    assert "What helps: --config.mesh.fsdp=4 (now 1) splits" in output
    (said,) = json.loads(file.read_text())["too_big"]
    assert said in output


@pytest.mark.slow
def test_without_libtpu_it_ends_with_what_to_install(tmp_path):
    """As launch/compile.py does, which it runs."""
    (tmp_path / "libtpu.py").write_text("raise ImportError('it is not installed')")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    made = subprocess.run(
        [sys.executable, str(tpu.ROOT / "benchmarks" / "tpu.py"), "artemis_clip_rn50"],
        env=environment(tmp_path) | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    last = made.stderr.strip().splitlines()[-1]
    assert made.returncode == 2 and last == (
        "error: --topology=v5e:4x4: compiling for a TPU needs libtpu, which is not installed. "
        'pip install "cir_jax[tpu-aot]"; it needs no TPU.'
    )
    assert "Traceback" not in made.stderr


def test_an_entry_that_is_none_is_named():
    with pytest.raises(SystemExit, match="error: unknown entry 'isa_papers'. Did you mean 'isa_p"):
        tpu.main(["artemis_clip_rn50", "isa_papers"])


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
