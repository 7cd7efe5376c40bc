"""Buckets, `gs://bucket/run`, in the place of folders: paths by etils' epath, files by fsspec.

What an object store has not, and what stands in for it: rename, by an object that appears when its
upload ends (`upload`); append, by a local file that is uploaded again (`storage.growing`); locks,
by a lease (`storage.lease`).
"""

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cir_jax.errors import ConfigError, unknown

CLIENTS = {"gs": "gcsfs"}
"""Scheme -> the package whose client fsspec takes; both are in the extra of that name."""
BLOCK = 2**25
"""Bytes that one request asks for: a client's own few MiB make a large checkpoint wait."""
CLIENT_PACKAGES = ("gcsfs", "aiohttp", "google", "requests")
"""Where the errors of such a client come from."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return "://" in os.fspath(path)


def place(given: str | os.PathLike) -> Path:
    """The absolute path of what is given: of this machine, or one in a bucket, which has the
    methods of a Path (`epath.Path`).

    Raises ConfigError for an address that is no `scheme://bucket/...` of a known scheme, and when
    its client is not installed.
    """
    if not is_remote(given):
        return Path(given).expanduser().absolute()
    text = os.fspath(given)
    scheme, _, name = text.partition("://")
    if scheme not in CLIENTS:
        raise ConfigError(f"{text}: {unknown('kind of address', scheme, CLIENTS)}")
    if not name.strip("/"):
        raise ConfigError(f"{text} names no bucket: {scheme}://BUCKET/FOLDER.")
    if importlib.util.find_spec(CLIENTS[scheme]) is None:
        raise ConfigError(
            f"{text}: {CLIENTS[scheme]} is not installed, which reads and writes there: "
            f"pip install 'cir_jax[{scheme}]'."
        )
    # one client, with TensorFlow or without; asked before epath looks for it
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec
    from etils import epath

    logging.getLogger(CLIENTS[scheme]).addFilter(_raised_anyway)
    # other processes write there, too
    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    return epath.Path(text)


def _raised_anyway(record: logging.LogRecord) -> bool:
    """Drops what a client logs about errors that it also raises: tracebacks at each attempt."""
    return not record.exc_info


def local(given: str | os.PathLike, what: str) -> Path:
    """The absolute path of what must lie on a disk. what: the flag, field or variable that gives
    it. Raises ConfigError for an address of a bucket."""
    if is_remote(given):
        raise ConfigError(
            f"{what}={os.fspath(given)}: this must lie on a disk of this machine. Workdirs and "
            "data_dir may lie in a bucket; copy others there and back."
        )
    return Path(given).expanduser().absolute()


def client(path: Path) -> tuple[Any, str]:
    """fsspec's file system of a path in a bucket, and the path's name there."""
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path))


def files_below(directory: Path) -> dict[str, tuple[int, int | str]]:
    """Name below `directory`, with slashes -> (bytes, version) of its files, of any depth, sorted.

    version: another one when the file was written again (a time, or a bucket's generation). {}
    where there is no such directory.
    """
    if not is_remote(directory):
        found = sorted(path for path in directory.rglob("*") if path.is_file())
        stats = ((path.relative_to(directory).as_posix(), path.stat()) for path in found)
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats}
    system, root = client(directory)
    listed = system.find(root, detail=True)
    return {
        name.removeprefix(root).lstrip("/"): (int(info["size"]), str(info.get("generation")))
        for name, info in sorted(listed.items())
        if not name.endswith("/")  # what some tools make for a folder
    }


def reading(path: Path) -> BinaryIO:
    """Opens a file to read all of it. Raises FileNotFoundError."""
    if not is_remote(path):
        return path.open("rb")
    system, name = client(path)
    return system.open(name, "rb", block_size=BLOCK)


def upload(file: Path, path: Path) -> None:
    """Puts a local file into a bucket, whole or not at all. OSError, whatever the client."""
    system, name = client(path)
    with os_errors(path):
        system.put_file(os.fspath(file), name)


def upload_folder(folder: Path, target: Path, last: Sequence[str]) -> None:
    """Puts the files of a local folder into a bucket, those named `last` after all others, in that
    order. Raises OSError, whatever the client."""
    names = list(files_below(folder))
    for name in [*(name for name in names if name not in last), *last]:
        upload(folder / name, target / name)


def download(path: Path, file: Path) -> None:
    """Gets a file out of a bucket. Raises OSError, whatever the client."""
    with os_errors(path), reading(path) as source, file.open("wb") as target:
        shutil.copyfileobj(source, target, 2**22)


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Makes an OSError with a reason of whatever a client raises; FileNotFoundError stays one."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:  # each client has types of its own
        said = getattr(error, "strerror", "") or " ".join(str(error).split())
        raise OSError(None, said or type(error).__name__, os.fspath(path)) from error
