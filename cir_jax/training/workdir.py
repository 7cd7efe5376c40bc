"""Workdirs: claimed by one config, held by one run, compared and read."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from cir_jax import composers
from cir_jax.errors import CheckpointError, DataError
from cir_jax.experiment import evaluation_dtype
from cir_jax.sharding import together
from cir_jax.storage import faults, lease, locks
from cir_jax.storage.atomic import write_atomically
from cir_jax.training.differences import differing_fields

CONFIG_FILE = "config.json"
FREE_FIELDS = (
    "mesh",
    "frozen",
    "remat",
    "scan",
    "evaluation",
    "log_every",
    "checkpoint.every",
    "checkpoint.keep",
    "workers",
    "threads",
    "prefetch",
    "data_dir",
    "stages",
    "export_to",
)
"""Config fields that may change between runs of one workdir: they do not change what is learned."""
FIELDS = ("name", "seed", "backbone", "dtype", "stages", "init_from", "data_dir", "evaluation")
"""Config fields that workdirs of all versions have."""


def check(workdir: Path, config: ml_collections.ConfigDict) -> None:
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


def say_changes(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Prints what gives other numbers than it did in the version that made the workdir.

    Before `config.evaluation.dtype` was there, evaluation and inversion had the dtype of training.
    """
    if jax.process_index() != 0 or not (workdir / CONFIG_FILE).is_file():
        return
    stored, now = read_config(workdir), evaluation_dtype(config)
    before = stored.get("dtype", now)
    if before != now and "dtype" not in stored.get("evaluation", {}):
        print(
            f"{workdir} is of an earlier version, which evaluated in {before}; now it is {now}, so "
            f"numbers may differ a little. As before: --config.evaluation.dtype={before}",
            flush=True,
        )


def _shaping(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config with fields of later versions, composers' settings as `composers.shaping`."""

    def of(part: Mapping[str, Any]) -> dict[str, Any]:
        settings = part.get("composer")  # {} = that of the experiment
        return {**part, "composer": composers.shaping(settings)} if settings else dict(part)

    stages = {name: of(stage) for name, stage in values.get("stage", {}).items()}
    for stage in stages.values():
        if isinstance(optimizer := stage.get("optimizer"), Mapping):
            stage["optimizer"] = {"only": ".*", "backbone_share": 1.0} | optimizer
        if isinstance(data := stage.get("data"), Mapping) and stage.get("kind") != "inversion":
            stage["data"] = {"reduced_jpeg": False} | data
    checkpoint = {"best": ""} | values.get("checkpoint", {})
    return {"image_size": 0} | of(values) | {"stage": stages, "checkpoint": checkpoint}


def claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes the config into a new workdir, or checks that it is that of the run already there.

    Raises CheckpointError naming the fields that differ, or that the directory is not writable.
    """
    check(workdir, config)
    file, problem = workdir / CONFIG_FILE, ""
    if jax.process_index() == 0 and not file.is_file():
        try:
            text = config.to_json_best_effort(indent=2) + "\n"
            write_atomically(file, lambda stream: stream.write(text.encode()))
        except DataError as error:
            problem = f" ({faults.cause(error)})"
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the config is written")
    # all processes raise together: one that left alone would keep the others waiting
    here = np.atleast_1d(multihost_utils.process_allgather(np.asarray(file.is_file())))
    if not here[0]:
        raise CheckpointError(f"--workdir={workdir} cannot be written{problem}: choose another.")
    if not here.all():
        blind = ", ".join(map(str, np.flatnonzero(~here)))
        raise CheckpointError(
            f"--workdir={workdir} is not seen by process(es) {blind}. It must lie on a disk, or in "
            "a bucket, that all processes share."
        )


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """Holds the lock of the workdir (process 0), which goes when the process dies.

    Raises CheckpointError while another run holds it, and when nothing can be written there.
    """
    if jax.process_index():
        together.meet("the workdir is held")  # process 0 may have to wait for a lease
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.holding(workdir))
        except OSError as error:
            raise CheckpointError(
                f"{workdir}: cannot be locked ({faults.cause(error)}). Choose another --workdir."
            ) from error
        except lease.Taken as taken:
            who = f" ({taken})" if str(taken) else ""
            raise CheckpointError(
                f"{workdir}: another run is at work there{who}. Wait for it, or use a new "
                "--workdir."
            ) from taken
        if jax.process_count() > 1:
            together.meet("the workdir is held")
        yield


def read_config(workdir: Path) -> dict[str, Any]:
    """The config a workdir was made with. Raises CheckpointError when it is no workdir."""
    file = workdir / CONFIG_FILE
    try:
        values = json.loads(file.read_bytes())
        wrong = problem(values)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{workdir}: no {CONFIG_FILE}, so this is no workdir of launch/main.py. "
            "Give --workdir=DIR of a training run."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read now ({faults.cause(error)}).") from error
    except ValueError as error:  # not JSON or not UTF-8
        wrong = f"not valid JSON ({error})"
    if wrong:
        raise CheckpointError(
            f"{file}: {wrong}, so it is not as launch/main.py wrote it. The checkpoints beside it "
            "may be good: put the file back from a copy, or delete it and run main.py with the "
            "--config of that run."
        )
    return values


def problem(values: Any) -> str:
    """In what JSON is not the config of an experiment, "" if it is one."""
    if not isinstance(values, dict):
        return f"holds {type(values).__name__} {str(values)[:40]!r} instead of an object"
    for name in ("composer", "stage"):
        if not isinstance(values.get(name), dict):
            return f"its field {name!r} is no object"
    for name, stage in values["stage"].items():
        if not isinstance(stage, dict) or not isinstance(stage.get("composer", {}), dict):
            return f"its field 'stage.{name}' is no stage"
    lacks = [name for name in FIELDS if name not in values]
    lacks += ["composer.name"] if "name" not in values["composer"] else []
    if lacks:
        return f"it lacks the fields {', '.join(lacks)}"
    if not isinstance(values["evaluation"], dict):
        return "its field 'evaluation' is no object"
    return ""
