"""Files and directories that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cir_jax.errors import DataError
from cir_jax.storage import lease
from cir_jax.storage.buckets import is_remote, os_errors, upload
from cir_jax.storage.places import CACHE_VARIABLE


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """The whole file or none.

    Raises DataError when the disk is full or the directory is not writable, CheckpointError when
    the lease over it was lost.
    """
    try:
        with appearing(path) as scratch, scratch.open("wb") as file:
            write(file)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space or choose "
            f"another folder: --workdir or --output for results, ${CACHE_VARIABLE} for features."
        ) from error


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A local file to make, which then becomes `path`: a temporary one in the same directory, then
    `os.replace`; for a bucket one elsewhere, then one upload. It is gone if the block fails.

    Raises OSError, and CheckpointError when the lease over `path` was lost.
    """
    remote = is_remote(path)
    if remote:
        lease.check(path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(path, Path(tempfile.gettempdir()) if remote else path.parent)
    try:
        yield scratch
        if remote:
            upload(scratch, path)
            scratch.unlink()
        else:
            with scratch.open("rb") as file:
                os.fsync(file.fileno())  # the name must not outlive a power cut without content
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _scratch(path: Path, directory: Path) -> Path:
    """A name of nothing yet: a signal between making and guarding it would leave it there."""
    return directory / f".{path.name}.{secrets.token_hex(4)}"


@contextlib.contextmanager
def new_directory(path: Path, whole: bool = False) -> Iterator[Path]:
    """A scratch directory that takes the place of `path` at the end, or vanishes on an error.

    whole: of all that is in `path`; else other people's files in it stay. Raises OSError.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(path, path.parent)
    try:
        scratch.mkdir(mode=0o700)
        yield scratch
        os.chmod(scratch, 0o755)
        for file in scratch.rglob("*"):  # some writers make files that only their owner may read
            os.chmod(file, 0o755 if file.is_dir() else 0o644)
        if whole and path.exists():
            _take_the_place(path, scratch)
        elif path.exists():
            for file in scratch.iterdir():
                os.replace(file, path / file.name)
            scratch.rmdir()
        else:
            os.replace(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _take_the_place(path: Path, scratch: Path) -> None:
    """Never half of the old: it would be no longer known as ours. Stopped midway, it is back."""
    before = scratch.with_name(f"{scratch.name}.before")
    try:
        os.replace(path, before)
        os.replace(scratch, path)
    except BaseException:
        if before.exists() and not path.exists():
            os.replace(before, path)
        raise
    finally:
        shutil.rmtree(before, ignore_errors=True)


def check_writable(directory: Path) -> None:
    """Raises OSError when nothing can be written in `directory`, which is made."""
    if is_remote(directory):
        probe = directory / f".writable-{os.getpid()}"
        with tempfile.NamedTemporaryFile() as empty:
            upload(Path(empty.name), probe)
        with os_errors(probe), contextlib.suppress(FileNotFoundError):
            probe.unlink()
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass
