"""Records of a table without their images, on disk: what training on features reads of it.

A record of a prepared table is read whole. Of a table too large to be kept in memory, each epoch
would read all images again for their captions, so these are written apart once:
`<cache_dir>/<key>/records_00000.array_record`, ... Any of it may be deleted at any time.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from cir_jax.errors import CheckpointError, DataError
from cir_jax.input.tables import Table
from cir_jax.progress import Progress
from cir_jax.sharding.cores import cores
from cir_jax.storage import disks
from cir_jax.storage.places import CACHE_VARIABLE
from cir_jax.storage.record_shards import RecordShards, shard_name, write_shard

SHARD_ROWS = 16_384
PREFIX = "records"


class WithoutImages(Sequence):
    """The records of `table` without `fields`; made on first use, together by all processes."""

    def __init__(self, table: Table, fields: Sequence[str], cache_dir: Path):
        self.table, self.fields = table, tuple(fields)
        key = f"records of {table.identity()} without {', '.join(fields)}, {SHARD_ROWS} each"
        directory = Path(cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:24]
        remedy = f"Delete {directory} and run the same command again: it is made anew."
        self._shards = RecordShards(directory, PREFIX, len(table), SHARD_ROWS, remedy)
        self._make()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """Raises DataError for a record that the table could not give, CheckpointError for what is
        damaged here."""
        data = self._shards[index]
        if not data:
            raise DataError(f"{self.table!r}, record {index}: unreadable.")
        return serialization.msgpack_restore(data)

    def _missing(self) -> list[int]:
        count = -(-len(self) // SHARD_ROWS)
        return [i for i in range(count) if not self._file(i).is_file()]

    def _file(self, number: int) -> Path:
        return self._shards.directory / shard_name(PREFIX, number)

    def _rows(self, number: int) -> range:
        return range(number * SHARD_ROWS, min((number + 1) * SHARD_ROWS, len(self)))

    def _make(self) -> None:
        """What is missing: each process a share of it, or all, where it does not see the disk of
        the first."""
        shared = disks.sees_process_0(self._shards.directory)
        missing = self._missing()
        mine = missing
        if shared and jax.process_count() > 1:
            mine = [i for i in missing if i % jax.process_count() == jax.process_index()]
        rows = sum(len(self._rows(number)) for number in mine)
        quiet = jax.process_index() != 0
        with (
            Progress(
                total=rows, desc="texts of images", unit="record", delay=2, disable=quiet
            ) as bar,
            ThreadPoolExecutor(min(8, cores())) as pool,
        ):
            for number in mine:
                self._write(number, pool)
                bar.update(len(self._rows(number)))
        left = disks.until(lambda: max(disks.of_all(len(self._missing()))), lambda left: not left)
        if left:
            raise CheckpointError(
                f"{self._shards.directory}: {left} files of records are not seen by all processes. "
                f"Is the disk in order? Set ${CACHE_VARIABLE} to a folder on another."
            )

    def _write(self, number: int, pool: ThreadPoolExecutor) -> None:
        try:
            write_shard(self._file(number), pool.map(self._record, self._rows(number)))
        except OSError as error:
            raise DataError(
                f"{self._file(number)}: cannot be written ({error}). Free some "
                f"space, or set ${CACHE_VARIABLE} to a folder on another disk."
            ) from error

    def _record(self, index: int) -> bytes:
        """Nothing for a record that cannot be read: training counts it when it comes to it."""
        try:
            record = self.table.stored(index)
        except DataError:
            return b""
        kept = {name: _plain(value) for name, value in record.items() if name not in self.fields}
        return serialization.msgpack_serialize(kept)


def _plain(value: Any) -> Any:
    """Texts of a sequence as a list."""
    objects = isinstance(value, np.ndarray) and value.dtype.hasobject
    return value.tolist() if objects else value
