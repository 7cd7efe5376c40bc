"""Lists and tables of corpora, as streams: lines, JSON, CSV, Parquet. Nothing is held whole.

Beside libraries that read the same (benchmarks/readers.py): `datasets` takes as much processor time
for CSV and three to five times for the others, and ends at a malformed line; pyarrow's JSON and CSV
take a third, and end before the records in front of one; ijson takes two thirds for lists, and puts
"?" for half a character. Here each record that cannot be used is told by its line, and the others
are read. Parquet is pyarrow's.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from cir_jax.errors import DataError
from data import corpus, hub
from data.corpus import Unusable

_CHUNK = 1 << 20
_LONGEST_ITEM = 64 << 20  # characters of one element of a JSON list
_SPACES = re.compile(r"[ \t\r\n]*")

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


class Item(NamedTuple):
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
    done, name = 0, str(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            done += len(line)
            where = f"{name} line {number}"
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
            value: Any
            try:
                value = json.loads(item.value)
            except ValueError as error:
                value = Unusable(f"not valid JSON ({error})")
            yield Item(item.where, value, item.done)


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
    decoder, name = json.JSONDecoder(), str(path)
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
            yield Item(f"{name} record {number}", value, text.done)
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
        match path.suffix.lower():
            case ".parquet":
                table = parquet(path)
                items = _parquet_rows(path, table, names, optional or {}, start)
                passed = min(start, table.metadata.num_rows)
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
            elif before:
                where, value, done = item
                yield Item(where, value, before + done)
            else:
                yield item
        before += path.stat().st_size


def _text_rows(path: File, names: Mapping[str, Sequence[str]]) -> Iterator[Item]:
    (field,) = names
    for item in lines(path):
        is_text = isinstance(item.value, str)
        yield Item(item.where, {field: item.value}, item.done) if is_text else item


def _json_rows(
    path: File, names: Mapping[str, Sequence[str]], optional: Mapping[str, Sequence[str]]
) -> Iterator[Item]:
    known: dict[tuple[str, ...], dict[str, str]] = {}  # an object's keys -> its columns
    for where, value, done in json_items(path):
        if isinstance(value, dict):
            keys = tuple(value)
            try:
                if (found := known.get(keys)) is None:
                    found = corpus.pick(keys, names, where) | corpus.some(keys, optional)
                    known = {} if len(known) > 64 else known
                    known[keys] = found
                value = {field: value[name] for field, name in found.items()}
            except DataError as error:
                if not known:  # the first record shows what the others are like
                    raise
                value = Unusable(str(error))
        elif isinstance(value, str) and len(names) == 1:
            value = {next(iter(names)): value}
        elif not isinstance(value, Unusable):
            value = Unusable(f"is {value!r:.80}, expected an object")
        yield Item(where, value, done)


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
    ended, label = [], str(path)

    def until_its_end(file: IO[str]) -> Iterator[str]:
        yield from file
        ended.append(True)

    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(until_its_end(file), **dialect)
        while True:
            where = f"{label} line {reader.line_num + 1}"
            try:
                row = next(reader, None)
            except csv.Error as error:  # a quote that is never closed
                raise DataError(f"{where}: malformed ({error}).") from error
            if row is None:
                return
            if ended:  # it asked for another line in the midst of a row
                raise DataError(f"{where}: a quote that is opened there is never closed. Mend it.")
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
    table: Any,
    names: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]],
    start: int,
) -> Iterator[Item]:
    """The rows from number `start` on."""
    row, label = 0, str(path)
    columns = table.schema_arrow.names
    found = corpus.pick(columns, names, str(path)) | corpus.some(columns, optional)
    size, count = path.stat().st_size, table.metadata.num_rows
    for group in range(table.metadata.num_row_groups):
        in_group = table.metadata.row_group(group).num_rows
        if row + in_group <= start:
            row += in_group
            continue
        batches = table.iter_batches(
            _rows_at_once(table.metadata.row_group(group), set(found.values())),
            row_groups=[group],
            columns=list(found.values()),
        )
        while True:
            try:
                batch = next(batches, None)
                read = (
                    [] if batch is None else [batch.column(n).to_pylist() for n in found.values()]
                )
            except DataError:  # as above
                raise
            except Exception as error:
                raise DataError(f"{path} row {row}: unreadable ({error}). Get it again.") from error
            for values in zip(*read, strict=True):
                row += 1
                if row > start:
                    record = dict(zip(found, values, strict=True))
                    yield Item(f"{label} row {row - 1}", record, size * row // count)
            if batch is None:
                break


def _rows_at_once(group: Any, columns: set[str]) -> int:
    """Rows of about `_CHUNK` bytes: many texts, few images."""
    parts = map(group.column, range(group.num_columns))
    size = sum(
        part.total_uncompressed_size
        for part in parts
        if part.path_in_schema.partition(".")[0] in columns
    )
    return max(1, min(1024, _CHUNK * group.num_rows // max(size, 1)))
