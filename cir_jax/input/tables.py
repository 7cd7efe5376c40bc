"""Prepared datasets on disk: tables of records, read without TensorFlow and without builder code.

A table is one TFDS configuration in ArrayRecord: `<data_dir>/<dataset>/<table>/<version>/`.
"""

import fnmatch
import hashlib
import json
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from cir_jax.errors import DataError, unknown
from cir_jax.input import links
from cir_jax.storage.buckets import files_below, place

OWN_DATA = {  # table of a training corpus: the --dataset of launch/prepare.py that makes it
    "images": "images",
    "captions": "pairs",
    "masked": "masked_pairs",
    "texts": "texts",
    "text_triplets": "text_triplets",
    "triplets": "image_triplets",
}


def is_prepared(data_dir: Path, dataset: str, table: str) -> bool:
    """Whether there is such a table, in any version."""
    return bool(_versions(place(data_dir) / dataset / table))


def _versions(root: Path) -> list[Path]:
    """The folders of a table's versions, oldest first."""
    found = root.glob("*.*.*/dataset_info.json") if root.is_dir() else ()
    return sorted(
        (file.parent for file in found), key=lambda path: [*map(int, path.name.split("."))]
    )


class Table:
    """Random access to the records of one split: `table[i] -> dict[str, value]`."""

    def __init__(self, data_dir: Path, dataset: str, table: str, split: str):
        self.data_dir, self.dataset, self.table, self.split = place(data_dir), dataset, table, split
        self._source = self._open()

    def _open(self) -> Any:
        import tensorflow_datasets as tfds  # slow to import: only when data are read

        root = self.data_dir / self.dataset / self.table
        versions = _versions(root)
        if not versions:
            raise DataError(
                f"{root}: no prepared table {self.dataset}/{self.table}. Run "
                f"`python launch/prepare.py --dataset={self.dataset} --data_dir={self.data_dir}`"
                f"{self._own_data()}."
            )
        builder = tfds.builder_from_directory(versions[-1])
        self.version = versions[-1].name
        if self.split.partition("[")[0] not in builder.info.splits:
            name = f"split of {self.dataset}/{self.table}:"
            raise DataError(unknown(name, self.split, builder.info.splits))
        self._lengths = builder.info.splits[self.split.partition("[")[0]].shard_lengths
        try:
            return builder.as_data_source(self.split)  # also parts, "train[:1000]"
        except (ValueError, AssertionError) as error:
            raise DataError(
                f"{self.dataset}/{self.table}: {self.split!r} is no part of a split: {error}"
            ) from error

    def _own_data(self) -> str:
        if self.table not in OWN_DATA:
            return ""
        kind = OWN_DATA[self.table]
        return f", or, for files of your own, with --dataset={kind} --source=PATH --name=NAME"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        record = self.stored(index)
        if "image" in record:
            record["image"] = links.followed(record["image"], f"{self!r}, record {int(index)}")
        return record

    def stored(self, index: SupportsIndex) -> dict[str, Any]:
        """The record as the table holds it: an image may be a link to its file."""
        try:
            record = self._source[index]
        except Exception as error:  # array_record and protobuf raise many types
            raise DataError(
                f"{self!r}, record {int(index)}: unreadable ({type(error).__name__}: {error}). "
                f"Delete {self.data_dir / self.dataset / self.table} and prepare it again."
            ) from error
        return record

    def mark(self) -> dict[str, Any]:
        """What `source.json` says of the files the table was made of (see `data.build`).

        {} for a table that has none: it was made from nothing, and is complete.
        """
        file = self.data_dir / self.dataset / self.table / self.version / "source.json"
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise DataError(
                f"{file}: not readable ({error}). Delete {self.data_dir / self.dataset} and "
                "prepare it again."
            ) from error

    def identity(self) -> str:
        """Its name and its files' names, sizes and times: a table prepared again is another one."""
        root = self.data_dir / self.dataset / self.table / self.version
        files = [(name, *of_file) for name, of_file in files_below(root).items()]
        return f"{self!r} {hashlib.sha256(repr(files).encode()).hexdigest()[:24]}"

    def contents(self) -> dict[str, Any]:
        """What tells this split from another of its name, wherever it lies: JSON.

        records: of this split or part of it. lengths: records of each shard. shards: their names
        and bytes. stamp: of the files that the split was made of (`data.build`), None without.
        """
        root = self.data_dir / self.dataset / self.table / self.version
        split = self.split.partition("[")[0]
        shards = {
            name: size
            for name, (size, _) in files_below(root).items()
            if fnmatch.fnmatchcase(name, f"*-{split}.array_record*")
        }
        return {
            "records": len(self),
            "lengths": list(self._lengths),
            "shards": shards,
            "stamp": self.mark().get("stamp", {}).get(split),
        }

    def column(self, name: str) -> np.ndarray:
        """All values of one scalar field, in record order."""
        return np.asarray([self[i][name] for i in range(len(self))])

    def __repr__(self) -> str:
        # stable: Grain compares it when an iterator is restored
        return f"Table({self.dataset}/{self.table}:{self.split}@{getattr(self, 'version', '?')})"

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes reopen the files
        return Table, (self.data_dir, self.dataset, self.table, self.split)
