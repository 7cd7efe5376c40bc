"""Records in shards: read by many threads, written whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cir_jax.errors import CheckpointError
from cir_jax.storage import kept_open
from cir_jax.storage.record_shards import RecordShards, shard_name, write_shard


def test_many_threads_read_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_open, "OPEN", 3)
    records = [b"%d" % i for i in range(19)]
    for start in range(0, 19, 2):
        write_shard(tmp_path / shard_name("x", start // 2), records[start : start + 2])
    shards = RecordShards(tmp_path, "x", 19, 2, "Delete it.")
    order = np.random.default_rng(0).integers(0, 19, 2000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(shards.__getitem__, order)) == [records[i] for i in order]
    assert len(shards._readers) <= 3


def test_a_shard_of_too_few_records_is_named(tmp_path):
    for index, count in enumerate((4, 3)):
        write_shard(tmp_path / shard_name("x", index), [b"x"] * count)
    shards = RecordShards(tmp_path, "x", 8, 4, "Delete it.")
    assert shards[3] == b"x"
    said = r"x_00001.array_record: damaged \(3 records, expected 4\). Delete it."
    with pytest.raises(CheckpointError, match=said):
        shards[4]
    with pytest.raises(IndexError, match="record 8 of 8"):
        shards[8]


def test_a_shard_has_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut must not leave a name without content, for a shard as for any file."""
    file, synced = tmp_path / shard_name("x", 0), []
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append((os.fstat(number).st_size, file.exists()))
    )
    write_shard(file, [b"one", b"two"])
    assert synced == [(file.stat().st_size, False)]


def test_what_the_records_raise_is_raised(tmp_path):
    def records():
        yield b"one"
        raise KeyError("two")

    with pytest.raises(KeyError, match="two"):
        write_shard(tmp_path / shard_name("x", 0), records())
    assert not list(tmp_path.iterdir())
