"""Where captions come from: a prepared table, a file or folder of texts, a dataset of the hub."""

import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from cir_jax.errors import DataError
from cir_jax.input.tables import Table, is_prepared
from cir_jax.progress import Progress
from data import build, formats, hub
from data.corpus import Unusable
from data.sharing import Shard
from data.source import stamp
from data.texts import texts_dataset_builder as texts


class Entry(NamedTuple):
    """A record or line. captions: as they are, empty ones too. done: of `Captions.total`."""

    captions: list[str]
    done: int


class Captions(Protocol):
    """total, unit: how much there is to go through. identity: what the captions depend on."""

    total: int
    unit: str
    identity: str

    def entries(self, start: int) -> Iterator[Entry]:
        """From number `start` on. Raises DataError for what cannot be read."""
        ...


class TableCaptions:
    """A table with a field `captions`: that of image-caption pairs, of texts, of a benchmark."""

    unit = "records"

    def __init__(self, table: Table):
        self.table, self.total, self.identity = table, len(table), table.identity()
        if self.total and "captions" not in table[0]:
            raise DataError(
                f"--captions: {table!r} has no field captions; its fields are "
                f"{', '.join(table[0])}. Tables of pairs and of texts have it."
            )

    def entries(self, start: int) -> Iterator[Entry]:
        for i in range(start, self.total):
            yield Entry([caption.decode() for caption in self.table[i]["captions"]], i + 1)


class FileCaptions:
    """A file or folder, or a dataset of the hub, read as launch/prepare.py --dataset=texts does."""

    unit = "bytes"

    def __init__(self, source: formats.Source, columns: Mapping[str, str]):
        self._corpus = texts.Captions(source, columns)
        self.total, self.identity = self._corpus.total, stamp(*self._corpus.files)

    def entries(self, start: int) -> Iterator[Entry]:
        for entry in self._corpus.entries(start, contents=True):
            try:
                if entry.problem:
                    raise Unusable(entry.problem)
                captions = entry.load()["captions"]
            except Unusable as error:
                raise DataError(
                    f"--captions: {entry.where}: {error}. Mend it, or leave such lines out with "
                    "`python launch/prepare.py --dataset=texts --source=... --allow_partial "
                    "--name=NAME` and --captions=NAME/texts."
                ) from error
            yield Entry(captions, entry.done)


def read(name: str, data_dir: Path, columns: Mapping[str, str], split: str = "") -> Captions:
    """A path, hf:ORG/NAME with its `split`, or DATASET/TABLE or DATASET/TABLE:SPLIT (default train)
    in `data_dir`.

    Tables of the embedded world are made where they are missing. Raises DataError for what is none
    of them.
    """
    if hub.is_named(name):
        return FileCaptions(hub.opened(name, split), columns)
    if split:
        raise DataError(f"--split={split} is of hf:ORG/NAME; of a table say DATASET/TABLE:{split}.")
    path = Path(name).expanduser()
    if path.exists():
        return FileCaptions(path, columns)
    place, _, split = name.partition(":")
    dataset, slash, table = place.partition("/")
    if slash and build.from_nothing(dataset):
        build.prepare_needed({dataset: [table]}, data_dir=data_dir)
    elif not (slash and is_prepared(data_dir, dataset, table)):
        raise DataError(
            f"--captions={name}: neither a file or folder nor DATASET/TABLE of the prepared data "
            f"in {data_dir} (`python launch/prepare.py --dataset=pairs`, or texts, makes one)."
        )
    return TableCaptions(Table(data_dir, dataset, table, split or "train"))


def blocks(
    captions: Captions, shard: Shard, size: int, first: int, done: int, description: str
) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """(done, [(name, caption)]) of this shard's blocks of `size` records, from its number `first`
    on, with progress. done: what of `captions.total` is behind the blocks before."""
    mine = first * shard.count + shard.index
    entries = captions.entries(mine * size)
    with Progress(
        total=captions.total, initial=done, desc=description, unit=f" {captions.unit}",
        unit_scale=True, delay=1,
    ) as bar:  # fmt: skip
        for start in range(mine * size, sys.maxsize, size * shard.count):
            block, seen = [], 0
            for seen, entry in enumerate(islice(entries, size), 1):
                number = start + seen - 1
                block += [(f"{number}/{i}", text) for i, text in enumerate(entry.captions)]
                done = entry.done
            if seen:
                bar.update(done - bar.n)
                yield done, block
            if seen < size:
                return
            for entry in islice(entries, size * (shard.count - 1)):
                bar.update(entry.done - bar.n)
