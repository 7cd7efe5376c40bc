"""Rows of features on disk: what is read and held does not grow with their number."""

import json
import os
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cir_jax.errors import CheckpointError
from cir_jax.input.pipeline import Part, Pipeline
from cir_jax.input.reading import Reading
from cir_jax.input.records import CaptionPairs, Records
from cir_jax.retrieval import features
from cir_jax.storage import chunk_store, disks, kept_open, stored_rows
from cir_jax.storage.chunk_store import ChunkStore
from cir_jax.training import inversion
from tests import tiny as factory

DIM = 768
CORPUS = 12_000_000


def sparse(directory, rows, name="of a corpus"):
    """A store of so many rows that takes no place on the disk; row r begins with r % 1000."""
    store = ChunkStore(directory, {"features": name}, rows)
    store.write(0, np.zeros((min(store.chunk_rows, rows), DIM), np.float32))
    whole = stored_rows.header(store.file(0))
    head = store.file(0).read_bytes()[: whole.first]
    for index, start in enumerate(range(0, rows, store.chunk_rows)):
        count = min(store.chunk_rows, rows - start)
        with store.file(index).open("wb") as file:
            shape = {"descr": "<f4", "fortran_order": False, "shape": (count, DIM)}
            np.lib.format.write_array_header_1_0(file, shape)
            assert file.tell() == len(head)
            file.truncate(whole.first + 4 * DIM * count)
    return store


def hold(monkeypatch, read):
    """Bytes read by `os.pread` and most that were held, of what `read` does."""
    taken, pread = [], os.pread

    def counted(file, size, where):
        taken.append(size)
        return pread(file, size, where)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", counted)
        tracemalloc.start()
        read()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return sum(taken), most


class Corpus(factory.MemoryTable):
    """Records that are made when they are read."""

    def __init__(self, rows):
        self.rows, self.name = rows, "corpus"

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        return {"id": index, "image": b"a large file", "captions": [b"a red star"]}


