"""The stages of an experiment, in order, each resumed where it stopped."""

import functools
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from cir_jax import weights
from cir_jax.composers import official, shared
from cir_jax.errors import CheckpointError, ConfigError
from cir_jax.experiment import Experiment, of_stage, stage_names
from cir_jax.sharding import placement
from cir_jax.storage.buckets import place
from cir_jax.training import durations, inversion, optimizers
from cir_jax.training.checkpoints import load_scored
from cir_jax.training.inputs import make_pipeline
from cir_jax.training.loop import Stage, Trainer, check_weights, describe
from cir_jax.training.scores import Scorer


def train(
    experiment: Experiment, workdir: Path, scorer: Scorer | None = None, given: Any = None
) -> Any:
    """Runs the config's stages in order and returns the last one's scored parameters.

    scorer: of checkpoints; the best one is the result of a stage, unless another one continues it
    (it answers no queries yet). None = the last one is. given: of `start`; None = read here.
    A finished stage is read back, an interrupted one resumed, so the same command always continues.
    """
    config = experiment.config
    best = config.checkpoint.get("best", "")
    if best and scorer is None:
        raise ConfigError(
            f"config.checkpoint.best={best!r}: stages.train needs the scorer that "
            "cir_jax.evaluation.selection.scorer(experiment) makes."
        )
    params, before = None, ""
    continued = {stage.after for stage in config.stage.values()}
    given = start(experiment, workdir) if given is None else given
    for name in stage_names(config):
        if config.stage[name].kind == "inversion":
            inversion.run(of_stage(experiment, name), name, workdir)
            continue
        previous = params if before == config.stage[name].after else None
        if before == "" and given is not None:
            previous = given
        initial = initial_params(experiment, name, workdir, previous)
        chosen = None if name in continued else scorer
        trainer = make_trainer(experiment, name, initial, workdir, scorer=chosen)
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
    scorer: Scorer | None = None,
) -> Trainer:
    """The trainer of stage `name`, starting from `initial` (None = fresh parameters).

    shapes_only: zeros in place of everything precomputed, for a dry run. scorer: as `train`'s.
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
    if config.checkpoint.keep < 1:  # 0 would delete what was trained
        raise ConfigError(f"config.checkpoint.keep={config.checkpoint.keep}; it must be 1 or more.")
    stage = Stage(
        name=name,
        steps=steps,
        seed=config.seed,
        optimizer=optimizers.optimizer(recipe.optimizer, steps, to_steps),
        ema=recipe.ema,
        microbatches=recipe.microbatches,
        only=recipe.optimizer.get("only", ".*"),  # not in configs of earlier versions
        scan=config.get("scan", False),
        log_every=config.log_every,
        checkpoint_every=every,
        keep=config.checkpoint.keep,
    )
    composer, frozen, mesh = experiment.composer, experiment.frozen, experiment.mesh
    return Trainer(stage, composer, frozen, pipeline, mesh, initial, scorer)


def start(experiment: Experiment, workdir: Path) -> Any:
    """`given_params`, read before anything is computed or written: they may not fit.

    Raises CheckpointError, too, when the first stage continues one whose result is nowhere.
    """
    given = given_params(experiment)
    names = stage_names(experiment.config)
    trained = [name for name in names if experiment.config.stage[name].kind != "inversion"]
    if given is None and trained and experiment.config.stage[trained[0]].after:
        _continued(experiment, trained[0], workdir)
    if given is not None and trained and as_trained(experiment, trained[0]) is not experiment:
        fits = ",".join(name for name in trained if as_trained(experiment, name) is experiment)
        raise ConfigError(
            f"config.init_from={experiment.config.init_from!r} is of {experiment.config.name}, and "
            f"stage {trained[0]!r} trains another method. "
            + (f"Leave it out: --config.stages={fits}." if fits else "Use launch/eval.py.")
        )
    return given


def given_params(experiment: Experiment) -> Any:
    """The parameters of config.init_from=official:PATH or hub:NAME, on the mesh; None where it is
    neither.

    The first training stage starts from them.
    """
    if experiment.begins_with:
        params = shared.load(experiment.composer, experiment.begins_with)
        return placement.place(experiment.mesh, params)
    paths = official.given(experiment.config.init_from)
    if not paths:
        return None
    host = jax.tree.map(placement.to_host, experiment.frozen)
    return placement.place(experiment.mesh, official.load(experiment.composer, paths, host))


def initial_params(experiment: Experiment, name: str, workdir: Path, previous: Any) -> Any:
    """What stage `name` starts from: the stage before, or config.init_from, or nothing.

    Raises CheckpointError when the stage continues another one whose result is nowhere.
    """
    after = experiment.config.stage[name].after
    if previous is None and not after:
        return None
    stage = of_stage(experiment, name, shapes_only=True)
    if previous is not None:
        return stage.composer.take_over(previous, stage.frozen)
    directory = _continued(experiment, name, workdir)
    params, position = scored_params(as_trained(experiment, after), directory)
    if position["reached"] < position["steps"]:
        raise CheckpointError(
            f"{directory} stopped at step {position['reached']} of {position['steps']}: "
            f"stage {name!r} continues a finished stage. Finish it first."
        )
    return stage.composer.take_over(params, stage.frozen)


def _continued(experiment: Experiment, name: str, workdir: Path) -> Path:
    """The directory of the stage that stage `name` continues. CheckpointError where none is."""
    config = experiment.config
    after = config.stage[name].after
    if config.init_from:
        given = place(config.init_from)
        candidates = [given / after, given]
    else:
        candidates = [workdir / after]
    for directory in candidates:
        if (directory / "checkpoints").is_dir():
            return directory
    raise CheckpointError(
        f"stage {name!r} continues stage {after!r}, of which there is no checkpoint in "
        f"{' or '.join(map(str, candidates))}. Run --config.stages={after},{name}, or set "
        "--config.init_from to a workdir with it."
    )


def as_trained(experiment: Experiment, name: str) -> Experiment:
    """The experiment whose composer has the parameters that stage `name` trains: its own, unless
    the stage trains another method's."""
    own = experiment.config.stage[name].composer.to_dict()
    if own.get("name", experiment.config.composer.name) == experiment.config.composer.name:
        return experiment
    return of_stage(experiment, name, shapes_only=True)


