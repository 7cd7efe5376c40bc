"""What an update has to do, found out from names, sizes, times and digests: nothing is decoded."""

import os
from collections.abc import Sequence
from pathlib import Path

from cir_jax.library import photos
from cir_jax.library.photos import File
from cir_jax.library.store import Photo


class Plan:
    """What is to be done about each file and each known photo, found out without decoding any."""

    def __init__(self, folder: Path, found: photos.Found, known: Sequence[Photo]):
        by_path = {photo.path: photo for photo in known}
        closed = tuple(below + b"/" if below else b"" for below in found.closed)
        # of a folder that cannot be read now, what was known stays
        self.gone = [
            photo
            for photo in known
            if photo.path not in found.files and not (closed and photo.path.startswith(closed))
        ]
        missing = len(self.gone)
        self.touched: list[tuple[Photo, File]] = []
        self.moved: list[tuple[Photo, File]] = []
        self.copied: list[tuple[Photo, File]] = []
        self.unknown: list[File] = []
        sizes = {photo.size for photo in known}
        digests: dict[bytes, bytes | None] = {}
        for file in found.files.values():
            photo = by_path.get(file.path)
            if photo is not None and photo.is_as(file):
                continue
            digest = None
            if file.size in sizes:
                digest = photos.digest_of(folder / os.fsdecode(file.path))
            if photo is not None and digest == photo.digest:
                self.touched.append((photo, file))
                continue
            if photo is not None:
                self.gone.append(photo)
            self.unknown.append(file)
            digests[file.path] = digest
        self._recognise(known, digests)
        new = [*self.unknown, *(file for _, file in self.copied)]
        self.changed = sum(file.path in by_path for file in new)
        self.added = len(new) - self.changed
        renamed = sum(file.path not in by_path for _, file in self.moved)
        self.deleted = missing - renamed

    def _recognise(self, known: Sequence[Photo], digests: dict[bytes, bytes | None]) -> None:
        """Files whose content is known: a photo that went has moved there, another is copied."""
        free: dict[bytes, list[Photo]] = {}
        for photo in self.gone:
            free.setdefault(photo.digest, []).append(photo)
        gone = {photo.id for photo in self.gone}
        kept = {photo.digest: photo for photo in known if photo.id not in gone}
        rest = []
        for file in self.unknown:
            digest = digests[file.path]
            if digest is not None and free.get(digest):
                photo = free[digest].pop()
                self.moved.append((photo, file))
                kept[digest] = photo
            elif digest is not None and digest in kept:
                self.copied.append((kept[digest], file))
            else:
                rest.append(file)
        self.unknown = rest
        moved = {photo.id for photo, _ in self.moved}
        self.gone = [photo for photo in self.gone if photo.id not in moved]
