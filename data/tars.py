"""Tar files in WebDataset's layout, read as streams of samples: files of the same name.

Python's `tarfile` reads them. Beside it (benchmarks/readers.py), the package webdataset takes as
much processor time and `datasets` 1.8 times. Of a sample without a text the former ends, the latter
gives None, and both give one twice whose key comes again; here both are told, with the key.
"""

import dataclasses
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

from cir_jax.errors import DataError
from data import corpus, formats, hub
from data.corpus import Unusable

_TEXTS = (".txt", ".json")
_END_MARK = 512  # bytes of zeros behind the last file of a tar file


@dataclasses.dataclass(frozen=True)
class Member:
    """Where a file lies in a tar file. data: what is in it, of a text, and of an archive on the
    hub, which is read once from its start to its end."""

    archive: formats.File
    name: str
    offset: int
    size: int
    data: bytes | None = None

    def read(self) -> bytes:
        """Raises Unusable when the archive ends before the file does."""
        try:
            if (data := self.data) is None:
                with self.archive.open("rb") as file:
                    file.seek(self.offset)
                    data = file.read(self.size)
        except OSError as error:
            raise Unusable(f"{self.archive} cannot be read: {error.strerror}") from None
        if len(data) < self.size:
            raise Unusable(f"{self.name} is cut off: the tar file is truncated")
        return data


def samples(paths: Sequence[formats.File]) -> Iterator[formats.Item]:
    """The samples of tar files in WebDataset's layout, as {extension: Member}.

    Files of the same name up to the first dot, one after another, are a sample. A key that comes
    again, and what remains of a truncated file, is Unusable. Of files on a disk only texts are
    read; `done` counts the bytes of all files. Raises DataError for a file that is no tar file.
    """
    before = 0
    for path in paths:
        for item in _samples(path):
            yield item._replace(done=before + item.done)
        before += path.stat().st_size


def _samples(path: formats.File) -> Iterator[formats.Item]:
    keys: set[str] = set()
    key, sample, end, problem = "", {}, 0, ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # it would keep them all
                if not info.isfile():
                    continue
                folder, slash, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if folder + slash + stem != key and sample:
                    yield _sample(path, key, sample, keys, end)
                    sample = {}
                key, end = folder + slash + stem, info.offset_data + info.size
                sample[extension.lower()] = _member(path, info, file)
            if not _has_end_mark(file, archive.offset):  # tarfile stops there and says nothing
                problem = "no file and no end mark where one should be"
    except tarfile.TarError as error:
        if not end:
            raise DataError(f"{path}: no readable, uncompressed tar file ({error}).") from error
        problem = str(error)
    if sample:
        yield _sample(path, key, sample, keys, end)
    if problem:
        problem = f"the tar file is truncated or damaged behind it ({problem}); get it again"
        yield formats.Item(f"{path} key {key}", Unusable(problem), path.stat().st_size)


def _member(path: formats.File, info: tarfile.TarInfo, file: IO[bytes]) -> Member:
    data = None
    if isinstance(path, hub.File) or info.name.lower().endswith(_TEXTS):
        file.seek(info.offset_data)
        data = file.read(info.size)
    return Member(path, info.name, info.offset_data, info.size, data)


def _sample(path: formats.File, key: str, sample: dict, keys: set[str], end: int) -> formats.Item:
    where = f"{path} key {key}"
    if key in keys:
        return formats.Item(where, Unusable("the key was there before in this file"), end)
    keys.add(key)
    return formats.Item(where, sample, end)


def _has_end_mark(file: IO[bytes], offset: int) -> bool:
    file.seek(offset)
    return file.read(_END_MARK) == bytes(_END_MARK)


class Sample:
    """A sample of a tar file as a row: its columns are the extensions, and json.KEY of its JSON."""

    def __init__(self, members: dict[str, Member] | Unusable):
        """Raises Unusable if that is what came in the place of the sample."""
        if isinstance(members, Unusable):
            raise members
        self._members = members
        self._json: dict[str, Any] = {}
        if "json" in members:
            try:
                self._json = json.loads(members["json"].read())
            except ValueError as error:
                raise Unusable(f"{members['json'].name} is not valid JSON ({error})") from error
            if not isinstance(self._json, dict):
                raise Unusable(f"{members['json'].name} holds no JSON object")

    @property
    def columns(self) -> list[str]:
        return [*self._members, *(f"json.{key}" for key in self._json)]

    def member(self, column: str) -> Member:
        """The file of that extension. Raises Unusable for a field of the JSON."""
        if column not in self._members:
            raise Unusable(f"column {column} is no file")
        return self._members[column]

    def text(self, column: str) -> str:
        """The text of that file or field. Raises Unusable."""
        if column not in self._members:
            return corpus.text(self._json[column.removeprefix("json.")], column)
        try:
            return self._members[column].read().decode()
        except UnicodeDecodeError as error:
            raise Unusable(f"{self._members[column].name} is not UTF-8 ({error.reason})") from error
