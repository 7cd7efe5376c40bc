"""The folder of a table: whether it is whole, and whose it is while it is built."""

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from cir_jax.storage import buckets, locks
from cir_jax.storage.places import default_uploads_dir

TABLE_FILES = ("features.json", "dataset_info.json")


def is_built(directory: Path) -> bool:
    """Whether the folder holds a table; `TABLE_FILES` are written last."""
    return all((directory / f).is_file() for f in TABLE_FILES)


@contextlib.contextmanager
def building(folder: Path, refuse: Callable[[Path], None]) -> Iterator[Path | None]:
    """Where to build the table of `folder`, None if it is built already, perhaps meanwhile.

    That is the folder itself; for one in a bucket, a local folder that is uploaded afterwards.
    refuse: raises if the table in a folder is not the one that would be built.
    """
    here = folder
    if buckets.is_remote(folder):
        digest = hashlib.sha256(os.fspath(folder.parent).encode()).hexdigest()[:24]
        here = default_uploads_dir() / digest / folder.name
    with locked(here.parent):
        built = next((there for there in (folder, here) if is_built(there)), None)
        if built is not None:
            refuse(built)
        yield here if built is None else None
        if built == folder:
            return
        if here != folder:
            print(f"uploading it to {folder}", file=sys.stderr, flush=True)
            buckets.upload_folder(here, folder, last=TABLE_FILES)
            shutil.rmtree(here)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock on the folder, waiting for it if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(locks.locked(folder / ".lock", wait=False)):
            logging.warning("another process is building %s: waiting for it", folder)
            stack.enter_context(locks.locked(folder / ".lock", wait=True))
        yield
