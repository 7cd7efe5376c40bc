"""SQLite, as all files of this project use it."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

PATIENCE = 30.0
"""Seconds that a transaction waits for another process's."""


class Kind(NamedTuple):
    """application, version: marks of a file (SQLite's `application_id` and `user_version`), both
    above 0. schema: statements, each ended by ";". page: bytes."""

    application: int
    version: int
    schema: str
    page: int = 4096


def connect(path: Path, how: str = "") -> sqlite3.Connection:
    """A connection that `prepare` and `transaction` take, of any thread. how: to open the file, as
    SQLite's URIs say it, "mode=ro". Raises sqlite3.Error."""
    return sqlite3.connect(
        f"file:{quote(str(path))}?{how}",
        uri=True, timeout=PATIENCE, isolation_level=None, check_same_thread=False,
    )  # fmt: skip


def prepare(db: sqlite3.Connection, kind: Kind) -> int:
    """Makes the tables of an empty database. The version found, 0 = it is of another program; what
    is not of this kind and version is not touched.

    db: as `connect` gives it. Raises sqlite3.Error.
    """
    if _is_empty(db):
        db.execute(f"PRAGMA page_size = {kind.page}")
        _log_ahead(db)
        with transaction(db):
            if _is_empty(db):  # no other process was faster
                for statement in kind.schema.split(";")[:-1]:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {kind.application}")
                db.execute(f"PRAGMA user_version = {kind.version}")
    if (found := version_of(db, kind)) == kind.version:
        db.execute("PRAGMA foreign_keys = ON")
    return found


def _log_ahead(db: sqlite3.Connection) -> None:
    """Of this one statement SQLite's own timeout does not always hold: another process that does
    the same is waited for here."""
    until = time.monotonic() + db.execute("PRAGMA busy_timeout").fetchone()[0] / 1000
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.02)


def version_of(db: sqlite3.Connection, kind: Kind) -> int:
    """As `prepare` gives it, of a database that is only read."""
    application, version = (
        db.execute(f"PRAGMA {mark}").fetchone()[0] for mark in ("application_id", "user_version")
    )
    return version if application == kind.application else 0


def _is_empty(db: sqlite3.Connection) -> bool:
    return not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """What is done in it is done whole or not at all; waits until no other process writes.

    db: as `connect` gives it. Raises sqlite3.Error.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back already
            db.execute("ROLLBACK")
        raise
