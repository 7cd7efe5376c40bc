"""Locks between processes, which end with whoever holds them, however that ends."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from cir_jax.storage import lease
from cir_jax.storage.buckets import is_remote


@contextlib.contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Holds a directory for this process alone: by the kernel's lock, in a bucket by a lease, which
    goes a minute after the process.

    Raises `lease.Taken` while another process holds it, OSError when nothing can be written there.
    """
    if is_remote(directory):
        with lease.holding(directory):
            yield
        return
    with locked(directory / ".lock", wait=False) as alone:
        if not alone:
            raise lease.Taken("")
        yield


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process alone is in here now, by a lock on the file at `path`, which is made.

    wait: until it is. Raises OSError where the file cannot be made.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
