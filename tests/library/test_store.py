"""The SQLite file: what it keeps, what it refuses, and who may read it when."""

import os
import sqlite3
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from cir_jax.errors import DataError
from cir_jax.library.photos import File
from cir_jax.library.store import New, Store
from tests.launch.binaries import ROOT


def new(name, size=3, problem="", taken=""):
    return New(File(name, size, 10**18), b"d" + name, taken, problem)


def vectors(*firsts):
    return np.float32([[first, 1, 0, 2] for first in firsts])


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    yield store
    store.close()


@pytest.fixture
def filled(store):
    """Two photos and one that cannot be read, under encoder 1; encoder 2 has one of them."""
    first, second = store.encoder("one", "{}"), store.encoder("two", "{}")
    store.add(first, [new(b"a/x"), new(b"a/y", problem="odd"), new(b"b")], vectors(1, np.nan, 3))
    store.add(second, [new(b"b")], vectors(7))
    return store


def rows(store, encoder=1):
    """Path -> vector."""
    found = {}
    for numbers, norms, units in store.vectors(encoder):
        paths = store.paths(numbers)
        found |= dict(zip(paths, units.astype(np.float32) * norms[:, None], strict=True))
    return found


def test_vectors_come_back_in_half_precision(filled):
    found = rows(filled)
    assert list(found) == [b"a/x", b"b"]  # not the one with a problem
    np.testing.assert_allclose(np.stack([*found.values()]), vectors(1, 3), rtol=2**-11)
    (_, norms, units) = next(filled.vectors(1))
    assert units.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(units.astype(np.float32), axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(norms, np.linalg.norm(vectors(1, 3), axis=1), rtol=1e-6)
    assert [p.path for p in filled.lacking(2)] == [b"a/x"] and not filled.lacking(1)
    assert filled.encoder("one", "other words") == 1 and filled.count() == 3
    db = sqlite3.connect(filled.path)
    assert db.execute("PRAGMA page_size").fetchone() == (16384,)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_row_that_is_read_again_stays_one(filled):
    photos = {p.path: p for p in filled.photos()}
    filled.add(1, [new(b"a/y"), new(b"b", size=9)], vectors(5, 6))
    again = {p.path: p for p in filled.photos()}
    assert {k: p.id for k, p in again.items()} == {k: p.id for k, p in photos.items()}
    assert not again[b"a/y"].problem and again[b"b"].size == 9
    np.testing.assert_allclose(rows(filled)[b"b"][0], 6, rtol=1e-3)


def test_names_swap_and_what_goes_takes_its_vectors_along(filled):
    x, y, b = filled.photos()
    moved = [(x, File(b"b", 3, 5)), (b, File(b"a/x", 3, 6))]
    filled.rearrange([y], [], moved, [(b, File(b"c", 3, 7))])
    found = {path: round(float(row[0])) for path, row in rows(filled).items()}
    assert found == {b"b": 1, b"a/x": 3, b"c": 3}
    assert {p: round(float(row[0])) for p, row in rows(filled, 2).items()} == {b"a/x": 7, b"c": 7}
    filled.rearrange(filled.photos(), [], [], [])
    assert not rows(filled) and not rows(filled, 2)


def test_folders_and_days(store):
    encoder = store.encoder("one", "{}")
    named = [b"2024/a", b"2024/sub/b", b"2024b/c", b"2024", b"z"]
    days = ["2023-12-31T23:59:59", "2024-05-17T10:00:00", "", "2024-05-18T00:00:00", "2025-01-01"]
    news = [new(name, taken=day) for name, day in zip(named, days, strict=True)]
    store.add(encoder, news, vectors(*range(5)))  # without a day: of 2001, by the file's time

    def chosen(**given):
        return sorted(store.paths(store.chosen(**given)), key=named.index)

    assert chosen() == named
    assert chosen(under=b"2024") == [b"2024/a", b"2024/sub/b"]  # not 2024b
    assert chosen(after="2024-05-17") == [b"2024/sub/b", b"2024", b"z"]
    assert chosen(after="2024-05-18") == [b"2024", b"z"] and chosen(after="2025") == [b"z"]
    assert chosen(under=b"2024", after="2024") == [b"2024/sub/b"]
    assert len(chosen(after="2001")) == 5 and len(chosen(after="2002")) == 4


def test_others_read_while_one_writes(filled):
    reader = Store(filled.path)
    before = reader.version()
    pieces = reader.vectors(1)
    with filled._change() as db:
        db.execute("DELETE FROM photos")
        assert [len(units) for _, _, units in pieces] == [2]
        assert reader.count() == 3 and reader.version() == before
    assert reader.count() == 0 and reader.version() != before


def test_one_process_indexes(filled):
    other = Store(filled.path)
    with filled.indexing() as alone, other.indexing() as second:
        assert alone and not second
    with other.indexing() as alone:
        assert alone


def test_a_batch_is_kept_whole_or_not_at_all(filled, monkeypatch):
    filled._db.execute("CREATE TRIGGER t BEFORE INSERT ON vectors_1 WHEN NEW.photo > 5 "
                       "BEGIN SELECT RAISE(ABORT, 'no'); END")  # fmt: skip
    with pytest.raises(DataError, match="s.sqlite: no"):
        filled.add(1, [new(b"p"), new(b"q"), new(b"r")], vectors(1, 2, 3))
    assert filled.count() == 3
    filled.add(1, [new(b"p")], vectors(1))


def test_a_full_disk_keeps_what_was_there(filled):
    pages = filled._db.execute("PRAGMA page_count").fetchone()[0]
    filled._db.execute(f"PRAGMA max_page_count = {pages}")
    many = [new(b"%d" % i) for i in range(3000)]
    with pytest.raises(
        DataError, match="s.sqlite: database or disk is full. Free some space; what"
    ):
        filled.add(1, many, vectors(*range(3000)))
    assert len(rows(filled)) == 2 and filled.count() == 3
    filled._db.execute("PRAGMA max_page_count = 100000")
    filled.add(1, many, vectors(*range(3000)))
    assert len(rows(filled)) == 3002


def test_what_is_no_store_is_refused(tmp_path, filled):
    path = tmp_path / "other.sqlite"
    path.write_bytes(b"these are no tables" * 100)
    with pytest.raises(DataError, match="other.sqlite: file is not a database. It is damaged"):
        Store(path)
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE mail (id)")
    db.commit()
    with pytest.raises(DataError, match="other.sqlite: a database of another program"):
        Store(path)
    left = [db.execute(f"PRAGMA {x}").fetchone()[0] for x in ("user_version", "journal_mode")]
    assert left == [0, "delete"]
    filled._db.execute("PRAGMA user_version = 99")
    filled.close()
    with pytest.raises(DataError, match="no store of this version .it says 99, this is 1.. Delete"):
        Store(filled.path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be made .File exists.. Give a place that can"):
        Store(tmp_path / "file" / "s.sqlite")


def test_a_damaged_vector_is_told(filled):
    filled._db.execute("UPDATE vectors_1 SET vector = x'00' WHERE photo = 1")
    with pytest.raises(DataError, match="its vectors differ in length. It is damaged: delete it"):
        rows(filled)


READ = """
import os, sys
from pathlib import Path
from cir_jax.library.store import Store
from cir_jax.errors import DataError
if os.getuid() == 0:  # after the imports: others may not see where they are installed
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
where = Path(sys.argv[1])
store = Store(where / "s.sqlite")
print(store.count(), store.encoder("one", ""), store.encoder("three", ""), store.reads_only)
try:
    Store(where / "new.sqlite")
except DataError as error:
    print(error)
"""


def test_a_store_that_cannot_be_written_is_read(filled):
    """By another user, as root may write anywhere."""
    filled.close()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        target = f"{folder}/s.sqlite"
        with open(target, "wb") as file:
            file.write(filled.path.read_bytes())
        os.chmod(target, 0o444)
        os.chmod(folder, 0o555)
        command = [sys.executable, "-c", READ, folder]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        os.chmod(folder, 0o755)
    first, second = done.stdout.splitlines(), done.stderr
    assert first[0] == f"3 1 0 {target} cannot be written", second
    assert f"{folder}/new.sqlite: cannot be made (no permission to write)" in first[1]


def test_a_store_without_a_log_gets_one(tmp_path):
    """As version 0.1 wrote them at first."""
    path = tmp_path / "s.sqlite"
    store = Store(path)
    encoder = store.encoder("e", "{}")
    with store._change() as db:
        for what in ("TABLE log", "TRIGGER written", "TRIGGER deleted"):
            db.execute(f"DROP {what}_{encoder}")
    assert store.changes(encoder, "") == ("", None)
    assert store.encoder("e", "{}") == encoder
    stamp, changed = store.changes(encoder, "")
    assert stamp.startswith("1:") and changed is None
    store.close()


def test_the_log_says_what_has_changed_since(tmp_path):
    store = Store(tmp_path / "s.sqlite")
    encoder = store.encoder("e", "{}")
    news = [New(File(b"%d" % i, 1, 1), b"", "", "") for i in range(4)]
    store.add(encoder, news, np.ones((4, 3), np.float32))
    stamp, changed = store.changes(encoder, "")
    assert changed is None
    assert store.changes(encoder, stamp)[1].tolist() == []
    store.add(encoder, news[2:3], np.ones((1, 3), np.float32))
    store.rearrange(store.photos()[:1], [], [], [(store.photos()[1], File(b"copy", 1, 1))])
    later, changed = store.changes(encoder, stamp)
    assert changed.tolist() == [1, 3, 6] and later != stamp
    assert [n.tolist() for n, *_ in store.vectors(encoder, changed)] == [[3, 6]]
    number, mark = stamp.split(":")
    for other in (f"{number}:{int(mark) ^ 1}", f"999:{mark}", "", "5", "x:y"):
        assert store.changes(encoder, other) == (later, None)
    second = store.encoder("other", "{}")
    assert store.changes(second, stamp)[1] is None
    assert store.origin(encoder) != store.origin(second) and len(store.origin(encoder)) == 16
    store.close()
