"""Inversion stages: each image of a table becomes a stored pseudo-word (ArrayRecord, resumable)."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cir_jax.input.tables import Table

if TYPE_CHECKING:
    from cir_jax.training.experiment import Experiment


def run(experiment: "Experiment", name: str, workdir: Path) -> None:
    """Inverts what is not stored yet in `workdir / name`."""
    raise NotImplementedError


def read(experiment: "Experiment", name: str, workdir: Path, table: Table) -> np.ndarray:
    """float32[n, token_dim]: the pseudo-words of the records of `table`, in record order."""
    raise NotImplementedError


def describe(experiment: "Experiment", name: str) -> str:
    """What the stage will do, without computing (--dry_run)."""
    raise NotImplementedError
