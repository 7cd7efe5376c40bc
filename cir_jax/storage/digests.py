"""Digests of a directory's files: whether what is read is still what was written.

`digests.json` in the directory holds size and SHA-256 of each file below it, and a checksum of
itself. It must be byte for byte what this module would write, so that no flipped bit in it passes.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.buckets import files_below, reading

NAME = "digests.json"


def add(directory: Path, leave_out: Collection[str] = ()) -> None:
    """Stores the digests of all files below `directory` that have none yet.

    leave_out: names of files that are still going to change. Raises OSError when a file cannot be
    read, DataError when the digests cannot be written.
    """
    stored = _stored(directory) or {}
    found = {
        name: stored.get(name) or _digest(directory / name)
        for name in _names(directory)
        if Path(name).name not in leave_out
    }
    if found != stored:
        content = _text(found)
        write_atomically(directory / NAME, lambda file: file.write(content))


def damage(
    directory: Path, below: Collection[str] | None = None, part: tuple[int, int] = (0, 1)
) -> list[tuple[str, str]] | None:
    """(file, what is wrong with it) of all that is not as it was stored; None without digests.

    below: only the files in these folders and those directly in `directory`; None = all.
    part: (i, n) looks at every n-th file from the i-th on, the largest first, for n processes that
    share the work. Files without a digest are left alone. Raises OSError when the disk does not
    answer: that says nothing about the files.
    """
    try:
        stored = _stored(directory)
    except ValueError as error:
        return [(NAME, str(error))]
    if stored is None:
        return None
    wanted = [
        name
        for name in sorted(stored, key=lambda name: (-stored[name][0], name))
        if below is None or "/" not in name or name.partition("/")[0] in below
    ]
    found = []
    for name in wanted[part[0] :: part[1]]:
        size, digest = stored[name]
        try:
            now, content = _digest(directory / name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            found.append((name, "is missing"))
            continue
        if now != size:
            found.append((name, f"has {now} bytes instead of {size}"))
        elif content != digest:
            found.append((name, "its content has changed"))
    return found


def listed(directory: Path) -> dict[str, int] | None:
    """Name -> bytes of the files that have a digest; None without digests. Raises ValueError when
    the digests themselves are damaged."""
    stored = _stored(directory)
    return None if stored is None else {name: size for name, (size, _) in stored.items()}


def _names(directory: Path) -> list[str]:
    return [name for name in files_below(directory) if name != NAME]


def _digest(path: Path) -> tuple[int, str]:
    with reading(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _stored(directory: Path) -> dict[str, tuple[int, str]] | None:
    """ValueError when the digests themselves are damaged, None when there are none."""
    try:
        content = (directory / NAME).read_bytes()
    except FileNotFoundError:
        return None
    try:
        files = json.loads(content)["files"]
        found = {name: (int(size), str(digest)) for name, (size, digest) in files.items()}
        whole = _text(found) == content
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ValueError("is damaged itself; without it, the other files are read unverified")
    return found


def _text(files: dict[str, tuple[int, str]]) -> bytes:
    listed = {name: list(value) for name, value in sorted(files.items())}
    checksum = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return json.dumps({"files": listed, "sha256": checksum}, indent=1).encode() + b"\n"
