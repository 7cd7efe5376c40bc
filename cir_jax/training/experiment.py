"""From a config to a trained workdir: stages in order, each resumed where it stopped."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cir_jax import composers, weights
from cir_jax.composers.base import Composer
from cir_jax.errors import CheckpointError, ConfigError, unknown
from cir_jax.evaluation.benchmarks import REGISTRY, find
from cir_jax.input.tables import default_data_dir
from cir_jax.models.backbone import Backbone
from cir_jax.retrieval.batches import to_host
from cir_jax.training import durations, inversion, optimizers
from cir_jax.training import mesh as meshes
from cir_jax.training.checkpoints import load_scored
from cir_jax.training.differences import differing_fields
from cir_jax.training.inputs import make_pipeline
from cir_jax.training.loop import Stage, Trainer, check_weights, describe
from cir_jax.weights import official

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
CONFIG_FILE = "config.json"
FREE_FIELDS = (
    "mesh",
    "remat",
    "evaluation",
    "log_every",
    "checkpoint",
    "workers",
    "data_dir",
    "stages",
    "export_to",
)
"""Config fields that may change between runs of one workdir: they do not change what is learned."""


@dataclasses.dataclass
class Experiment:
    """A config brought to life: mesh, backbone, composer, frozen parameters."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    backbone: Backbone
    composer: Composer
    frozen: Any

    @property
    def data_dir(self) -> Path:
        return data_dir(self.config)


def data_dir(config: ml_collections.ConfigDict) -> Path:
    """Where prepared datasets lie: `config.data_dir`, else `$CIR_JAX_DATA`, else the cache."""
    return Path(config.data_dir).expanduser().absolute() if config.data_dir else default_data_dir()


def setup(config: ml_collections.ConfigDict, shapes_only: bool = False) -> Experiment:
    """Loads the backbone and builds the composer.

    shapes_only: see `Composer.freeze`. Raises ConfigError, MeshError, WeightsError.
    """
    if config.dtype not in DTYPES:
        raise ConfigError(unknown("config.dtype", config.dtype, DTYPES))
    mesh = meshes.make_mesh(config.mesh)
    settings = config.composer.to_dict()
    name = settings.pop("name")
    dtype = DTYPES[config.dtype]
    size = config.get("image_size")  # not in configs of earlier versions
    if composers.composer_class(name).pretrained_backbone:
        backbone, params = weights.load(config.backbone, dtype, image_size=size)
    else:
        backbone, params = weights.load_architecture(config.backbone, dtype, image_size=size), {}
    if config.preprocessing:
        backbone = backbone.with_preprocessing(config.preprocessing)
    if config.remat:
        backbone = backbone.with_remat()
    composer = composers.build(name, backbone, **settings)
    frozen = composer.freeze(params, shapes_only)
    if config.export_to and composer.pretrained_backbone:
        official.check_known(composer, f"config.export_to={config.export_to!r}")
        official.check_torch(f"config.export_to={config.export_to!r}")
    if official.given(config.init_from):
        official.check_known(composer, f"config.init_from={config.init_from!r}")
    elif config.init_from and all(not config.stage[s].after for s in stage_names(config)):
        raise ConfigError(
            f"config.init_from={config.init_from!r}: none of the stages "
            f"{', '.join(stage_names(config))} continues another one."
        )
    return Experiment(config, mesh, backbone, composer, meshes.place(mesh, frozen))


def of_stage(experiment: Experiment, name: str, shapes_only: bool = False) -> Experiment:
    """The experiment with the composer of stage `name`, where the stage has one of its own.

    shapes_only: see `Composer.freeze`.
    """
    settings = experiment.config.stage[name].composer.to_dict()
    if not settings:
        return experiment
    composer = composers.build(settings.pop("name"), experiment.backbone, **settings)
    frozen = composer.freeze(experiment.frozen["backbone"], shapes_only)
    frozen = meshes.place(experiment.mesh, frozen)
    return dataclasses.replace(experiment, composer=composer, frozen=frozen)