def scored_params(experiment: Experiment, directory: Path) -> tuple[Any, dict[str, Any]]:
    """The scored parameters of a stage directory, of its best checkpoint where checkpoints were
    scored, on the mesh, and their position (`load_scored`)."""
    like = jax.eval_shape(experiment.composer.init, jax.random.key(0))
    tree, position = load_scored(directory / "checkpoints", like)
    check_weights(position, experiment.composer, directory)
    return placement.place(experiment.mesh, tree), position


def required_tables(config: ml_collections.ConfigDict) -> dict[str, set[str]]:
    """Dataset -> tables that the config's stages read."""
    needed: dict[str, set[str]] = {}
    for name in stage_names(config):
        data = config.stage[name].data
        tables = [table for table, weight in data.tables.items() if weight]
        if not data.dataset:
            raise ConfigError(
                f"config.stage.{name}.data.dataset is empty: this preset's corpora do not come "
                f"with the project. Name a prepared dataset with the tables "
                f"{', '.join(tables)}: --config.stage.{name}.data.dataset=NAME."
            )
        needed.setdefault(data.dataset, set()).update(tables)
    return needed


def export(experiment: Experiment, params: Any) -> None:
    """Writes what was trained to config.export_to, if set.

    A backbone as a Hugging Face directory (fp16), a method's own parameters in the format of its
    authors. For others (hub:DIR) it is written when its numbers are there (`evaluation.sharing`).
    """
    if not experiment.config.export_to or shared.given(experiment.config.export_to):
        return
    path = Path(experiment.config.export_to).expanduser()
    composer = experiment.composer
    host, frozen = (jax.tree.map(placement.to_host, tree) for tree in (params, experiment.frozen))
    if jax.process_index() == 0:
        if composer.pretrained_backbone:
            official.save(composer, path, host, frozen)
        else:
            weights.save(path, experiment.backbone, host, np.float16)
        print(f"exported to {path}")
