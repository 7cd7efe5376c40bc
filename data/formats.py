"""File formats of corpora, read as streams: lines, JSON, Parquet, tar. Nothing is held whole."""

import codecs
import csv
import dataclasses
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cir_jax.errors import DataError
from data import corpus, hub
from data.corpus import Unusable

_CHUNK = 1 << 20
_LONGEST_ITEM = 64 << 20  # characters of one element of a JSON list
_SPACES = re.compile(r"[ \t\r\n]*")
_END_MARK = 512  # bytes of zeros behind the last file of a tar file

Source = Path | hub.Dataset
File = Path | hub.File


def source_files(source: Source, suffixes: Sequence[str]) -> Sequence[File]:
    """The source itself, or the files in that folder with these suffixes, sorted by name; of the
    hub those of the split.

    Raises DataError when there is none.
    """
    if isinstance(source, hub.Dataset):
        return source.of_types(suffixes)
    if source.is_file():
        if source.suffix.lower() not in suffixes:
            raise DataError(f"--source={source}: expected a file of type {', '.join(suffixes)}.")
        return [source]
    if not source.is_dir():
        raise DataError(f"--source={source}: there is no such file or folder.")
    files = sorted(p for p in source.iterdir() if p.suffix.lower() in suffixes and p.is_file())
    if not files:
        raise DataError(f"--source={source}: no files of type {', '.join(suffixes)} in it.")
    return files


def total_bytes(files: Sequence[File]) -> int:
    return sum(file.stat().st_size for file in files)


@dataclasses.dataclass(frozen=True)
class Item:
    """One line, list element or row. value: what was read, or the problem. done: bytes of the file.

    where: "file line 3".
    """

    where: str
    value: Any
    done: int


def row(item: Item) -> Any:
    """What was read. Raises the problem, if that is what came instead."""
    if isinstance(item.value, Unusable):
        raise item.value
    return item.value


def lines(path: File) -> Iterator[Item]:
    """The lines of a text file, without their ends; those that are no UTF-8 are Unusable."""
    done = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            done += len(line)
            where = f"{path} line {number}"
            try:
                string = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield Item(
                    where, Unusable(f"not UTF-8 ({error.reason} at byte {error.start})"), done
                )
                continue
            yield Item(where, string.rstrip("\r\n"), done)


def json_lines(path: File) -> Iterator[Item]:
    """The values of a JSONL file; blank lines are passed over, malformed ones Unusable."""
    for item in lines(path):
        if isinstance(item.value, Unusable):
            yield item
        elif item.value.strip():
            try:
                yield dataclasses.replace(item, value=json.loads(item.value))
            except ValueError as error:
                yield dataclasses.replace(item, value=Unusable(f"not valid JSON ({error})"))


def json_items(path: File) -> Iterator[Item]:
    """The values of a .jsonl file, or the elements of the list in a .json file, one at a time.

    Raises DataError for a list that ends too early or is malformed: what follows cannot be found.
    """
    if path.suffix.lower() == ".jsonl" or _first_character(path) == "{":
        yield from json_lines(path)
    else:
        yield from _json_list(path)


def _first_character(path: File) -> str:
    with path.open("rb") as file:
        start = file.read(4096).decode("utf-8-sig", errors="replace").lstrip()
    if not start:
        raise DataError(f"{path}: is empty.")
    return start[0]


def _json_list(path: File) -> Iterator[Item]:
    decoder = json.JSONDecoder()
    number = 0

    def malformed(problem: str) -> DataError:
        return DataError(f"{path} record {number}: {problem}. Get the file again.")

    with path.open("rb") as file:
        text = _Buffer(file, malformed)
        if text.next_character() != "[":
            raise DataError(f"{path}: expected a JSON list or one object per line.")
        text.position += 1
        while (separator := text.next_character()) != "]":
            if number:
                if separator != ",":
                    raise malformed(f"expected , or ] before it, found {separator!r}")
                text.position += 1
                text.next_character()
            while True:
                try:
                    value, end = decoder.raw_decode(text.string, text.position)
                except ValueError as error:
                    if text.ended or len(text.string) - text.position > _LONGEST_ITEM:
                        raise malformed(f"malformed or cut off ({str(error)[:80]})") from error
                else:
                    follows = text.string[end : end + 1]
                    if text.ended or follows in _AFTER_ITEM or not isinstance(value, int | float):
                        break  # else a number that may go on in the next chunk
                text.more()
            text.position = end
            yield Item(f"{path} record {number}", value, text.done)
            number += 1


