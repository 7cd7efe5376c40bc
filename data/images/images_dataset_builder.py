"""TFDS builder of the table `images`: a folder of images, in any nesting."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cir_jax.errors import DataError
from cir_jax.input.images import SUFFIXES
from data import corpus
from data.corpus import CorpusBuilder, Entry
from data.source import Options, Survey, tables


class Folder:
    """The image files of a folder in the order of their names, then those of its folders.

    Passed over: hidden files and folders, links to folders (they can go round in circles), and
    whatever has no image's suffix.
    """

    unit, images = "files", ("image",)

    def __init__(self, root: Path):
        if not root.is_dir():
            raise DataError(f"--source={root}: is no folder of images.")
        self.source, self.files = root, ()
        self.total = sum(1 for _ in _images(root))
        if not self.total:
            raise DataError(
                f"--source={root}: no images in it, that is files named "
                f"{', '.join('*' + suffix for suffix in sorted(SUFFIXES))}."
            )

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        del contents  # a name is all there is to it
        for number, path in enumerate(_images(self.source), 1):
            if number <= start:
                continue
            name = path.relative_to(self.source).as_posix()
            printable = name.encode(errors="replace").decode()
            problem, stamp = corpus.stat_image(path)
            if printable != name:
                problem = "the name is not UTF-8"
            load = functools.partial(_load, path, name)
            yield Entry(printable, number, load, problem, stamp=(printable, *stamp))


def _images(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as found:
            there = sorted((e for e in found if e.name[0] != "."), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}).") from error
    yield from (Path(e.path) for e in there if _suffix(e.name) in SUFFIXES and not e.is_dir())
    for entry in there:
        if entry.is_dir(follow_symlinks=False):
            yield from _images(Path(entry.path))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _load(path: Path, name: str) -> dict[str, Any]:
    return {"name": name, "image": corpus.read_image(path)}


class Images(CorpusBuilder):
    """Images without texts, such as ImageNet's test split, for textual inversion."""

    BUILDER_CONFIGS = tables("images")
    HELP = "Any folder of images, with folders in it or not."

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        return {"name": tfds.features.Text(), "image": tfds.features.Text()}

    @classmethod
    def survey(cls, source: Path, options: Options) -> Survey:
        corpus.names({}, options.columns, "images")
        return corpus.survey(Folder(source), "images", "images", options)
