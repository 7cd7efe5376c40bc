"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cir_jax.errors import DataError
from cir_jax.storage.places import CACHE_VARIABLE


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """The whole file or none: a temporary file in the same directory, then `os.replace`.

    Raises DataError when the disk is full or the directory is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # the name must not outlive a power cut without content
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space or choose "
            f"another folder: --workdir or --output for results, ${CACHE_VARIABLE} for features."
        ) from error
