"""Records in shards of ArrayRecord, one of which is read when it is asked for."""

import collections
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cir_jax.errors import CheckpointError

OPEN = 64
"""Shards whose readers are kept."""


def shard_name(prefix: str, index: int) -> str:
    return f"{prefix}_{index:05d}.array_record"


class RecordShards(Sequence):
    """`rows` records as bytes, `shard_rows` in each file of `directory` but the last.

    remedy: what errors say is to be done. Copies for worker processes hold the place alone.
    """

    def __init__(self, directory: Path, prefix: str, rows: int, shard_rows: int, remedy: str):
        self.directory, self.prefix, self.remedy = directory, prefix, remedy
        self.rows, self.shard_rows = rows, shard_rows
        self._readers = collections.OrderedDict[int, Any]()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: Any) -> bytes:
        """Raises CheckpointError naming a shard that is gone, cut off or damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number, row = divmod(int(index), self.shard_rows)
        try:
            (record,) = self._reader(number).read([row])
        except Exception as error:  # the library raises many types
            raise self.damaged(number, str(error)) from error
        return record

    def damaged(self, number: int, what: str) -> CheckpointError:
        """To raise of the shard of this number."""
        file = self.directory / shard_name(self.prefix, number)
        return CheckpointError(f"{file}: damaged ({what}). {self.remedy}")

    def _reader(self, number: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            reader = self._readers.get(number)
        if reader is None:
            reader = ArrayRecordReader(str(self.directory / shard_name(self.prefix, number)))
            rows = min(self.shard_rows, self.rows - number * self.shard_rows)
            if reader.num_records() != rows:
                raise ValueError(f"{reader.num_records()} records, expected {rows}")
        with self._lock:
            self._readers[number] = reader
            self._readers.move_to_end(number)
            while len(self._readers) > OPEN:  # closed when nobody reads it any more
                self._readers.popitem(last=False)
        return reader

    def __reduce__(self) -> tuple[Any, ...]:
        place = (self.directory, self.prefix, self.rows, self.shard_rows, self.remedy)
        return RecordShards, place