def test_a_corpus_is_not_held(tmp_path, monkeypatch, tiny):
    """36.9 GB of features, of which a pipeline reads its rows; in memory there is less than a
    thousandth of them, as of a corpus of a hundredth."""

    def pipeline(store):
        table, transform = Corpus(store.rows), tiny[0].image_transform
        source = Records(table, ("image",), transform, {"image": store.stored()})
        part = Part("captions", source, CaptionPairs(tiny[0].tokenizer, "features"))
        return Pipeline((part,), 256, seed=0, process_index=1, process_count=4)

    def read(store):
        batches = list(pipeline(store).batches(0, 10))
        assert batches[0]["target_features"].shape == (64, DIM)

    found = {rows: sparse(tmp_path, rows) for rows in (CORPUS // 100, CORPUS)}
    assert sum(file.stat().st_size for file in found[CORPUS].directory.glob("*.npy")) > 36e9
    read(found[CORPUS // 100])  # what is imported and made once
    few, many = (hold(monkeypatch, lambda store=store: read(store)) for store in found.values())
    assert few[0] == many[0] == 10 * 64 * 4 * DIM  # its own rows, each once
    assert many[1] < 36e9 / 1000 and many[1] - few[1] < 36e9 / 10_000
    # nor do worker processes get it
    small, large = (len(pickle.dumps(pipeline(store).parts[0].source)) for store in found.values())
    assert large < 16384 and abs(large - small) < 16


def test_a_file_that_is_let_go_is_read_to_the_end(tmp_path, monkeypatch):
    """As when another thread opens it, too, or many others, between the opening and the reading."""
    values = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    store = ChunkStore(tmp_path, {"features": "few"}, 8)
    store.write(0, values)
    rows, read = store.stored(), os.pread

    def after_others(*args):
        rows._open._kept.clear()
        return read(*args)

    monkeypatch.setattr(os, "pread", after_others)
    for i in range(8):
        np.testing.assert_array_equal(rows[i], values[i])


def test_many_threads_read_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_store, "CHUNK_ROWS", 2)
    monkeypatch.setattr(kept_open, "OPEN", 3)
    values = np.arange(40, dtype=np.float32).reshape(20, 2)
    store = ChunkStore(tmp_path, {"features": "few"}, 20)
    for start in range(0, 20, 2):
        store.write(start // 2, values[start : start + 2])
    rows = store.stored()
    order = np.random.default_rng(0).integers(0, 20, 4000)
    with ThreadPoolExecutor(8) as pool:
        found = np.stack(list(pool.map(rows.__getitem__, order)))
    np.testing.assert_array_equal(found, values[order])
    assert len(rows._open) <= 3


def test_a_disk_that_gives_less_than_is_asked_for_is_asked_again(tmp_path, monkeypatch):
    """As some of a network do."""
    values = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    store = ChunkStore(tmp_path, {}, 4)
    store.write(0, values)
    rows, read = store.stored(), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, at: read(file, min(size, 7), at))
    for i in range(4):
        np.testing.assert_array_equal(rows[i], values[i])
    store.file(0).write_bytes(store.file(0).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="row 3 is cut off"):
        rows[3]


def test_a_damaged_byte_of_a_header_makes_it_no_file_of_rows(tmp_path):
    """It is computed again, whatever Python makes of what is written there."""
    store = ChunkStore(tmp_path, {}, 8)
    store.write(0, np.ones((8, 4), np.float32))
    file, data = store.file(0), bytearray(store.file(0).read_bytes())
    first = stored_rows.header(file).first
    for place in range(first):
        for byte in (3, *map(ord, "0iB>")):
            damaged = data[:]
            damaged[place] = byte
            file.write_bytes(damaged)
            found = stored_rows.header(file)
            assert found is None or found.dtype == np.float32 or not found.whole, (place, byte)
            assert store.done() in (0, 8)


def test_workers_read_what_threads_read(tmp_path, tiny):
    rng = np.random.default_rng(0)
    store = ChunkStore(tmp_path, {"features": "few"}, 40)
    store.write(0, rng.normal(size=(40, 24)).astype(np.float32))
    source = Records(
        factory.caption_table(40), ("image",), tiny[0].image_transform, {"image": store.stored()}
    )
    part = Part("captions", source, CaptionPairs(tiny[0].tokenizer, "features"))
    one, two = (
        list(Pipeline((part,), 8, 0, reading=Reading(workers, 2, 4)).batches(0, 6))
        for workers in (0, 2)
    )
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a["target_features"], b["target_features"])


def test_writing_holds_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_store, "CHUNK_ROWS", 64)
    rows, made = 100 * 64 + 5, []

    def pieces():
        for start in range(0, rows, 48):
            made.append(np.full((min(48, rows - start), DIM), start, np.float32))
            yield made.pop()

    store = ChunkStore(tmp_path, {"features": "many"}, rows)

    def write():
        for _ in features._written(pieces(), store, 0):
            pass

    _, most = hold(monkeypatch, write)
    assert most < 4 * rows * DIM / 10
    found = store.stored()
    assert len(found) == rows == store.done() and found.shape == (rows, DIM)
    for row in (0, 47, 48, 63, 64, rows - 1):
        assert (found[row] == 48 * (row // 48)).all()
    assert found.of_shape((24, 32))[100].shape == (24, 32)
    with pytest.raises(IndexError, match=f"row {rows} of {rows}"):
        found[rows]


def test_files_are_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_store, "CHUNK_ROWS", 2)
    monkeypatch.setattr(kept_open, "OPEN", 3)
    store = ChunkStore(tmp_path, {}, 20)
    for i in range(10):
        store.write(i, np.full((2, 3), i, np.float32))
    found = store.stored()
    before = len(os.listdir("/proc/self/fd"))
    assert [int(found[i][0]) for i in range(20)] == [i // 2 for i in range(20)]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.parametrize("damage", ["gone", "cut off", "no numbers", "not finite"])
def test_damage_is_named_when_it_is_read(tmp_path, damage):
    store = ChunkStore(tmp_path, {}, 4)
    rows = np.ones((4, 3), np.float32)
    rows[1] = np.nan  # an image that could not be read
    store.write(0, rows)
    found, file = store.stored(), store.file(0)
    assert np.isnan(found[1]).all() and (found[2] == 1).all()
    again = pickle.loads(pickle.dumps(found))
    if damage == "gone":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-4])
    elif damage == "no numbers":
        file.write_bytes(b"0" * 130)
    else:
        rows[3, 1] = np.inf
        np.save(file, rows)
    what = dict.fromkeys(("cut off", "no numbers"), "row 3 is cut off") | {"gone": "No such file"}
    with pytest.raises(CheckpointError) as error:
        again[3]
    message = str(error.value)
    assert what.get(damage, "row 3 is not finite") in message and str(file) in message
    assert f"Delete {store.directory} and run the same command again" in message


@pytest.mark.parametrize("odd", ["cut off", "of fewer rows", "of another width", "of float16"])
def test_chunks_end_where_one_is_not_like_the_others(tmp_path, monkeypatch, odd):
    monkeypatch.setattr(chunk_store, "CHUNK_ROWS", 2)
    store = ChunkStore(tmp_path, {}, 6)
    for index in range(3):
        store.write(index, np.ones((2, 4), np.float32))
    assert store.done() == 6
    rows = {"of fewer rows": (1, 4), "of another width": (2, 3)}.get(odd, (2, 4))
    np.save(store.file(1), np.ones(rows, np.float16 if odd == "of float16" else np.float32))
    if odd == "cut off":
        store.file(1).write_bytes(store.file(1).read_bytes()[:-1])
    assert store.done() == 2 and store.load().shape == (2, 4)


def test_rows_count_when_all_processes_find_them_whole(tmp_path, monkeypatch):
    store = ChunkStore(tmp_path, {}, 4)
    store.write(0, np.ones((4, 2), np.float32))
    monkeypatch.setattr(disks, "of_all", lambda mine: [mine, min(mine, 4)])
    assert store.load(lambda rows: True) is not None
    said = iter([4, 0])  # how many another process sees, and whether they are whole there
    monkeypatch.setattr(disks, "of_all", lambda mine: [mine, next(said)])
    assert store.load(lambda rows: True) is None


def test_whoever_does_not_see_the_disk_of_process_0_writes_for_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(disks.jax, "process_count", lambda: 2)
    said = {}
    monkeypatch.setattr(disks.multihost_utils, "process_allgather", lambda x: np.stack([x, x]))

    def store(index, cache_dir):
        def broadcast(token):
            return said.setdefault("token", token) if index == 0 else said["token"]

        monkeypatch.setattr(disks.multihost_utils, "broadcast_one_to_all", broadcast)
        monkeypatch.setattr(chunk_store.jax, "process_index", lambda: index)
        return ChunkStore(cache_dir, {"features": "x"}, 4)

    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    first = store(0, tmp_path / "shared")
    of_before = tmp_path / "own" / first.directory.name / "process_0"
    of_before.parent.mkdir(parents=True)
    of_before.write_text("7")  # when it was process 0 itself
    for index, name in ((0, "shared"), (1, "shared"), (1, "own")):
        said.clear() if index == 0 else None
        made = store(index, tmp_path / name)
        assert made.writes == (index == 0 or name == "own")
        made.write(0, rows)
        assert made.done() == 4 and (made.stored()[3] == rows[3]).all()
    assert json.loads((first.directory / "meta.json").read_text())["rows"] == 4


def test_all_wait_for_whom_the_rows_reach_late(tmp_path, monkeypatch):
    store = ChunkStore(tmp_path, {}, 4)
    store.write(0, np.ones((4, 2), np.float32))
    sees = iter([0, 0, 4])
    monkeypatch.setattr(disks, "of_all", lambda mine: [mine, next(sees)])
    monkeypatch.setattr(disks.time, "sleep", lambda seconds: None)
    assert len(store.stored()) == 4
    monkeypatch.setattr(disks, "of_all", lambda mine: [mine, 0])
    with pytest.raises(CheckpointError, match="0 of 4 rows of features are seen by all processes"):
        store.stored()


def test_stored_words_are_not_held(tmp_path, monkeypatch):
    identity = {"rows": 1024, "shard_rows": 1024, "token_dim": DIM, "concepts": 3}
    made = inversion.Store(tmp_path / "words", identity)
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(1024, DIM)), rng.integers(0, 9, (1024, 3))], axis=1)
    made.write(0, rows.astype(np.float32))
    for index in range(1, CORPUS // 1024):
        os.link(made._file(0), made._file(index))
    store = inversion.Store(tmp_path / "words", identity | {"rows": CORPUS // 1024 * 1024})
    assert store.stored_rows() == len(inversion.Words(store)) > 11_990_000
    words, wanted = inversion.Words(store), rng.integers(0, store.rows, 200)

    def read():
        for index in wanted:
            np.testing.assert_array_equal(words[index], rows[index % 1024, :DIM].astype(np.float32))

    assert hold(monkeypatch, read)[1] < 5e6
    assert len(words._shards._readers) <= kept_open.OPEN and len(pickle.dumps(words)) < 1000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(words))[7], words[7])
    made._file(5).unlink()
    made._file(5).write_bytes(b"0" * 70_000)
    with pytest.raises(CheckpointError, match=r"words_00005.array_record: damaged .* Delete it"):
        words[5 * 1024]
