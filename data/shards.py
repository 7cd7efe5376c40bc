"""Writes a table in shards that survive a kill: a later run keeps the whole ones and continues.
The same records make the same bytes, whichever process writes them.

One process writes, and its threads read and check images. Handing these out to other processes was
tried on two cores (2026-11-23, pairs with JPEGs of 640 x 480): 1.4 to 2.0 ms a pair on the clock
instead of 1.2 to 1.5, since what is left to the writer, 0.35 ms of its time, is then mostly to get
back the bytes. To write faster, processes would have to write whole shards, which asks for their
borders before they are read.

While a table grows, its folder holds the finished shards and `journal.json`, which lists them; what
the journal does not list is left over from a writer that died, and is removed.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from cir_jax.errors import DataError
from data.source import Split

SHARD_BYTES = 128 * 2**20  # a shard is full when it has as much; so much is lost at most
JOURNAL = "journal.json"


def write(
    builder: tfds.core.GeneratorBasedBuilder, splits: Mapping[str, Split], folder: Path
) -> None:
    """Writes the splits of the builder's table to the folder, which may hold a part of them.

    Afterwards the folder is a complete TFDS dataset, and still holds the journal, so that nothing
    is lost until it has its final name. Raises DataError when a split has no or another number of
    records than it said.
    """
    journal = _Journal(folder, _stamps(builder, splits))
    builder.info.set_file_format("array_record", override=True)
    serializer = ExampleSerializer(builder.info.features.get_serialized_info())
    for name, split in splits.items():
        start = sum(count for count, _ in journal.shards[name])
        records = iter(split.records(start))
        while (shard := _write_shard(folder / _PART, records, builder, serializer)) is not None:
            journal.add(name, *shard)
        total = sum(count for count, _ in journal.shards[name])
        if not total or split.count not in (None, total):
            expected = "some" if split.count is None else f"{split.count:,}"
            raise DataError(
                f"{builder.name}/{builder.builder_config.name}/{name}: {total:,} records, expected "
                f"{expected}: did the files change meanwhile? Delete {folder} and try again."
            )
    _finish(builder, journal)


def finished_shards(folder: Path) -> int:
    """Number of finished shards in an unfinished folder."""
    try:
        shards = json.loads((folder / JOURNAL).read_text())["shards"]
    except (OSError, ValueError, KeyError):
        return 0
    return sum(map(len, shards.values()))


def unfinished(
    builder: tfds.core.GeneratorBasedBuilder, splits: Mapping[str, Split], folder: Path
) -> str:
    """What an unfinished folder is to a build of these splits: "new", "continued" or "changed"."""
    if not finished_shards(folder):
        return "new"
    stamps = json.loads((folder / JOURNAL).read_text()).get("stamps")
    return "continued" if stamps == _stamps(builder, splits) else "changed"


def _stamps(
    builder: tfds.core.GeneratorBasedBuilder, splits: Mapping[str, Split]
) -> dict[str, str]:
    return {name: f"{builder.version} {split.stamp}" for name, split in splits.items()}


_PART = "shard.part"


class _Journal:
    """The finished shards of each split: (records, bytes of the file)."""

    def __init__(self, folder: Path, stamps: dict[str, str]):
        self.folder, self.stamps = folder, stamps
        self.shards: dict[str, list[tuple[int, int]]] = {name: [] for name in stamps}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            old = json.loads((folder / JOURNAL).read_text())
        except (OSError, ValueError):
            old = {}
        if old.get("stamps") == stamps:
            for name, shards in old["shards"].items():
                self._keep(name, shards)
        else:
            (folder / JOURNAL).unlink(missing_ok=True)
        kept = {self.path(n, i).name for n, s in self.shards.items() for i in range(len(s))}
        for path in folder.iterdir():
            if path.name not in kept | {JOURNAL}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def path(self, split: str, number: int) -> Path:
        return self.folder / f"{split}-{number:05d}"

    def add(self, split: str, count: int, size: int) -> None:
        """Takes the shard that has just been written."""
        os.replace(self.folder / _PART, self.path(split, len(self.shards[split])))
        self.shards[split].append((count, size))
        text = json.dumps({"stamps": self.stamps, "shards": self.shards})
        temporary = self.folder / f"{JOURNAL}.part"
        temporary.write_text(text)
        os.replace(temporary, self.folder / JOURNAL)

    def _keep(self, split: str, shards: list[list[int]]) -> None:
        for number, (count, size) in enumerate(shards):
            path = self.path(split, number)
            if not path.exists():  # killed while finishing: it may have its last name already
                for final in self.folder.glob(f"*-{split}.array_record-{number:05d}-of-*"):
                    os.replace(final, path)
            if not path.exists() or path.stat().st_size != size:
                break
            self.shards[split].append((count, size))


def _write_shard(
    path: Path,
    records: Iterator[dict[str, Any]],
    builder: tfds.core.GeneratorBasedBuilder,
    serializer: ExampleSerializer,
) -> tuple[int, int] | None:
    """Writes the next records until the shard is full; (records, bytes), None if there are none."""
    first = next(records, None)
    if first is None:
        return None
    count = size = 0
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for record in itertools.chain((first,), records):  # leaves `records` open
            example = serializer.get_tf_example(builder.info.features.encode_example(record))
            # else its fields lie in another order in each process
            data = example.SerializeToString(deterministic=True)
            writer.write(data)
            count, size = count + 1, size + len(data)
            if size >= SHARD_BYTES:
                break
        writer.close()
    except BaseException:
        path.unlink(missing_ok=True)  # what there is of it may be what fills the disk
        raise
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return count, path.stat().st_size


def _finish(builder: tfds.core.GeneratorBasedBuilder, journal: _Journal) -> None:
    """Gives the shards their last names and adds the files that TFDS reads."""
    infos = []
    for name, shards in journal.shards.items():
        info = tfds.core.SplitInfo(
            name=name,
            shard_lengths=[count for count, _ in shards],
            num_bytes=sum(size for _, size in shards),
        )
        infos.append(info)
        for number in range(len(shards)):
            final = f"{builder.name}-{name}.array_record-{number:05d}-of-{len(shards):05d}"
            os.replace(journal.path(name, number), journal.folder / final)
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(journal.folder)
