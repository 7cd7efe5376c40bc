"""Datasets made of files the user has: what their builders share.

A builder is a class in `data/<name>/<name>_dataset_builder.py`, derived from `SourceBuilder`, with

* `BUILDER_CONFIGS = tables("gallery", "queries")`, the tables in the order they are built;
  `VERSION`, raised with every change of what is written;
* `HELP`: where the authors say to get the files, and how they lie; errors quote it;
* `features(table)`: the fields of a record beside `id`;
* `survey(source, options)`: looks at the files and returns a `Survey`: the records of each table
  and split that can be built, and a `Report` per split of what is missing. It writes nothing.

and a line in `data.build.DATASETS`. `data.build` does the rest: it prints the reports (the doctor),
refuses partial data unless allowed, and writes the tables in shards, resumed when killed.

Missing or unreadable *images* are counted in reports. Everything else that is wrong (a truncated or
malformed annotation file, an unknown image id, a duplicate id) raises a DataError naming file and
record, because no benchmark has it.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds

from cir_jax.errors import DataError
from cir_jax.input import images
from cir_jax.sharding.cores import cores
from data import hub, progress

MAX_LISTED = 10  # problems shown of each kind; all are counted
MAX_KEPT = 1000  # problems kept with the tables


@dataclasses.dataclass(frozen=True)
class Options:
    """How to look at the files.

    splits: those to build; None = all that have files.
    decode: images are decoded in full to find damaged ones: in the survey, so that they can be
        counted and left out; only while they are written, when the first bad one is an error; or
        never.
    images: "copy" them into the tables, or "link": the tables name the files, which must stay.
    columns: {field of the table: its name in the files}, for corpora whose columns vary.
    segmenter, keywords: what finds regions and nouns, for `masked_pairs`; "" = its own.
    split: of a dataset of the hub, the one that is read; "" = `data.hub.opened`.
    limit: entries of a corpus that are read, from the first on; None = all.
    """

    splits: tuple[str, ...] | None = None
    decode: Literal["survey", "build", "never"] = "survey"
    images: Literal["copy", "link"] = "copy"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    segmenter: str = ""
    keywords: str = "spacy"
    split: str = ""
    limit: int | None = None

    def wanted(self, split: str) -> bool:
        """Whether the split is asked for."""
        return self.splits is None or split in self.splits


@dataclasses.dataclass(frozen=True)
class Split:
    """The records of one split of a table.

    records: start -> the records from number `start` on, the same ones in every run. Each has an
        `id` and the fields of `SourceBuilder.features`; images as the bytes of their files.
    stamp: digest of all that the records are made of (see `stamp`); an unfinished build is
        continued only if it has not changed.
    count: number of records, None = known at the end only.
    """

    records: Callable[[int], Iterable[dict[str, Any]]]
    stamp: str
    count: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What there is of a split, and what is not.

    counts: what can be built, such as {"queries": 220, "gallery": 123403}.
    official: the same counts in the authors' files, where known.
    lost: what is missing of each, for want of files.
    problems: one line per missing or unreadable file, and per further loss, naming it.
    remarks: what is odd and yet no error.
    damaged: {"image", "file", "problem", "queries"} of each image that is missing or unreadable;
        lost_queries: ids. Both are empty where only the counts are known.
    """

    counts: Mapping[str, int]
    official: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)
    problems: Sequence[str] = ()
    remarks: Sequence[str] = ()
    damaged: Sequence[Mapping[str, Any]] = ()
    lost_queries: Sequence[int] = ()

    @property
    def complete(self) -> bool:
        """Whether results on this split are comparable with others'."""
        counted = all(self.counts.get(k) == n for k, n in self.official.items())
        return counted and not self.problems and not any(self.lost.values())

    def mark(self) -> dict[str, Any]:
        """What is kept with the tables."""
        return {
            "complete": self.complete,
            "counts": dict(self.counts),
            "official": dict(self.official),
            "lost": dict(self.lost),
            "problems": list(self.problems[:MAX_KEPT]),
        }

    def whole(self) -> dict[str, Any]:
        """All of it, as JSON: what people send each other to complete a dataset."""
        files = {one["file"] for one in self.damaged}
        others = [text for text in self.problems if text.rpartition(": is ")[0] not in files]
        return self.mark() | {
            "problems": others,
            "remarks": list(self.remarks),
            "damaged": [dict(one) for one in self.damaged],
            "lost_queries": list(self.lost_queries),
        }

    @property
    def summary(self) -> str:
        """ "617 image(s) missing, 3 unreadable, 477 queries lost"; "" = nothing is."""
        missing = sum(one["problem"] == "is missing" for one in self.damaged)
        parts = {
            "image(s) missing": missing,
            "unreadable": len(self.damaged) - missing,
            "queries lost": len(self.lost_queries),
        }
        return ", ".join(f"{n:,} {what}" for what, n in parts.items()) if self.damaged else ""

    def __str__(self) -> str:
        return self.text()

    def text(self, shown: Collection[str] = ()) -> str:
        """For people, several lines. shown: problems that were listed before, only counted here."""
        lines = [self.summary] if self.summary else []
        for name, count in self.counts.items():
            parts = [f"{name}: {count:,}"]
            if lost := self.lost.get(name):
                parts.append(f"{lost:,} lost")
            if name in self.official:
                same = self.official[name] == count
                parts.append("as official" if same else f"official {self.official[name]:,}")
            lines.append(", ".join(parts))
        lines += [f"{k}: {n:,} lost" for k, n in self.lost.items() if n and k not in self.counts]
        none = [(k, n) for k, n in self.official.items() if k not in self.counts]
        lines += [f"{k}: none, official {n:,}" for k, n in none]
        new = [problem for problem in self.problems if problem not in shown]
        if self.problems:
            before = len(self.problems) - len(new)
            known = f", {before:,} of them above" if before else ""
            lines.append(f"{len(self.problems):,} problem(s){known}{':' if new else ''}")
        for what, found in (("", new), ("note: ", self.remarks)):
            lines += [f"  {what}{one}" for one in found[:MAX_LISTED]]
            if len(found) > MAX_LISTED:
                lines.append(f"  {what}and {len(found) - MAX_LISTED:,} more")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a folder holds.

    splits: {table: {split: its records}}; splits without files, or without any record, are absent.
    reports: {split: report}; their marks are taken when the tables are written.
    skipped: {split: why it cannot be built}; not an error as long as any split can.
    source: what was looked at, for the mark of the tables; `data.build.survey` says it.
    """

    splits: Mapping[str, Mapping[str, Split]]
    reports: Mapping[str, Report]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: str = ""


class SourceBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder of one table; see the module's docstring for what a subclass defines."""

    HELP = ""
    LICENSE = ""
    OWN_IDS: tuple[str, ...] = ()  # tables whose `id` is an official one, not the record's number
    OPTIONAL: tuple[str, ...] = ()  # tables that are left out where their files are missing
    LINKS = False  # whether its tables can name the images instead of holding them
    HUB = False  # whether it can be made of a dataset of the hub
    url_infos = None  # nothing is downloaded; looking for checksums needs a package TFDS omits

    def __init__(self, *, splits: Mapping[str, Split] | None = None, **kwargs: Any):
        """splits: those of this table, as the survey gave them."""
        self.source_splits = dict(splits or {})
        super().__init__(**kwargs)

    @classmethod
    def split_names(cls) -> tuple[str, ...]:
        """What `Options.splits` may name; empty = the survey says so itself."""
        return ()

    @classmethod
    def survey(cls, source: Any, options: Options) -> Survey:
        """Looks at the files in the folder `source`, or at that file (Path); with HUB, perhaps at
        those of a `data.hub.Dataset`.

        Raises DataError as the module says.
        """
        raise NotImplementedError

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        """The fields of a record of the table, without `id`, as TFDS features."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        folder = type(self).__module__.split(".")[1]
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{(self.__doc__ or '').strip()} See data/{folder}/README.md.",
            features=tfds.features.FeaturesDict(
                {"id": np.int64, **self.features(self.builder_config.name)}
            ),
            license=self.LICENSE,
            disable_shuffling=True,  # record i is example i
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        return {name: self._generate_examples(split) for name, split in self.source_splits.items()}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict]]:
        yield from enumerate(split.records(0))


def tables(*names: str) -> list[tfds.core.BuilderConfig]:
    """One TFDS config per table, of the builder's version."""
    return [tfds.core.BuilderConfig(name=name) for name in names]