def stage_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The stages to run, checked against those that the experiment has."""
    wanted = config.stages
    wanted = [wanted] if isinstance(wanted, str) else wanted
    # on the command line, stages=a,b arrives as one name
    wanted = tuple(name.strip() for names in wanted for name in names.split(","))
    for name in wanted:
        if name not in config.stage:
            raise ConfigError(unknown(f"stage of experiment {config.name}:", name, config.stage))
    return wanted


def train(experiment: Experiment, workdir: Path) -> Any:
    """Runs the config's stages in order and returns the last one's scored parameters.

    A finished stage is read back, an interrupted one resumed, so the same command always continues.
    """
    params, before = None, ""
    # read before anything is computed: it may not fit
    given = official_params(experiment)
    for name in stage_names(experiment.config):
        if experiment.config.stage[name].kind == "inversion":
            inversion.run(of_stage(experiment, name), name, workdir)
            continue
        previous = params if before == experiment.config.stage[name].after else None
        if before == "" and given is not None:
            previous = given
        initial = initial_params(experiment, name, workdir, previous)
        trainer = make_trainer(experiment, name, initial, workdir)
        params, before = trainer.run(workdir / name), name
    return params


def dry_run(experiment: Experiment) -> str:
    """Shapes, shardings and bytes per device of every stage; nothing is encoded or trained.

    Builds all stages, so it also finds what is wrong with any of them before the first one runs.
    """
    return "\n".join(
        inversion.describe(of_stage(experiment, name, shapes_only=True), name)
        if experiment.config.stage[name].kind == "inversion"
        else describe(make_trainer(experiment, name, None, shapes_only=True))
        for name in stage_names(experiment.config)
    )


def make_trainer(
    experiment: Experiment,
    name: str,
    initial: Any,
    workdir: Path | None = None,
    shapes_only: bool = False,
) -> Trainer:
    """The trainer of stage `name`, starting from `initial` (None = fresh parameters).

    shapes_only: zeros in place of everything precomputed, for a dry run.
    """
    config, experiment = experiment.config, of_stage(experiment, name, shapes_only)
    recipe = config.stage[name]
    pipeline = make_pipeline(experiment, name, workdir, shapes_only)
    to_steps = functools.partial(
        durations.to_steps,
        batch_size=recipe.batch_size,
        epoch_examples=pipeline.epoch_examples,
    )
    steps = to_steps(recipe.duration, field=f"stage.{name}.duration")
    every = to_steps(config.checkpoint.every, field="checkpoint.every", total_steps=steps)
    for field, value in (("log_every", config.log_every), ("checkpoint.every", every)):
        if value < 1:
            raise ConfigError(f"config.{field} comes to {value} steps; it must be 1 or more.")
    stage = Stage(
        name=name,
        steps=steps,
        seed=config.seed,
        optimizer=optimizers.optimizer(recipe.optimizer, steps, to_steps),
        ema=recipe.ema,
        microbatches=recipe.microbatches,
        log_every=config.log_every,
        checkpoint_every=every,
        keep=config.checkpoint.keep,
    )
    return Trainer(
        stage, experiment.composer, experiment.frozen, pipeline, experiment.mesh, initial
    )


def official_params(experiment: Experiment) -> Any:
    """The parameters of config.init_from=official:PATH, on the mesh; None where it is not set.

    The first training stage starts from them.
    """
    path = official.given(experiment.config.init_from)
    if path is None:
        return None
    host = jax.tree.map(to_host, experiment.frozen)
    return meshes.place(experiment.mesh, official.load(experiment.composer, path, host))


def initial_params(experiment: Experiment, name: str, workdir: Path, previous: Any) -> Any:
    """What stage `name` starts from: the stage before, or config.init_from, or nothing.

    Raises CheckpointError when the stage continues another one whose result is nowhere.
    """
    config = experiment.config
    after = config.stage[name].after
    if previous is not None or not after:
        return previous
    if config.init_from:
        given = Path(config.init_from).expanduser()
        candidates = [given / after, given]
    else:
        candidates = [workdir / after]
    for directory in candidates:
        if (directory / "checkpoints").is_dir():
            params, position = scored_params(experiment, directory)
            if position["next_batch"] < position["steps"]:
                raise CheckpointError(
                    f"{directory} stopped at step {position['next_batch']} of {position['steps']}: "
                    f"stage {name!r} continues a finished stage. Finish it first."
                )
            return params
    raise CheckpointError(
        f"stage {name!r} continues stage {after!r}, of which there is no checkpoint in "
        f"{' or '.join(map(str, candidates))}. Run --config.stages={after},{name}, or set "
        "--config.init_from to a workdir with it."
    )


def scored_params(experiment: Experiment, directory: Path) -> tuple[Any, dict[str, Any]]:
    """The scored parameters of a stage directory, on the mesh, and their position."""
    like = jax.eval_shape(experiment.composer.init, jax.random.key(0))
    tree, position = load_scored(directory / "checkpoints", like)
    check_weights(position, experiment.composer, directory)
    return meshes.place(experiment.mesh, tree), position


def check_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Raises CheckpointError naming the fields in which `config` is not that of the run there."""
    if not (workdir / CONFIG_FILE).is_file():
        return
    values = json.loads(config.to_json_best_effort())
    composer = composers.composer_class(config.composer.name)
    settings = composer.inference_settings
    if not composer.trained:  # words that a stage stored say themselves what they were made of
        settings = tuple(name for name in config.composer if name != "name")
    free = (*FREE_FIELDS, *(f"composer.{name}" for name in settings))
    if differ := differing_fields(_shaping(read_config(workdir)), _shaping(values), free):
        raise CheckpointError(
            f"{workdir} belongs to another run; these fields differ: {'; '.join(differ)}. "
            "Use a new --workdir, or the config of the run there."
        )


