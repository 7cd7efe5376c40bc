"""FAISS's file: it may be missing, damaged, old, of another store, or half written at any time."""

import hashlib
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cir_jax.library.indexes import faiss_ivf, ladder
from cir_jax.library.indexes.faiss_ivf import Faiss
from tests.launch import forks
from tests.launch.binaries import environment
from tests.library.test_indexes import DIM, Photos, agrees

pytest.importorskip("faiss")
COUNT = 200


@pytest.fixture
def photos(tmp_path):
    made = Photos(tmp_path / "s.sqlite")
    made.add([f"{i}" for i in range(COUNT)], 1)
    yield made
    made.store.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.sqlite.x.faiss"


@pytest.fixture
def said():
    return []


@pytest.fixture
def opened(photos, path, said):
    """Opens the file and brings it up to date."""

    def open_it(which=photos):
        index = Faiss(path, which.vectors.of, said.append)
        ladder.follow(index, which.vectors)
        agrees(index, which.world())
        return index

    return open_it


def test_what_is_kept_is_not_made_again(opened, photos, path, said):
    opened().close()
    assert said == [f"{path}: made of the store's vectors (there was none)."]
    written = path.stat().st_mtime_ns
    assert len(opened()) == COUNT and len(said) == 1
    photos.add(["new"], 2)
    photos.remove({"4"})
    assert len(opened()) == COUNT and path.stat().st_mtime_ns == written  # read from the log
    photos.add([f"more {i}" for i in range(5)], 3)
    assert len(opened()) == COUNT + 5 and path.stat().st_mtime_ns != written
    assert len(said) == 1 and not list(path.parent.glob(".*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:],
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 64]) + data[-1000:],
        lambda data: sealed(data[:-32].replace(b"faiss 1", b"faiss 9")),
        lambda data: sealed(data[:-32][: len(data) // 2]),
        lambda data: sealed(b"{}\n"),
        lambda data: sealed(b"[1]\n"),
        lambda data: sealed(b"\xff\xfe" * 50),
    ],
)
def test_a_damaged_file_is_made_again(opened, path, said, damage):
    opened()
    path.write_bytes(damage(path.read_bytes()))
    said.clear()
    opened()
    assert len(said) == 1 and said[0].startswith(
        f"{path}: made of the store's vectors (the file was damaged: "
    )
    opened()
    assert len(said) == 1


def sealed(data):
    """With a checksum that fits: a file of another version, or by somebody who means harm."""
    return data + hashlib.sha256(data).digest()


def test_a_file_of_another_store(opened, photos, path, said, tmp_path):
    opened()
    other = Photos(tmp_path / "other.sqlite")
    other.add([f"{i}" for i in range(COUNT)], 5)
    opened(other)
    assert len(said) == 2 and "(it was of another store, or of one that is very" in said[1]
    other.store.close()
    opened()
    # an older copy of the store that has gone another way since, just as far
    shutil.copy(tmp_path / "s.sqlite", tmp_path / "copy.sqlite")
    for suffix in ("-wal", "-shm"):
        shutil.copy(tmp_path / f"s.sqlite{suffix}", tmp_path / f"copy.sqlite{suffix}")
    copy = Photos(tmp_path / "copy.sqlite")
    photos.add([f"{i}" for i in range(10)], 6)
    opened()
    copy.add([f"{i}" for i in range(10)], 7)
    assert len(said) == 3
    opened(copy)
    assert len(said) == 4
    copy.store.close()


def test_it_is_made_again_when_it_has_grown(opened, photos, path, said, monkeypatch):
    monkeypatch.setattr(faiss_ivf, "SMALL", 64)
    opened()
    for more in range(4):
        photos.add([f"{more} {i}" for i in range(COUNT // 4)], 3 + more)
        opened()
    assert len(said) == 1
    photos.add(["one too many"], 8)
    index = opened()
    assert len(said) == 2 and f"(it has grown since it was made of {COUNT} vectors)" in said[1]
    assert index.lists[0] > 1 and len(index) == 2 * COUNT + 1


def test_no_room_for_the_file(opened, path, said, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        assert len(opened()) == COUNT
    assert said[1:] == [f"{path}: not kept for the next time (No space left on device)."]
    assert not path.exists() and not list(path.parent.glob(".*"))


def test_few_lists_are_as_good_as_is_said(tmp_path, monkeypatch):
    """Of queries that it was not tuned on; and of a filter, whatever it leaves over."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6000, DIM), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    ids = np.arange(1, 6001)
    monkeypatch.setattr(faiss_ivf, "SMALL", 64)
    index = Faiss(tmp_path / "f", lambda some: rows[np.maximum(some, 1) - 1], lambda said: None)
    read = lambda: iter([(ids, rows)])  # noqa: E731
    index.rebuild(read, 6000)
    every, lists = index.lists
    assert 1 < lists < every
    queries = rows[:100] + rows[100:200]
    found = lambda **ranked: index.search(queries, 10, **ranked)  # noqa: E731
    best = faiss_ivf.scan(read, queries, 10)
    assert faiss_ivf.recall(found(), best) > 0.95
    index._index.nprobe = 1
    assert faiss_ivf.recall(found(), best) < 0.9  # what is measured can be worse
    index._index.nprobe = 1  # of some queries the list holds too few, of others enough
    many = index.search(queries, 30)
    assert 0 < (many.scores < faiss_ivf.scan(read, queries, 30).scores - 1e-4).sum()
    for query, row in zip(queries, many.ids, strict=True):
        np.testing.assert_array_equal(index.search(query[None], 30).ids[0], row)
    for share in (2, 40, 3000):
        some = ids[::share]
        best = faiss_ivf.scan(lambda some=some: iter([(some, rows[some - 1])]), queries, 10)
        index._index.nprobe = lists
        assert faiss_ivf.recall(found(only=some), best) > 0.9
        assert (found(only=some).ids >= 0).sum() == 100 * min(10, len(some))


@pytest.mark.slow
def test_it_is_killed_as_it_writes_while_another_waits(opened, photos, path, said, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "tests/library/following.py", photos.store.path, path, log, 60]
    output = tmp_path / "output"
    process = forks.Fork(list(map(str, command)), env=environment(tmp_path), log=output)
    deadline = time.monotonic() + 60
    while not (log.exists() and "writing" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.005)
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(opened)
        time.sleep(0.2)
        assert not waits.done() and not said and len(list(tmp_path.glob(f".{path.name}.*"))) == 1
        process.kill()
        process.wait(60)
        assert len(waits.result(60)) == COUNT
    assert said == [f"{path}: made of the store's vectors (there was none)."]
    assert path.exists() and not list(tmp_path.glob(".*"))


def test_who_waits_for_another_takes_what_it_made(opened, said, monkeypatch):
    writes, go = threading.Event(), threading.Event()
    write_atomically = faiss_ivf.write_atomically

    def slowly(path, write):
        writes.set()
        assert go.wait(60)
        write_atomically(path, write)

    monkeypatch.setattr(faiss_ivf, "write_atomically", slowly)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(opened)
        assert writes.wait(60)
        second = pool.submit(opened)
        time.sleep(0.1)
        assert not second.done()
        go.set()
        assert len(first.result(60)) == len(second.result(60)) == COUNT
    assert len(said) == 1
