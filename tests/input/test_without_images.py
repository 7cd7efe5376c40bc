"""Records without their images: made once, read without the table."""

import errno
import os
import pickle

import numpy as np
import pytest
from array_record.python import array_record_module

from cir_jax.errors import CheckpointError, DataError
from cir_jax.input import records, without_images
from cir_jax.input.records import Records
from cir_jax.input.tables import Table
from cir_jax.input.without_images import WithoutImages
from cir_jax.storage import disks
from cir_jax.training import inputs
from data import build
from tests import tiny as factory
from tests.training.test_honoured import set_up


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    build.prepare("shapes_tiny", ["captions"], folder)
    return Table(folder, "shapes_tiny", "captions", "train")


class Counted(factory.MemoryTable):
    """Says what was read of it. Record 5 cannot be read."""

    def __init__(self, count=20):
        super().__init__(factory.caption_table(count).records)
        self.reads = []

    def identity(self):
        return "counted"

    def stored(self, index):
        self.reads.append(index)
        if index == 5:
            raise DataError("record 5")
        return dict(self.records[index])

    __getitem__ = stored


def test_what_is_left_is_that_of_the_table(prepared, tmp_path):
    made = WithoutImages(prepared, ("image",), tmp_path)
    copy = pickle.loads(pickle.dumps(made))
    assert len(made) == len(prepared) > 8 and len(pickle.dumps(made)) < 2000
    for i in range(len(made)):
        whole = prepared[i]
        assert sorted(copy[i]) == sorted(set(whole) - {"image"})
        assert list(copy[i]["captions"]) == list(whole["captions"]) and copy[i]["id"] == whole["id"]
    # the captions alone are read
    (shard,) = tmp_path.glob("*/records_*")
    folder = prepared.data_dir / "shapes_tiny" / "captions"
    images = sum(len(prepared[i]["image"]) for i in range(len(prepared)))
    table = sum(file.stat().st_size for file in folder.rglob("*train.array_record*"))
    assert table > images and shard.stat().st_size < table - 0.9 * images


def test_the_table_is_read_once_and_a_kill_loses_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(without_images, "SHARD_ROWS", 8)
    table = Counted()
    write = WithoutImages._write

    def dies(self, number, pool):
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, pool)

    monkeypatch.setattr(WithoutImages, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        WithoutImages(table, ("image",), tmp_path)
    monkeypatch.setattr(WithoutImages, "_write", write)
    assert sorted(table.reads) == list(range(8))
    light = WithoutImages(table, ("image",), tmp_path)
    assert sorted(table.reads) == list(range(20))
    again = WithoutImages(table, ("image",), tmp_path)
    monkeypatch.setattr(records, "KEPT", 0)
    features = np.arange(20, dtype=np.float32)[:, None]
    source = Records(table, ("image",), None, {"image": features}, light=light)
    found = [source[i] for i in range(20)]
    assert len(table.reads) == 20  # nothing of it after that
    assert [int(x["image"][0]) for x in found] == [*range(5), 6, *range(6, 20)]
    assert source.corrupt == {5} and found[7]["captions"] == again[7]["captions"]


def test_damage_is_named(tmp_path):
    made = WithoutImages(Counted(), ("image",), tmp_path)
    made = pickle.loads(pickle.dumps(made))
    (shard,) = tmp_path.glob("*/records_*")
    shard.write_bytes(b"0" * 70_000)
    with pytest.raises(CheckpointError, match=r"records_00000.*damaged .*Delete .* made anew"):
        made[0]


def test_a_full_disk_is_named_and_leaves_no_half_shard(tmp_path, monkeypatch):
    class Full(array_record_module.ArrayRecordWriter):
        def write(self, record):
            super().write(record)  # as the library reports it
            raise RuntimeError(f"write() failed: {os.strerror(errno.ENOSPC)}; writing x at byte 9")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    said = r"records_00000.*cannot be written \(No space left on device\). .*CIR_JAX_CACHE"
    with pytest.raises(DataError, match=said):
        WithoutImages(Counted(), ("image",), tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_processes_share_the_work_where_they_share_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(without_images, "SHARD_ROWS", 4)
    monkeypatch.setattr(disks, "PATIENCE", 0)
    monkeypatch.setattr(without_images.jax, "process_count", lambda: 2)
    monkeypatch.setattr(without_images.jax, "process_index", lambda: 1)
    monkeypatch.setattr(disks, "of_all", lambda number: [0, number])
    for shared, rows in ((True, [*range(4, 8), *range(12, 16)]), (False, [*range(20)])):
        monkeypatch.setattr(disks, "sees_process_0", lambda directory, shared=shared: shared)
        table = Counted()
        if shared:
            with pytest.raises(CheckpointError, match="3 files of records are not seen by all"):
                WithoutImages(table, ("image",), tmp_path / "shared")
        else:
            assert len(WithoutImages(table, ("image",), tmp_path / "own")) == 20
        assert sorted(table.reads) == rows


def test_training_reads_a_large_table_so(monkeypatch):
    """Whose records would not all be kept in memory."""
    asked = []

    def light(table, fields, cache_dir):
        asked.append(fields)
        return [{k: x for k, x in table[i].items() if k not in fields} for i in range(len(table))]

    rows = lambda backbone, *_, **__: np.zeros((40, backbone.dim), np.float32)  # noqa: E731
    monkeypatch.setattr(inputs, "stored_features", rows)
    monkeypatch.setattr(inputs, "WithoutImages", light)
    experiment = set_up("compodiff", monkeypatch, **{"stage.stage1.data.features": True})
    whole = inputs.make_pipeline(experiment, "stage1").example()
    assert not asked
    monkeypatch.setattr(records, "KEPT", 39)
    apart = inputs.make_pipeline(experiment, "stage1").example()
    assert asked and all(np.array_equal(whole[name], apart[name]) for name in whole)
