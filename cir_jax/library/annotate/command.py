"""`cir annotate`: its options."""

import argparse
import getpass
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cir_jax.library.serve import command as serving

if TYPE_CHECKING:
    from cir_jax.library.annotate.tasks import Tasks

METHODS = ("slerp", "image_text")
"""Whose finds are pooled, where none is given."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the benchmark; what is there goes on")
    add("--export", action="store_true", help="writes what is finished as CIRCO's files, and ends")
    serving.add_options(parser)


def server(tasks: "Tasks", host: str, token: str) -> Any:
    """A uvicorn server; `run(sockets=[...])` serves until it is interrupted."""
    from cir_jax.library.annotate.app import application

    return serving.running(application(tasks, host, token))


def annotator() -> str:
    """Who sits here, as far as is known."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user, as in some containers
        return ""


def summary(done: Mapping[str, Any]) -> str:
    """What an export has come to, in one line."""
    parts = [f"queries: {done['queries']}", f"right answers: {done['answers']}"]
    if done["found"] is not None:
        parts.append(f"an estimated {100 * done['found']:.1f} % of all that there are")
    if done["kappa"] is not None:
        parts.append(f"agreement (kappa) {done['kappa']:.2f}")
    return ", ".join(parts)
