"""Photos of the library and uploads, by id: "p12" is photo 12 of the store, "u..." an upload.

No name of a file comes from a client. What the store calls a photo is opened below its folder
without following a link anywhere on the way, since a file may have become one after it was indexed.
"""

import os
import re
import stat
import threading
from collections import OrderedDict
from pathlib import Path

from cir_jax.errors import DataError
from cir_jax.library import photos, thumbnails
from cir_jax.library.serve.refusal import Refusal
from cir_jax.library.store import Store

SIDES = {"small": thumbnails.SMALL, "large": thumbnails.LARGE}
HELD_UPLOADS = 100_000_000
HELD_THUMBNAILS = 64_000_000
"""Bytes; beyond them, what was not used for longest is forgotten."""

MEGAPIXELS = 64.0
"""Of an upload: its bytes may be few, and its pixels are decoded in memory."""

_ID = re.compile(r"p([1-9][0-9]{0,17})|u[0-9a-f]{32}")


class Kept:
    """Bytes by key, of which the last used are kept."""

    def __init__(self, most: int):
        self._most, self._size, self._lock = most, 0, threading.Lock()
        self._items: OrderedDict[object, bytes] = OrderedDict()

    def get(self, key: object) -> bytes | None:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: object, value: bytes) -> None:
        with self._lock:
            self._size += len(value) - len(self._items.pop(key, b""))
            self._items[key] = value
            while self._size > self._most:
                self._size -= len(self._items.popitem(last=False)[1])


class Pictures:
    """What `Library.search` and thumbnails are given for an id."""

    def __init__(self, folder: Path, store: Store):
        self._folder, self._store = folder, store
        self._uploads, self._thumbnails = Kept(HELD_UPLOADS), Kept(HELD_THUMBNAILS)

    def content(self, number: str) -> bytes:
        """The file of an id. Raises Refusal where there is none, or none any more."""
        return self._opened(number)[0]

    def path(self, number: str) -> bytes | None:
        """Of a photo, below the folder; None for what is no photo of it."""
        match = _ID.fullmatch(number)
        if match is None or match[1] is None:
            return None
        return self._store.paths([int(match[1])])[0]

    def size(self, number: str, side: str) -> tuple[int, int]:
        """(width, height) of its thumbnail."""
        return thumbnails.size(photos.size(self.content(number), "the picture"), SIDES[side])

    def thumbnail(self, number: str, side: str) -> bytes:
        """A JPEG, turned as EXIF says, that says nothing else of its file."""
        content, version = self._opened(number)
        key = (number, side, version)
        if (made := self._thumbnails.get(key)) is None:
            made = thumbnails.jpeg(content, "the picture", SIDES[side])
            self._thumbnails.put(key, made)
        return made

    def keep(self, content: bytes) -> tuple[str, tuple[int, int]]:
        """An upload: its id and its size, after all of it could be read.

        Raises DataError for what is no picture of `photos.FORMATS`, damaged, or over `MEGAPIXELS`.
        """
        width, height = photos.header(content, "the picture").size
        if width * height > 1e6 * MEGAPIXELS:
            raise DataError(
                f"the picture has {width} x {height} pixels; at most {MEGAPIXELS:g} megapixels are "
                "taken here. Make it smaller."
            )
        number = f"u{photos.digest(content).hex()}"
        made = thumbnails.jpeg(content, "the picture", SIDES["large"])
        self._thumbnails.put((number, "large", None), made)
        self._uploads.put(number, content)
        return number, photos.size(content, "the picture")

    def _opened(self, number: str) -> tuple[bytes, object]:
        """Its content, and what changes with it."""
        match = _ID.fullmatch(number)
        if match is None:
            raise Refusal(404, f"no picture is called {number[:40]!r}: pictures are given by id.")
        if match[1] is None:
            if (content := self._uploads.get(number)) is None:
                raise Refusal(404, "this picture is not held any more: drop it here again.")
            return content, None
        if (path := self.path(number)) is None:
            raise Refusal(404, "this photo is gone from the library.")
        try:
            return read_below(self._folder, path)
        except OSError as error:
            raise Refusal(404, f"this photo cannot be read ({error.strerror}).") from error


def read_below(root: Path, path: bytes) -> tuple[bytes, object]:
    """A file below a folder, and what changes with it. Raises OSError for all but regular files
    that are reached without a link and without leaving the folder."""
    *folders, name = path.split(b"/")
    if any(part in (b"", b".", b"..") for part in (*folders, name)):
        raise OSError(0, "not a name below the folder")
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for folder in folders:
            below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
        # without O_NONBLOCK, a pipe would be waited for
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
    finally:
        os.close(here)
    with os.fdopen(file, "rb") as opened:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(0, "not a file")
        return opened.read(), (about.st_size, about.st_mtime_ns)
