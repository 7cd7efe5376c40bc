"""Which processes see one disk, and what each of them finds there."""

import secrets
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from cir_jax.storage.atomic import write_atomically


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
