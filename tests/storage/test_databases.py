"""SQLite files that several processes make, open and write at once."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cir_jax.storage import databases

KIND = databases.Kind(0x63697254, 3, "CREATE TABLE a (x);CREATE TABLE b (y);")


def connected(path, timeout=20.0):
    return sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)


def test_many_that_make_one_file_at_once_all_have_it(tmp_path):
    together = threading.Barrier(8)

    def one(path):
        db = connected(path)
        together.wait()
        try:
            return databases.prepare(db, KIND)
        finally:
            db.close()

    with ThreadPoolExecutor(8) as pool:
        for turn in range(40):
            path = tmp_path / f"{turn}.sqlite"
            assert list(pool.map(one, [path] * 8)) == [KIND.version] * 8


def test_a_writer_is_waited_for_as_long_as_the_connection_says(tmp_path):
    other, path = connected(tmp_path / "a.sqlite"), tmp_path / "a.sqlite"
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        databases.prepare(connected(path, timeout=0.05), KIND)
    end = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    end.start()
    assert databases.prepare(connected(path), KIND) == KIND.version
    end.join()


def test_a_file_of_another_program_or_version_is_not_touched(tmp_path):
    path = tmp_path / "a.sqlite"
    with connected(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    assert databases.prepare(connected(path), KIND) == 0
    assert path.read_bytes() == before
    later = tmp_path / "b.sqlite"
    databases.prepare(connected(later), KIND._replace(version=4))
    assert databases.prepare(connected(later), KIND) == 4


def test_a_connection_waits_and_keeps_to_what_refers_to_what(tmp_path):
    path = tmp_path / "50% of? it.sqlite"
    db = databases.connect(path)
    databases.prepare(db, KIND)
    marks = [db.execute(f"PRAGMA {x}").fetchone()[0] for x in ("busy_timeout", "foreign_keys")]
    assert marks == [1000 * databases.PATIENCE, 1]
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        databases.connect(path, "mode=ro").execute("CREATE TABLE c (x)")


def test_what_fails_in_a_transaction_is_not_there(tmp_path):
    db = connected(tmp_path / "a.sqlite")
    databases.prepare(db, KIND)
    with pytest.raises(KeyError), databases.transaction(db):
        db.execute("INSERT INTO a VALUES (1)")
        raise KeyError
    with databases.transaction(db):
        db.execute("INSERT INTO a VALUES (2)")
    assert db.execute("SELECT x FROM a").fetchall() == [(2,)]
