"""Stages compiled ahead of time: without weights and data of their own, on virtual devices."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cir_jax import composers, weights
from cir_jax import experiment as experiments
from cir_jax.errors import MeshError
from cir_jax.loading import read_experiment
from cir_jax.sharding import topologies
from cir_jax.training import ahead, flops, inputs, inversion, stages
from tests import tiny as factory
from tests.launch.binaries import environment, run, run_command


def set_up(name, monkeypatch, **fields):
    """An experiment for four devices; its weights and tables must not be read."""

    def refused(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights, "load", refused)
    monkeypatch.setattr(inputs, "Table", lambda *_: factory.caption_table(8))
    config = ahead.stand_in(read_experiment(name))
    config.mesh.fsdp = 2
    config.update_from_flattened_dict(fields)
    return experiments.setup(config, devices=topologies.devices("cpu:4"))


def test_a_step_is_compiled_without_weights_and_data(monkeypatch):
    experiment = set_up("pic2word:smoke", monkeypatch)
    leaves = jax.tree.leaves(experiment.frozen)
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    report = ahead.compile_stage(experiment, "contrastive")
    assert report.mesh == {"data": 2, "fsdp": 2, "tensor": 1} and report.batch_size == 32
    stored = weights.load_architecture(experiment.config.backbone)
    shapes = jax.eval_shape(stored.init, jax.random.key(0))
    text, whole = (
        sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for tree in (shapes["text"], shapes)
    )
    # features stand for the images, so that the image tower is not read
    assert text < report.frozen < text + 0.1 * whole < whole and report.trained > 0
    # which lies there all the same, for evaluation
    assert report.unread == pytest.approx(4 * (whole - report.frozen) / 2, rel=0.02)
    held = report.peak + report.unread
    with pytest.raises(ahead.TooBig, match=f"{held / 2**30:.2f} of the 0.001 GiB.*does not read"):
        ahead.compile_stage(experiment, "contrastive", memory_gib=0.001)
    # products are most of what the compiler counts
    assert report.flops == pytest.approx(4 * report.compiled_flops, rel=0.3)
    # what is frozen is split over fsdp, and gathered
    assert 2 * text < report.collectives["all-gather"].bytes < 2 * 4 * text
    assert report.arguments < report.peak and report.largest[0][0] >= report.largest[-1][0]
    said = ahead.describe(report, memory_gib=16)
    assert "stage contrastive: 32 rows on 4 devices (data=2, fsdp=2, tensor=1)" in said
    assert (
        "of 16" in said
        and "beside it, not read" in said
        and "all-gather" in said
        and report.largest[0][1] in said
    )


def test_every_preset_of_known_backbones_can_be_traced(monkeypatch):
    """Of a paper's size, from shapes alone."""
    experiment = set_up("pic2word:vit_l14", monkeypatch)
    trainer = stages.make_trainer(experiment, "contrastive", None, shapes_only=True)
    (images,) = trainer.abstract_batch().values()
    assert images.shape == (1024, 224, 224, 3)
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(experiment.frozen)) == 427_616_513


