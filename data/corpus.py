"""What the training corpora have in common: entries found in a fixed order, read when needed.

Finding the entries of a source is cheap: their texts are read, images are only looked up. Reading
one (image bytes, and decoding them as a check) is slow and runs in threads. So a reader (`Corpus`)
yields entries, the survey counts them, and the records are loaded when they are written.

What is wrong with an entry never stops a survey: a missing or damaged image, a malformed line, a
key that comes twice are counted and listed, and `--allow_partial` leaves them out. Entries whose
text is empty are dropped and counted; web corpora always have some. A file that cannot be read on
(a list cut off in the middle, columns that are not there) raises a DataError.
"""

import array
import dataclasses
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds

from cir_jax.errors import DataError, unknown
from cir_jax.progress import Progress
from data import hub
from data import source as files
from data.source import MAX_KEPT, MAX_LISTED, Options, Report, SourceBuilder, Split, Survey

Record = dict[str, Any]


class Unusable(DataError):
    """One entry of a corpus cannot be used."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of a source.

    where: file and line, row or key, for messages.
    done: how much of `Corpus.total` is behind with it.
    load: reads the record, without `id`. Raises Unusable.
    problem: why it cannot be used, where that is known before it is read.
    empty: a text that the record needs is empty.
    stamp: what else, beside the text files, the record is made of (images: size, time).
    """

    where: str
    done: int
    load: Callable[[], Record] = dict
    problem: str = ""
    empty: bool = False
    stamp: tuple[Any, ...] = ()


class Corpus(Protocol):
    """A source of entries whose order depends on nothing but the files.

    source: what it was made of, for messages. files: those that the entries are found in.
    total, unit: how much there is to go through, for the time left.
    images: the fields of a record that are the bytes of images.
    """

    source: Path | hub.Dataset
    files: Sequence[Path | hub.File]
    total: int
    unit: str
    images: tuple[str, ...]

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        """The entries from number `start` on; without `contents` they are never loaded.

        Raises DataError when the source itself is broken.
        """
        ...


class First:
    """The first entries of a corpus."""

    unit = "entries"

    def __init__(self, corpus: Corpus, limit: int):
        self.source, self.files, self.images = corpus.source, corpus.files, corpus.images
        self.total, self._corpus = limit, corpus

    def entries(self, start: int, contents: bool) -> Iterator[Entry]:
        """See `Corpus`."""
        left = max(self.total - start, 0)
        entries = itertools.islice(self._corpus.entries(start, contents), left)
        for number, entry in enumerate(entries, start + 1):
            yield dataclasses.replace(entry, done=number)


class CorpusBuilder(SourceBuilder, skip_registration=True):
    """TFDS builder of a corpus: one table, with the split `train`."""

    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def split_names(cls) -> tuple[str, ...]:
        """See the base class."""
        return ("train",)


def survey(corpus: Corpus, table: str, noun: str, options: Options) -> Survey:
    """Goes through a corpus and counts what can be used; the whole of it is the split `train`.

    Raises DataError when less than half can be used: then it is not a few broken files.
    """
    good = empty = lost = 0
    problems: list[str] = []
    broken = array.array("q")  # numbers of the entries whose images are
    limit = () if options.limit is None else (options.limit,)
    digest = hashlib.sha256(files.stamp(*corpus.files, *limit).encode())
    if options.limit is not None:
        corpus = First(corpus, options.limit)
    for number, (entry, problem) in enumerate(_checked(corpus, options.decode == "survey")):
        digest.update(repr(entry.stamp).encode())
        if problem:
            lost += 1
            if not entry.problem:
                broken.append(number)
            if len(problems) < MAX_KEPT:
                problems.append(f"{entry.where}: {problem}")
        elif entry.empty:
            empty += 1
        else:
            good += 1
    if lost > good or not good:
        listed = "".join(f"\n  {problem}" for problem in problems[:MAX_LISTED])
        raise DataError(
            f"--source={corpus.source}: only {good:,} of {good + lost + empty:,} entries can be "
            f"used ({lost:,} unusable, {empty:,} with an empty text). The right --source?{listed}"
        )
    if lost > len(problems):
        problems.append(f"and {lost - len(problems):,} more entries")
    digest.update(broken.tobytes())
    records = functools.partial(_records, corpus, broken, options.decode == "build")
    counts = {noun: good} | ({"entries with an empty text dropped": empty} if empty else {})
    report = Report(counts, lost={noun: lost} if lost else {}, problems=problems)
    split = Split(records, digest.hexdigest()[:32], good)
    return Survey({table: {"train": split}}, {"train": report})


def _checked(corpus: Corpus, decode: bool) -> Iterator[tuple[Entry, str]]:
    """The entries with what is wrong with them, under a progress bar."""
    decode = decode and bool(corpus.images)
    entries = corpus.entries(0, contents=decode)
    if decode:
        checked = files.parallel(functools.partial(_check, images=corpus.images), entries)
    else:
        checked = ((entry, entry.problem) for entry in entries)
    with Progress(
        desc="looking at the files",
        total=corpus.total,
        unit=f" {corpus.unit}",
        unit_scale=True,
    ) as bar:
        for entry, problem in checked:
            bar.update(entry.done - bar.n)
            yield entry, problem


