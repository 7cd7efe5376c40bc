"""The stages of an experiment, compiled for devices that need not be here: what they will take.

    experiment = cir_jax.experiment.setup(stand_in(config), devices=topologies.devices("v5e:4x4"))
    for name in stage_names(config):
        print(compile_stage(experiment, name))

Neither weights nor the data of the stages are read. Texts are as long as they can be.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from cir_jax.errors import MeshError
from cir_jax.experiment import Experiment, of_stage
from cir_jax.sharding import hlo
from cir_jax.sharding.mesh import row_shards
from cir_jax.training import flops, inversion
from cir_jax.training.inputs import TABLES
from cir_jax.training.stages import make_trainer

WORLD = "shapes_tiny"
"""Its tables stand in for those of the stages: a batch's shapes are the backbone's and stage's."""

LARGEST = 8
"""Arrays that a report names."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What one step of a stage takes, or one batch of a stage that inverts images.

    trained, frozen: parameters, of the frozen ones those that it reads. seconds, cpu_seconds: to
    compile. peak, arguments: bytes on each device, at most and of what a step is given. flops: of
    products, on all devices, as asked.
    compiled_flops: of all, on each device, as the compiler counts, which counts a loop once.
    collectives: see `hlo.Traffic`. largest: bytes, type and shape, and what of, of the largest
    arrays of a device.
    """

    stage: str
    mesh: dict[str, int]
    batch_size: int
    trained: int
    frozen: int
    seconds: float
    cpu_seconds: float
    peak: int
    arguments: int
    flops: int
    compiled_flops: float
    collectives: dict[str, hlo.Traffic]
    largest: list[tuple[int, str, str]]


def stand_in(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config with the embedded world's tables in the place of those that its stages read."""
    made = config.copy_and_resolve_references()
    for stage in made.stage.values():
        data = stage.data
        data.dataset = WORLD
        data.split = "train"
        for table in ("images", "texts"):  # the world has them as captions with their images
            if data.tables.get(table):
                if stage.kind != "inversion":
                    data.example = data.example or TABLES[table]
                data.tables.captions = data.tables[table]
                data.tables[table] = 0.0
    return made


def compile_stage(experiment: Experiment, name: str, memory_gib: float | None = None) -> Report:
    """Compiles stage `name` of an experiment that was set up for `devices`.

    memory_gib: of a device, for the message. Raises MeshError that says what to change where a
    device's memory does not hold the step.
    """
    recipe = experiment.config.stage[name]
    if recipe.kind == "inversion":
        given = ({}, experiment.frozen)
        traced = inversion.trace(of_stage(experiment, name, shapes_only=True), name)
    else:
        trainer = make_trainer(experiment, name, None, shapes_only=True)
        traced = trainer.step.trace(
            trainer.abstract_state(), trainer.frozen, trainer.abstract_batch()
        )
        given = (trainer.abstract, trainer.frozen)
    asked, trained, frozen = flops.of_products(traced.jaxpr), *_parameters(traced, *given)
    start = time.perf_counter(), time.process_time()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MeshError(too_big(experiment, name, str(error), memory_gib)) from error
    seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Report(
        stage=name,
        mesh=dict(experiment.mesh.shape),
        batch_size=recipe.batch_size,
        trained=trained,
        frozen=frozen,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        peak=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        flops=asked,
        compiled_flops=compiled.cost_analysis()["flops"],
        collectives=hlo.traffic(text),
        largest=hlo.largest(text, LARGEST),
    )


def too_big(experiment: Experiment, name: str, said: str, memory_gib: float | None) -> str:
    """Message: how much is missing, and what to change.

    said: what the compiler said, which tells how much it would use of how much.
    """
    used = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", said)
    needs = f"needs {used[1]}iB of the {used[2]}iB" if used else "needs more than the memory"
    config, mesh = experiment.config, experiment.mesh
    recipe = config.stage[name]
    of_chip = f" (a chip of {memory_gib} GiB)" if memory_gib else ""
    ways = []
    rows = row_shards(mesh)
    if mesh.shape["fsdp"] < rows:
        ways.append(
            f"--config.mesh.fsdp={rows} (now {mesh.shape['fsdp']}) splits parameters and optimizer "
            "over more chips"
        )
    if config.get("frozen", "split") != "split":
        ways.append("--config.frozen=split splits what is not trained")
    if recipe.kind != "inversion":
        if not config.remat:
            ways.append("--config.remat=True keeps less of the backbone's layers")
        parts = 2 * recipe.microbatches
        if recipe.batch_size % (parts * rows) == 0:
            ways.append(
                f"--config.stage.{name}.microbatches={parts} (now {recipe.microbatches}) encodes "
                "the batch in more parts"
            )
    if recipe.batch_size > rows:
        ways.append(f"--config.stage.{name}.batch_size (now {recipe.batch_size}) lower")
    ways.append("or take more chips")
    return (
        f"stage {name!r} of {config.name} on mesh {dict(mesh.shape)}: a step {needs} of a chip"
        f"{of_chip}. Change one of these: {'; '.join(ways)}."
    )


def _parameters(traced: jax.stages.Traced, state: Any, frozen: Any) -> tuple[int, int]:
    """Values of floating point that are trained, and frozen ones that a program of (state, frozen,
    ...) reads."""
    jaxpr = traced.jaxpr.jaxpr
    read = {id(x) for each in jaxpr.eqns for x in each.invars}
    first = len(jax.tree.leaves(state))
    leaves = jax.tree.leaves(frozen)
    given = zip(leaves, jaxpr.invars[first : first + len(leaves)], strict=True)
    return (
        sum(map(_values, jax.tree.leaves(getattr(state, "params", {})))),
        sum(_values(leaf) for leaf, x in given if id(x) in read),
    )


def _values(leaf: Any) -> int:
    return math.prod(leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else 0


def describe(report: Report, memory_gib: float | None = None) -> str:
    """A table of a report, sizes as a reader wants them."""
    sizes = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    chips = math.prod(report.mesh.values())
    of_chip = f" of {memory_gib}" if memory_gib else ""
    lines = [
        f"stage {report.stage}: {report.batch_size} rows on {chips} devices ({sizes})",
        f"  {'seconds to compile':28}{report.seconds:12.1f} ({report.cpu_seconds:.1f} of CPU)",
        f"  {'GiB per device, at most':28}{report.peak / 2**30:12.2f}{of_chip}",
        f"  {'  of that, given':28}{report.arguments / 2**30:12.2f}",
        f"  {'TFLOP of products, all':28}{report.flops / 1e12:12.3f}",
        f"  {'TFLOP per device, compiled':28}{report.compiled_flops / 1e12:12.3f}",
    ]
    for kind, each in sorted(report.collectives.items()):
        lines.append(f"  {kind:28}{each.bytes / 2**20:12.1f} MiB in {each.count}")
    lines.append("  largest arrays of a device")
    for size, shape, of in report.largest:
        lines.append(f"    {size / 2**20:9.1f} MiB  {shape:28} {of}")
    return "\n".join(lines)