def _shaping(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config with fields of later versions, composers' settings as `composers.shaping`."""

    def of(part: Mapping[str, Any]) -> dict[str, Any]:
        settings = part.get("composer")  # {} = that of the experiment
        return {**part, "composer": composers.shaping(settings)} if settings else dict(part)

    stages = {name: of(stage) for name, stage in values.get("stage", {}).items()}
    return {"image_size": 0} | of(values) | {"stage": stages}


def claim_workdir(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes the config into a new workdir, or checks that it is that of the run already there.

    Raises CheckpointError naming the fields that differ, or that the directory is not writable.
    """
    check_workdir(workdir, config)
    file, problem = workdir / CONFIG_FILE, ""
    if jax.process_index() == 0 and not file.is_file():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(".tmp")
            scratch.write_text(config.to_json_best_effort(indent=2) + "\n")
            os.replace(scratch, file)
        except OSError as error:
            problem = f" ({error.strerror})"
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the config is written")
    # all processes raise together: one that left alone would keep the others waiting
    here = np.atleast_1d(multihost_utils.process_allgather(np.asarray(file.is_file())))
    if not here[0]:
        raise CheckpointError(f"--workdir={workdir} cannot be written{problem}: choose another.")
    if not here.all():
        blind = ", ".join(map(str, np.flatnonzero(~here)))
        raise CheckpointError(
            f"--workdir={workdir} is not seen by process(es) {blind}. It must lie on a disk that "
            "all processes share."
        )


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """Holds the lock of the workdir (process 0); the kernel drops it when the process dies.

    Raises CheckpointError while another run holds it.
    """
    if jax.process_index():
        yield
        return
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{workdir}: another run is at work there. Wait for it, or use a new --workdir."
            ) from error
        yield


def read_config(workdir: Path) -> dict[str, Any]:
    """The config a workdir was made with. Raises CheckpointError when it is no workdir."""
    file = workdir / CONFIG_FILE
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{workdir}: no {CONFIG_FILE}, so this is no workdir of launch/main.py. "
            "Give --workdir=DIR of a training run."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}).") from error


def required_tables(
    config: ml_collections.ConfigDict, training: bool = True
) -> dict[str, list[str]]:
    """Dataset -> tables that the config's stages (if training) and benchmarks read."""
    needed: dict[str, list[str]] = {}
    for name in stage_names(config) if training else ():
        data = config.stage[name].data
        tables = [table for table, weight in data.tables.items() if weight]
        if not data.dataset:
            raise ConfigError(
                f"config.stage.{name}.data.dataset is empty: this preset's corpora do not come "
                f"with the project. Name a prepared dataset with the tables "
                f"{', '.join(tables)}: --config.stage.{name}.data.dataset=NAME."
            )
        needed.setdefault(data.dataset, []).extend(tables)
    for benchmark in config.evaluation.benchmarks:
        if benchmark.partition(":")[0] not in REGISTRY:
            raise ConfigError(unknown("benchmark", benchmark, REGISTRY))
        entry = find(benchmark)
        needed.setdefault(entry.dataset, []).extend(entry.tables)
    return {dataset: sorted(set(tables)) for dataset, tables in needed.items()}


def export(experiment: Experiment, params: Any) -> None:
    """Writes what was trained to config.export_to, if set.

    A backbone as a Hugging Face directory (fp16), a method's own parameters in the format of its
    authors.
    """
    if not experiment.config.export_to:
        return
    path = Path(experiment.config.export_to).expanduser()
    composer = experiment.composer
    host, frozen = (jax.tree.map(to_host, tree) for tree in (params, experiment.frozen))
    if jax.process_index() == 0:
        if composer.pretrained_backbone:
            official.save(composer, path, host, frozen)
        else:
            weights.save(path, experiment.backbone, host, np.float16)
        print(f"exported to {path}")