def test_too_big_says_what_to_change(monkeypatch):
    experiment = set_up("pic2word:smoke", monkeypatch, frozen="replicated")

    def lower(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.30G of 15.75G hbm. Exceeded hbm capacity by 4.55G."
        )

    monkeypatch.setattr(jax.stages.Traced, "lower", lower)
    with pytest.raises(MeshError) as raised:
        ahead.compile_stage(experiment, "contrastive", memory_gib=16)
    said = str(raised.value)
    assert "needs 20.30GiB of the 15.75GiB of a chip (a chip of 16 GiB)" in said
    for change in (
        "--config.mesh.fsdp=4 (now 2)",
        "--config.frozen=split",
        "--config.remat=True",
        "--config.stage.contrastive.microbatches=2 (now 1)",
        "--config.stage.contrastive.batch_size (now 32) lower",
    ):
        assert change in said

    changed = {"mesh.fsdp": 4, "remat": True, "stage.contrastive.batch_size": 4}
    nothing_left = set_up("pic2word:smoke", monkeypatch, **changed)
    with pytest.raises(MeshError, match=r"a chip\. What helps: more chips\.$"):
        ahead.compile_stage(nothing_left, "contrastive")

    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(jax.stages.Traced, "lower", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        ahead.compile_stage(experiment, "contrastive")


def test_what_libtpu_says_of_memory():
    """As 0.0.42.1 did; the other way is above."""
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (5.51T) exceeds available HBM (15.75G)."
    )
    assert ahead.needed(said) == (
        "needs 5.51TiB for what it computes on the way, of the 15.75GiB of a chip"
    )
    assert ahead.needed("RESOURCE_EXHAUSTED: no words for it\nmore").endswith(
        "more than the memory of a chip: RESOURCE_EXHAUSTED: no words for it"
    )


def test_the_world_stands_in_for_tables_of_the_user():
    given = read_experiment("searle:vit_l14").lock()  # as the binaries have it
    made = ahead.stand_in(given)
    data = made.stage.oti.data, made.stage.distil.data
    assert all(each.dataset == ahead.WORLD and each.split == "train" for each in data)
    assert all(dict(each.tables) == {"captions": 1.0, "images": 0.0} for each in data)
    assert ahead.stand_in(read_experiment("searle")).stage.oti.data.split == "train"
    assert ahead.stand_in(read_experiment("lincir:vit_l14")).stage.smp.data.example == (
        "masked_captions"
    )


def test_a_stage_that_inverts_is_traced_with_its_loop(monkeypatch):
    experiment = set_up("searle:smoke", monkeypatch)
    stage = experiments.of_stage(experiment, "oti", shapes_only=True)
    once, thrice = (
        flops.of_products(inversion.trace(iterated(stage, count), "oti").jaxpr) for count in (1, 3)
    )
    assert 2.5 < thrice / once < 3


def iterated(experiment, count):
    settings = dict(experiment.composer.settings) | {"iterations": count}
    composer = composers.build(settings.pop("name"), experiment.backbone, **settings)
    return dataclasses.replace(experiment, composer=composer)


@pytest.mark.slow
def test_the_binary(tmp_path):
    file, programs = tmp_path / "report.json", tmp_path / "programs"
    flags = ("--config=experiments/lincir.py:smoke", "--topology=cpu:4", f"--json={file}")
    command = ["python", "launch/compile.py", *flags, "--config.mesh.fsdp=2"]
    variables = environment(tmp_path) | {"JAX_COMPILATION_CACHE_DIR": str(programs)}
    status, output = run_command(command, variables)
    assert status == 0, output
    assert not programs.is_dir() or not list(programs.iterdir())  # it compiles anew each time
    report = json.loads(file.read_text())
    (stage,) = report["stages"]
    assert set(stage) == {field.name for field in dataclasses.fields(ahead.Report)}
    assert report["devices"] == 4 and report["compiler"].startswith("jaxlib ")
    assert "stage smp: 32 rows on 4 devices" in output and not report["too_big"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("lincir.py:smoke", "--topology=v5e"), "--topology=v5e: expected v5e:4x4 or so"),
        (("slerp.py", "--topology=cpu:4"), "slerp trains nothing: it has no step to compile"),
        # found before minutes of compiling
        (
            ("lincir.py:smoke", "--topology=cpu:4", f"--json={__file__}/x"),
            f"{__file__}: File exists",
        ),
        (
            ("lincir.py:smoke", "--topology=cpu:3"),
            "batch_size=32 is not divisible by data x fsdp = 3",
        ),
    ],
)
def test_what_the_binary_refuses(flags, message, tmp_path):
    status, output = run(
        "compile", f"--config=experiments/{flags[0]}", *flags[1:], scratch=tmp_path
    )
    assert status == 2 and f"error: {message}" in output.replace("stage.smp.", ""), output
