"""Records in shards of ArrayRecord, one of which is read when it is asked for."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cir_jax.errors import CheckpointError
from cir_jax.storage import faults
from cir_jax.storage.atomic import appearing
from cir_jax.storage.kept_open import KeptOpen


def shard_name(prefix: str, index: int) -> str:
    return f"{prefix}_{index:05d}.array_record"


def write_shard(file: Path, records: Iterable[bytes]) -> None:
    """The whole shard or none, for reading record by record.

    Raises OSError, with the system's words alone, when it cannot be written, and what `records` and
    `appearing` raise.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    try:
        with appearing(file) as scratch:
            writer = ArrayRecordWriter(str(scratch), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
    except Exception as error:  # the library raises many types
        if (reason := faults.reason(error)) is None:
            raise
        raise OSError(reason) from error


class RecordShards(Sequence):
    """`rows` records as bytes, `shard_rows` in each file of `directory` but the last.

    remedy: what errors say is to be done. Copies for worker processes hold the place alone.
    """

    def __init__(self, directory: Path, prefix: str, rows: int, shard_rows: int, remedy: str):
        self.directory, self.prefix, self.remedy = directory, prefix, remedy
        self.rows, self.shard_rows = rows, shard_rows
        self._readers = KeptOpen(self._opened)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: Any) -> bytes:
        """Raises CheckpointError naming a shard that is gone, cut off or damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number, row = divmod(int(index), self.shard_rows)
        try:
            (record,) = self._readers.get(number).read([row])
        except Exception as error:  # the library raises many types
            raise self.damaged(number, str(error)) from error
        return record

    def damaged(self, number: int, what: str) -> CheckpointError:
        """To raise of the shard of this number."""
        file = self.directory / shard_name(self.prefix, number)
        return CheckpointError(f"{file}: damaged ({what}). {self.remedy}")

    def _opened(self, number: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        reader = ArrayRecordReader(str(self.directory / shard_name(self.prefix, number)))
        rows = min(self.shard_rows, self.rows - number * self.shard_rows)
        if reader.num_records() != rows:
            raise ValueError(f"{reader.num_records()} records, expected {rows}")
        return reader

    def __reduce__(self) -> tuple[Any, ...]:
        place = (self.directory, self.prefix, self.rows, self.shard_rows, self.remedy)
        return RecordShards, place