def stamp(*parts: Any) -> str:
    """Digest of values that JSON can hold, and of files: name, size and time of change, or, of the
    hub, number of contents."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=_status).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:32]


def _status(path: Path | hub.File) -> list[Any]:
    if isinstance(path, hub.File):
        return path.stamp
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def read_json(path: Path, kind: type[dict] | type[list]) -> Any:
    """The content of a JSON file: an object (dict) or a list. Raises DataError naming the file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(
            f"{path}: not readable as JSON ({error}); truncated or damaged? Get it again."
        ) from error
    if not isinstance(content, kind):
        name = {dict: "an object", list: "a list"}[kind]
        raise DataError(f"{path}: holds a {type(content).__name__}, expected {name}. Get it again.")
    return content


def field(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`, of that type. Raises DataError; `where` names file and record."""
    if not isinstance(record, dict) or name not in record:
        raise DataError(
            f"{where}: has no field {name!r}; is this another file, or another version?"
        )
    value = record[name]
    wrong = isinstance(value, bool) and kind is not bool  # True is an int to Python
    if wrong or not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(k.__name__ for k in kinds)
        raise DataError(f"{where}: {name} is {value!r:.80}, expected {expected}.")
    return value


def strings(record: Any, name: str, where: str) -> tuple[str, ...]:
    """`record[name]`, a list of texts. Raises DataError as `field` does."""
    values = field(record, name, list, where)
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise DataError(f"{where}: {name} holds {wrong[0]!r:.80}, expected texts.")
    return tuple(values)


def first_file(*candidates: Path) -> Path:
    """The first of the paths that is a file; if none is, the first one."""
    return next((path for path in candidates if path.is_file()), candidates[0])


def image_problem(path: Path, decode: bool) -> str | None:
    """What is wrong with an image file, if anything; without `decode`, only whether it is there."""
    try:
        if not path.stat().st_size:
            return "is empty"
        if decode:
            check_image(path.read_bytes())
    except FileNotFoundError:
        return "is missing"
    except Exception as error:  # PIL raises a dozen types for bad files
        return f"is unreadable ({error})"
    return None


def image_problems(paths: Sequence[Path], decode: bool, label: str) -> list[str | None]:
    """`image_problem` of each path, in parallel, under a progress bar."""
    found = parallel(lambda path: image_problem(path, decode), paths)
    return list(progress(found, len(paths), label))


def read_images(paths: Iterable[Path], decode: bool) -> Iterator[bytes]:
    """The bytes of the files, in order, read and decoded ahead in parallel.

    Raises DataError naming the first file that is missing or, with `decode`, unreadable.
    """
    return parallel(lambda path: _read(path, decode), paths)


def _read(path: Path, decode: bool) -> bytes:
    try:
        data = path.read_bytes()
        if decode or not data:
            check_image(data)
    except Exception as error:  # as above
        raise DataError(
            f"{path}: not a readable image ({error}). Run launch/prepare.py with --check and "
            "--source to list all such files."
        ) from error
    return data


def check_image(data: bytes) -> None:
    """Decodes an image in full.

    Raises what PIL makes of one that is damaged, DataError for one over the limit of pixels.
    """
    with images.own_limit(), images.opened(data, "it") as image:
        # JPEG at an eighth of the size: all of the file is read, in a third of the time
        image.draft(None, (max(image.width // 8, 1), max(image.height // 8, 1)))
        image.load()


def parallel(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Like `map`, some 16 items per worker ahead; PIL and file reads release Python's lock.

    One thread per core that this process may use. What `items` raises comes, as from `map`, after
    the results before it.
    """
    workers, items, failed = cores(), iter(items), None
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque = collections.deque()
        try:
            while failed is None:
                batch, failed = _some(items)
                if not batch:
                    break
                waiting.append(pool.submit(lambda batch: [function(x) for x in batch], batch))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
            if failed is not None:
                raise failed
        finally:
            for future in waiting:
                future.cancel()


def _some(items: Iterator[Any]) -> tuple[list[Any], Exception | None]:
    """The next few items (fewer handovers than one by one), and what was raised behind them."""
    batch: list[Any] = []
    try:
        for item in itertools.islice(items, 8):
            batch.append(item)
    except Exception as error:
        return batch, error
    return batch, None