_AFTER_ITEM = tuple(", ]\n\r\t")


class _Buffer:
    """The part of a text file that is in memory."""

    def __init__(self, file: IO[bytes], error: Callable[[str], DataError]):
        self.string, self.position, self.done, self.ended = "", 0, 0, False
        self._file, self._error = file, error
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode

    def more(self) -> None:
        """Drops what is before the position, and reads the next chunk."""
        chunk = self._file.read(_CHUNK)
        self.done, self.ended = self.done + len(chunk), not chunk
        try:
            read = self._decode(chunk, self.ended)
        except UnicodeDecodeError as error:
            raise self._error(f"not UTF-8 ({error.reason})") from error
        self.string, self.position = self.string[self.position :] + read, 0

    def next_character(self) -> str:
        """The first one from the position on that is no space; the position moves there."""
        while True:
            self.position = _SPACES.match(self.string, self.position).end()
            if self.position < len(self.string):
                return self.string[self.position]
            if self.ended:
                raise self._error("the file ends before its list does: it is truncated")
            self.more()


def rows(
    paths: Sequence[File],
    names: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]] | None = None,
    start: int = 0,
) -> Iterator[Item]:
    """The rows of .json, .jsonl, .tsv, .csv, .parquet and .txt files as {field: value}.

    names: field -> the names that its column may have; `optional` ones may be missing. A line of a
    .txt file, and a JSON string, is the value of the only field. start: rows passed over; of
    Parquet files, row groups without being read. `done` counts the bytes of all files.
    Raises DataError when a file lacks a column, or cannot be read on.
    """
    before = 0
    for path in paths:
        size = path.stat().st_size
        match path.suffix.lower():
            case ".parquet":
                count = parquet(path).metadata.num_rows
                items = _parquet_rows(path, names, optional or {}, start)
                passed = min(start, count)
            case ".tsv" | ".csv":
                items, passed = _table_rows(path, names, optional or {}), 0
            case ".txt":
                items, passed = _text_rows(path, names), 0
            case _:
                items, passed = _json_rows(path, names, optional or {}), 0
        start -= passed
        for item in items:
            if start:
                start -= 1
            else:
                yield dataclasses.replace(item, done=before + min(item.done, size))
        before += size


def _text_rows(path: File, names: Mapping[str, Sequence[str]]) -> Iterator[Item]:
    (field,) = names
    for item in lines(path):
        is_text = isinstance(item.value, str)
        yield dataclasses.replace(item, value={field: item.value}) if is_text else item


def _json_rows(
    path: File, names: Mapping[str, Sequence[str]], optional: Mapping[str, Sequence[str]]
) -> Iterator[Item]:
    known = False
    for item in json_items(path):
        value: Any = item.value
        if isinstance(value, str) and len(names) == 1:
            value = {next(iter(names)): value}
        elif isinstance(value, dict):
            try:
                found = corpus.pick(value, names, item.where) | corpus.some(value, optional)
                value, known = {field: value[name] for field, name in found.items()}, True
            except DataError as error:
                if not known:  # the first record shows what the others are like
                    raise
                value = Unusable(str(error))
        elif not isinstance(value, Unusable):
            value = Unusable(f"is {value!r:.80}, expected an object")
        yield dataclasses.replace(item, value=value)


def header(path: File) -> list[str]:
    """The columns of a .tsv or .csv file; `caption` and `url` if the first row has a URL.

    That is how CC3M is downloaded: without a header.
    """
    return _dialect(path)[0]


