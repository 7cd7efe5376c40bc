"""Workdirs: claimed by one config, held by one run, compared and read."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from cir_jax import composers
from cir_jax.errors import CheckpointError
from cir_jax.training.differences import differing_fields

CONFIG_FILE = "config.json"
FREE_FIELDS = (
    "mesh",
    "frozen",
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


def _shaping(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config with fields of later versions, composers' settings as `composers.shaping`."""

    def of(part: Mapping[str, Any]) -> dict[str, Any]:
        settings = part.get("composer")  # {} = that of the experiment
        return {**part, "composer": composers.shaping(settings)} if settings else dict(part)

    stages = {name: of(stage) for name, stage in values.get("stage", {}).items()}
    return {"image_size": 0} | of(values) | {"stage": stages}


def claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Writes the config into a new workdir, or checks that it is that of the run already there.

    Raises CheckpointError naming the fields that differ, or that the directory is not writable.
    """
    check(workdir, config)
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
