"""A directory for one process at a time: the kernel's lock, in a bucket a lease."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from cir_jax.storage import lease
from cir_jax.storage.buckets import is_remote


@contextlib.contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Holds the lock of `directory`, which goes with the process (a lease: a minute later).

    Raises `lease.Taken` while another process holds it, OSError when nothing can be written there.
    """
    if is_remote(directory):
        with lease.holding(directory):
            yield
        return
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise lease.Taken("") from error
        yield
