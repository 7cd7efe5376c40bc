"""Where an image lies when its file is called a little differently than the authors say."""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_COCO = re.compile(r"coco_[a-z]+[0-9]{4}_")
"""COCO_unlabeled2017_000000000008.jpg: how older archives of COCO begin."""


def first_image(*candidates: Path) -> Path:
    """The first of the paths that is a file; else the first file beside them of the same name but
    for case, suffix of an image and COCO's prefix; else the first path."""
    for path in candidates:
        if path.is_file():
            return path
    for path in candidates:
        if name := _listing(path.parent).get(_plain(path.name)):
            return path.parent / name
    return candidates[0]


def _plain(name: str) -> str:
    """What files that differ as said have in common; "" for what is no image."""
    stem, suffix = os.path.splitext(name.lower())
    return _COCO.sub("", stem) if suffix in SUFFIXES else ""


def _listing(folder: Path) -> Mapping[str, str]:
    try:
        return _read(str(folder), folder.stat().st_mtime_ns)
    except OSError:
        return {}


@functools.lru_cache(maxsize=1024)
def _read(folder: str, changed: int) -> Mapping[str, str]:
    """Plain name -> file; of several, the first by suffix, then by name."""
    del changed  # the folder as it is now

    def order(name: str) -> tuple[int, str]:
        return SUFFIXES.index(os.path.splitext(name.lower())[1]), name

    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _plain(entry.name) and entry.is_file()]
    found: dict[str, str] = {}
    for name in sorted(names, key=order):
        found.setdefault(_plain(name), name)
    return found