def _dialect(path: File) -> tuple[list[str], dict[str, Any], int]:
    """The columns, the arguments of csv.reader, the number of rows of header."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
    delimiter = "\t" if "\t" in first else ","
    if "://" not in first:
        return next(csv.reader([first], delimiter=delimiter), []), {"delimiter": delimiter}, 1
    if first.count(delimiter) != 1:
        raise DataError(f"{path}: has no header; expected one row of column names.")
    return ["caption", "url"], {"delimiter": delimiter, "quoting": csv.QUOTE_NONE}, 0


def _table_rows(
    path: File, names: Mapping[str, Sequence[str]], optional: Mapping[str, Sequence[str]]
) -> Iterator[Item]:
    columns, dialect, skip = _dialect(path)
    found = corpus.pick(columns, names, str(path)) | corpus.some(columns, optional)
    places = {field: columns.index(name) for field, name in found.items()}
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, **dialect)
        while True:
            where = f"{path} line {reader.line_num + 1}"
            try:
                row = next(reader, None)
            except csv.Error as error:  # a quote that is never closed
                raise DataError(f"{where}: malformed ({error}).") from error
            if row is None:
                return
            if skip:
                skip -= 1
            elif row and len(row) != len(columns):
                problem = f"has {len(row)} columns, expected {len(columns)}"
                yield Item(where, Unusable(problem), file.buffer.tell())
            elif row:
                value = {field: row[place] for field, place in places.items()}
                yield Item(where, value, file.buffer.tell())  # some KB ahead


def parquet(path: File) -> Any:
    """An open Parquet file. Raises DataError when it is damaged, or pyarrow missing."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet files need the package pyarrow: pip install 'cir_jax[parquet]'."
        ) from error
    try:
        return pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else path.ranges())
    except DataError:  # of the hub
        raise
    except Exception as error:  # pyarrow has its own hierarchy, beside OSError
        raise DataError(f"{path}: no readable Parquet file ({error}). Get it again.") from error


def parquet_columns(path: File) -> list[str]:
    """The names of the columns. Raises DataError when the file is damaged, or pyarrow missing."""
    return list(parquet(path).schema_arrow.names)


def _parquet_rows(
    path: File,
    names: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]],
    start: int,
) -> Iterator[Item]:
    """The rows from number `start` on."""
    table, row = parquet(path), 0
    columns = table.schema_arrow.names
    found = corpus.pick(columns, names, str(path)) | corpus.some(columns, optional)
    size, count = path.stat().st_size, table.metadata.num_rows
    for group in range(table.metadata.num_row_groups):
        in_group = table.metadata.row_group(group).num_rows
        if row + in_group <= start:
            row += in_group
            continue
        batches = table.iter_batches(16, row_groups=[group], columns=list(found.values()))
        while True:
            try:
                batch = next(batches, None)
                values = [] if batch is None else batch.to_pylist()
            except DataError:  # as above
                raise
            except Exception as error:
                raise DataError(f"{path} row {row}: unreadable ({error}). Get it again.") from error
            for value in values:
                row += 1
                if row > start:
                    record = {field: value[name] for field, name in found.items()}
                    yield Item(f"{path} row {row - 1}", record, size * row // count)
            if batch is None:
                break


@dataclasses.dataclass(frozen=True)
class Member:
    """Where a file lies in a tar file. data: what is in it, of an archive on the hub, which is
    read once from its start to its end."""

    archive: File
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


def tar_samples(paths: Sequence[File]) -> Iterator[Item]:
    """The samples of tar files in WebDataset's layout, as {extension: Member}.

    Files of the same name up to the first dot, one after another, are a sample. A key that comes
    again, and what remains of a truncated file, is Unusable. Of files on a disk no contents are
    read; `done` counts the bytes of all files. Raises DataError for a file that is no tar file.
    """
    before = 0
    for path in paths:
        for item in _tar_samples(path):
            yield dataclasses.replace(item, done=before + item.done)
        before += path.stat().st_size


def _tar_samples(path: File) -> Iterator[Item]:
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
        yield Item(f"{path} key {key}", Unusable(problem), path.stat().st_size)


def _member(path: File, info: tarfile.TarInfo, file: IO[bytes]) -> Member:
    data = None
    if isinstance(path, hub.File):
        file.seek(info.offset_data)
        data = file.read(info.size)
    return Member(path, info.name, info.offset_data, info.size, data)


def _sample(path: File, key: str, sample: dict, keys: set[str], end: int) -> Item:
    where = f"{path} key {key}"
    if key in keys:
        return Item(where, Unusable("the key was there before in this file"), end)
    keys.add(key)
    return Item(where, sample, end)


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
