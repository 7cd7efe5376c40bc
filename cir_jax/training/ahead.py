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
from jax.interpreters import partial_eval

from cir_jax.errors import MeshError
from cir_jax.experiment import Experiment, of_stage
from cir_jax.sharding import hlo
from cir_jax.sharding.mesh import count_slices, row_shards
from cir_jax.training import flops, inversion
from cir_jax.training.inputs import TABLES
from cir_jax.training.stages import make_trainer

WORLD = "shapes_tiny"
"""Its tables stand in for those of the stages: a batch's shapes are the backbone's and stage's."""

LARGEST = 8
"""Arrays that a report names."""


class TooBig(MeshError):
    """A step does not fit into a device's memory."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What one step of a stage takes, or one batch of a stage that inverts images.

    trained, frozen: parameters, of the frozen ones those that it reads. seconds, cpu_seconds: to
    compile. peak, arguments: bytes on each device, at most and of what a step is given. unread:
    bytes beside these, of what is frozen and lies there for other stages and evaluation. flops: of
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
    unread: int
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


def trace_stage(experiment: Experiment, name: str) -> tuple[jax.stages.Traced, Any, Any]:
    """What stage `name` runs, of (state, frozen, ...), traced from shapes; and these two."""
    if experiment.config.stage[name].kind == "inversion":
        own = of_stage(experiment, name, shapes_only=True)
        return inversion.trace(own, name), {}, own.frozen
    trainer = make_trainer(experiment, name, None, shapes_only=True)
    traced = trainer.step.trace(trainer.abstract_state(), trainer.frozen, trainer.abstract_batch())
    return traced, trainer.abstract, trainer.frozen


def compile_stage(experiment: Experiment, name: str, memory_gib: float | None = None) -> Report:
    """Compiles stage `name` of an experiment that was set up for `devices`.

    memory_gib: of a device; None = as much as is asked for. Raises TooBig, which says what to
    change, where it does not hold the step and what lies there beside it; MeshError where rows do
    not divide over the devices.
    """
    traced, *given = trace_stage(experiment, name)
    asked = flops.of_products(traced.jaxpr)
    trained, frozen, unread = parameters(traced, *given)
    start = time.perf_counter(), time.process_time()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        of_chip = f" (a chip of {memory_gib} GiB)" if memory_gib else ""
        raise TooBig(too_big(experiment, name, f"{needed(str(error))}{of_chip}")) from error
    seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    memory, text = compiled.memory_analysis(), compiled.as_text()
    held = (memory.peak_memory_in_bytes + unread) / 2**30
    if memory_gib and held > memory_gib:
        needs = (
            f"needs {held:.2f} of the {memory_gib} GiB of a chip, {unread / 2**30:.2f} of them for "
            "frozen parameters that it does not read"
        )
        raise TooBig(too_big(experiment, name, needs))
    return Report(
        stage=name,
        mesh=dict(experiment.mesh.shape),
        batch_size=experiment.config.stage[name].batch_size,
        trained=trained,
        frozen=frozen,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        peak=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        unread=unread,
        flops=asked,
        compiled_flops=compiled.cost_analysis()["flops"],
        collectives=hlo.traffic(text),
        largest=hlo.largest(text, LARGEST),
    )


def needed(said: str) -> str:
    """What libtpu says of a program that does not fit, in one of its two ways."""
    size = r"([\d.]+[KMGT]?)"
    if match := re.search(rf"Used {size} of {size} hbm", said):
        return f"needs {match[1]}iB of the {match[2]}iB of a chip"
    if match := re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", said):
        return f"needs {match[1]}iB for what it computes on the way, of the {match[2]}iB of a chip"
    return f"needs more than the memory of a chip: {said.splitlines()[0]}"


def too_big(experiment: Experiment, name: str, needs: str) -> str:
    """Message: what a step needs, and what to change."""
    config, mesh = experiment.config, experiment.mesh
    recipe = config.stage[name]
    ways = []
    rows = row_shards(mesh)
    most = rows // count_slices(mesh.devices.flat)
    if mesh.shape["fsdp"] < most:
        ways.append(
            f"--config.mesh.fsdp={most} (now {mesh.shape['fsdp']}) splits parameters and optimizer "
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
    ways.append("more chips")
    return (
        f"stage {name!r} of {config.name} on mesh {dict(mesh.shape)}: a step {needs}. "
        f"What helps: {'; '.join(ways)}."
    )


def parameters(traced: jax.stages.Traced, state: Any, frozen: Any) -> tuple[int, int, int]:
    """Of what `trace_stage` gives: values of floating point that are trained, and frozen ones that
    are read; bytes on each device of the frozen arrays that are not."""
    jaxpr = traced.jaxpr.jaxpr
    _, read = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    first = len(jax.tree.leaves(state))
    leaves = jax.tree.leaves(frozen)
    given = list(zip(leaves, read[first : first + len(leaves)], strict=True))
    return (
        sum(map(_values, jax.tree.leaves(getattr(state, "params", {})))),
        sum(_values(leaf) for leaf, is_read in given if is_read),
        sum(_bytes(leaf) for leaf, is_read in given if not is_read),
    )


def _values(leaf: Any) -> int:
    return math.prod(leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else 0


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """On each device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


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
        f"  {'  beside it, not read':28}{report.unread / 2**30:12.2f}",
        f"  {'TFLOP of products, all':28}{report.flops / 1e12:12.3f}",
        f"  {'TFLOP per device, compiled':28}{report.compiled_flops / 1e12:12.3f}",
    ]
    for kind, each in sorted(report.collectives.items()):
        lines.append(f"  {kind:28}{each.bytes / 2**20:12.1f} MiB in {each.count}")
    lines.append("  largest arrays of a device")
    for size, shape, of in report.largest:
        lines.append(f"    {size / 2**20:9.1f} MiB  {shape:28} {of}")
    return "\n".join(lines)