def _check(entry: Entry, images: Sequence[str]) -> tuple[Entry, str]:
    problem = entry.problem
    if not problem and not entry.empty:
        try:
            _read(entry, images)
        except Unusable as error:
            problem = str(error)
    return dataclasses.replace(entry, load=dict), problem  # what it holds may go


def _records(corpus: Corpus, broken: Sequence[int], decode: bool, start: int) -> Iterator[Record]:
    """The usable records from number `start` on, loaded in threads."""
    first = 0
    if start:
        found = _usable(corpus.entries(0, contents=False), 0, broken)
        first = next(itertools.islice(found, start, None), (sys.maxsize, None))[0]
    usable = _usable(corpus.entries(first, contents=True), first, broken)
    load = functools.partial(_load, images=corpus.images if decode else ())
    entries = (entry for _, entry in usable)
    loaded = files.parallel(load, entries) if corpus.images else map(load, entries)
    for i, record in enumerate(loaded, start):
        yield {"id": i, **record}


def _usable(
    entries: Iterable[Entry], first: int, broken: Sequence[int]
) -> Iterator[tuple[int, Entry]]:
    """The entries that can be used, with their numbers; those given begin with number `first`."""
    left_out = itertools.dropwhile(lambda number: number < first, broken)
    bad = next(left_out, None)
    for number, entry in enumerate(entries, first):
        if number == bad:
            bad = next(left_out, None)
        elif not entry.problem and not entry.empty:
            yield number, entry


def _load(entry: Entry, images: Sequence[str]) -> Record:
    try:
        return _read(entry, images)
    except Unusable as error:
        raise DataError(
            f"{entry.where}: {error}. Run launch/prepare.py with --check and --source to list all "
            "such entries, or with --allow_partial to leave them out."
        ) from error


def _read(entry: Entry, images: Sequence[str]) -> Record:
    """The record, whose images decode. Raises Unusable."""
    record = entry.load()
    for field in images:
        try:
            files.check_image(record[field])
        except Exception as error:  # PIL raises a dozen types for bad files
            raise Unusable(f"{field} is no readable image ({error})") from error
    return record


def image_bytes(value: Any, field: str) -> bytes:
    """The bytes of an image in a table: as they are, or Hugging Face's {"bytes", "path"}.

    Raises Unusable for all else.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise Unusable(f"{field} is {value!r:.80}, expected the bytes of an image")
    return data


def stat_image(path: Path) -> tuple[str, tuple[int, ...]]:
    """What is wrong with an image file, if anything ("" = nothing), and its `Entry.stamp`."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return f"image {path} is missing", ()
    except (OSError, ValueError) as error:  # ValueError: what cannot be a path
        return f"image {path} cannot be read ({error})", ()
    if not status.st_size:
        return f"image {path} is empty", ()
    return "", (status.st_size, status.st_mtime_ns)


def read_image(path: Path) -> bytes:
    """The bytes of an image file. Raises Unusable."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"image {path} cannot be read ({error.strerror})") from error


def text(value: Any, field: str) -> str:
    """The value of a text field as it is; None is the empty text. Raises Unusable for all else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"{field} is {value!r:.80}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # surrogates: bytes that were no UTF-8, or half a character in JSON
        raise Unusable(f"{field} is not valid Unicode: {value!a:.80}") from None
    return value


def pick(there: Iterable[str], wanted: Mapping[str, Sequence[str]], where: str) -> dict[str, str]:
    """For each field, the first of its names that is there.

    Raises DataError that lists the columns there are.
    """
    there = list(there)
    found = some(there, wanted)
    if missing := [field for field in wanted if field not in found]:
        needs = ", ".join(f"{f} ({' or '.join(wanted[f])})" for f in missing)
        raise DataError(
            f"{where}: no column for {needs}. The columns are: {', '.join(there) or 'none'}. "
            "Name yours with --columns=FIELD=COLUMN,... or --columns=MAPPING.json."
        )
    return found


def some(there: Iterable[str], wanted: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """For each field, the first of its names that is there; fields without are left out."""
    there = list(there)
    found = {f: next((n for n in names if n in there), None) for f, names in wanted.items()}
    return {field: name for field, name in found.items() if name is not None}


def names(
    known: Mapping[str, Sequence[str]], columns: Mapping[str, str], kind: str
) -> dict[str, Sequence[str]]:
    """The possible column names of each field: the user's, or the known ones.

    Raises DataError for a field that the kind of corpus does not have.
    """
    for field in columns:
        if field not in known:
            raise DataError(unknown(f"field of {kind} in --columns:", field, known))
    return {field: (columns[field],) if field in columns else of for field, of in known.items()}


def parse_columns(values: Iterable[str]) -> dict[str, str]:
    """The flag --columns: `field=column` items, or one JSON file {field: column}."""
    values = list(values)
    if len(values) == 1 and values[0].endswith(".json"):
        try:
            mapping = json.loads(Path(values[0]).expanduser().read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"--columns={values[0]}: not readable as JSON ({error}).") from error
        if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
            raise DataError(f'--columns={values[0]}: expected {{"field": "column", ...}}.')
        return mapping
    pairs = [value.partition("=") for value in values]
    for value, (field, _, column) in zip(values, pairs, strict=True):
        if not (field and column):
            raise DataError(f"--columns: {value!r} is not of the form field=column.")
    return {field: column for field, _, column in pairs}
