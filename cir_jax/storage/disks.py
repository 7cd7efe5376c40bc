"""Which processes see one disk, and what each of them finds there."""

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cir_jax.storage.atomic import write_atomically

PATIENCE = 120
"""Seconds until what one process wrote is seen by all."""
EVERY = 0.25
"""Seconds between looks."""

_Found = TypeVar("_Found")


def until(look: Callable[[], _Found], fine: Callable[[_Found], bool]) -> _Found:
    """What is found when it is fine, or else in the end. All processes find the same, and look as
    often as each other."""
    found = look()
    for _ in range(int(PATIENCE / EVERY)):
        if fine(found):
            break
        time.sleep(EVERY)
        found = look()
    return found


def of_all(number: int) -> list[int]:
    """What each process says; all must call it in one order."""
    if jax.process_count() == 1:
        return [number]
    return multihost_utils.process_allgather(np.asarray(number, np.int32)).tolist()


def sees_process_0(directory: Path) -> bool:
    """Whether what process 0 writes to its directory of this name is here, too; likewise."""
    if jax.process_count() == 1:
        return True
    file, token = directory / "process_0", secrets.randbelow(1 << 31)
    if jax.process_index() == 0:
        write_atomically(file, lambda stream: stream.write(str(token).encode()))
    token = int(multihost_utils.broadcast_one_to_all(np.asarray(token, np.int32)))
    try:
        return file.read_text() == str(token)
    except (OSError, ValueError):
        return False
