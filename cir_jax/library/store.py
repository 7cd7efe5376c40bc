"""The store of record: one SQLite file per folder, whose transactions survive a kill.

    photos      path (below the folder), size, time and digest of the file, when it was taken, and
                `problem` for those that cannot be indexed: what is known is not read again
    encoders    what made the vectors, by a fingerprint that says nothing of the method: all methods
                on one backbone share its vectors
    vectors_N   of encoder N: photo, a unit vector in float16, and its norm
    log_N       of encoder N: each photo whose vector was written or deleted, in order, with a
                random mark: an index that is made of the vectors knows by a number and its mark
                what has changed since, and whether it is of this store at all

In WAL mode others read while one writes. What one process alone may do, to index, it does under a
lock beside the file. The file may be deleted at any time: the photos are all there is to it.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cir_jax.errors import DataError
from cir_jax.library.photos import File
from cir_jax.storage import databases
from cir_jax.storage.databases import transaction
from cir_jax.storage.locks import locked
from cir_jax.storage.places import LIBRARY_VARIABLE

ROWS = 2048
"""Vectors that are read at once."""

_SCHEMA = """
CREATE TABLE photos (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    path BLOB NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    digest BLOB NOT NULL,
    taken TEXT NOT NULL,
    problem TEXT NOT NULL
);
CREATE INDEX photos_by_digest ON photos (digest);
CREATE TABLE encoders (
    id INTEGER PRIMARY KEY,
    fingerprint TEXT NOT NULL UNIQUE,
    description TEXT NOT NULL
);
"""

KIND = databases.Kind(0x6369726C, 1, _SCHEMA, page=16384)

_LOG = """\
CREATE TABLE log_{number} (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, mark INTEGER NOT NULL, photo INTEGER NOT NULL
)

INSERT INTO log_{number} (mark, photo) VALUES (random(), 0)

CREATE TRIGGER written_{number} AFTER INSERT ON vectors_{number}
BEGIN INSERT INTO log_{number} (mark, photo) VALUES (random(), NEW.photo); END

CREATE TRIGGER deleted_{number} AFTER DELETE ON vectors_{number}
BEGIN INSERT INTO log_{number} (mark, photo) VALUES (random(), OLD.photo); END
"""


class Photo(NamedTuple):
    """A row of `photos` without what only searches read."""

    id: int
    path: bytes
    size: int
    mtime_ns: int
    digest: bytes
    problem: str

    def is_as(self, file: File) -> bool:
        return (self.size, self.mtime_ns) == (file.size, file.mtime_ns)


class New(NamedTuple):
    """What was learnt of a file by reading it; problem "" = it has a vector."""

    file: File
    digest: bytes
    taken: str
    problem: str


class Store:
    """The file at `path`, made where there is none; where it cannot be written, it is only read
    (`reads_only` says why). Raises DataError for a file that is no store, or of another version,
    and where there is none and none can be made."""

    def __init__(self, path: Path):
        self.path, self.reads_only = path, ""
        with self._about():
            self._db = self._open()
        self._lock: Any = None

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    def _open(self) -> sqlite3.Connection:
        if not self.path.exists():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(self._no_place(error.strerror)) from error
            if not os.access(self.path.parent, os.W_OK):
                raise DataError(self._no_place("no permission to write"))
        elif not (os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)):
            self.reads_only = f"{self.path} cannot be written"
            return self._opened_to_read()
        db = databases.connect(self.path)
        db.execute("PRAGMA synchronous = NORMAL")  # whole after a power cut, if a batch behind
        return self._checked(db, databases.prepare(db, KIND))

    def _opened_to_read(self) -> sqlite3.Connection:
        try:
            db = databases.connect(self.path, "mode=ro")
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:  # no room for the files beside it: then nobody writes
            db = databases.connect(self.path, "immutable=1")
        return self._checked(db, databases.version_of(db, KIND))

    def _checked(self, db: sqlite3.Connection, version: int) -> sqlite3.Connection:
        if version == KIND.version:
            return db
        db.close()
        if not version:
            raise DataError(f"{self.path}: a database of another program. Give another --store.")
        raise DataError(
            f"{self.path}: no store of this version (it says {version}, this is {KIND.version}). "
            "Delete it and index again, or give another --store."
        )

    def _no_place(self, reason: str) -> str:
        return (
            f"{self.path}: cannot be made ({reason}). Give a place that can be written: "
            f"--store=FILE or ${LIBRARY_VARIABLE}."
        )

    @contextlib.contextmanager
    def _about(self) -> Iterator[None]:
        """SQLite's errors in words."""
        try:
            yield
        except sqlite3.Error as error:
            said = str(error)
            if "full" in said:
                todo = "Free some space; what was indexed so far is kept."
            elif "locked" in said or "busy" in said:
                todo = f"Another process has been writing for {databases.PATIENCE:g} s. Try again."
            elif "readonly" in said or "unable to open" in said or "disk I/O" in said:
                todo = "Look after the disk, or give another --store."
            else:
                todo = "It is damaged: delete it and index again, the photos are all it is made of."
            raise DataError(f"{self.path}: {said}. {todo}") from error

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction, whole or not at all."""
        with self._about(), transaction(self._db) as db:
            yield db

    @contextlib.contextmanager
    def indexing(self) -> Iterator[bool]:
        """Whether this process alone may index now; until it ends, however it does."""
        with locked(self.path.with_name(f"{self.path.name}.lock"), wait=False) as alone:
            yield alone

    def version(self) -> int:
        """Another number after another process has changed something."""
        with self._about():
            return self._db.execute("PRAGMA data_version").fetchone()[0]

    def photos(self) -> list[Photo]:
        with self._about():
            rows = self._db.execute("SELECT id, path, size, mtime_ns, digest, problem FROM photos")
            return [Photo(*row) for row in rows]

    def encoder(self, fingerprint: str, description: str) -> int:
        """Number of an encoder; a new one gets a table. 0 = it is not there, nor to be made."""
        with self._about():
            found = self._number(fingerprint)
            if self.reads_only or (found and self._logs(found)):
                return found
        with self._change() as db:
            if not (found := self._number(fingerprint)):
                db.execute(
                    "INSERT INTO encoders (fingerprint, description) VALUES (?, ?)",
                    (fingerprint, description),
                )
                found = self._number(fingerprint)
                db.execute(
                    f"CREATE TABLE vectors_{found} (photo INTEGER PRIMARY KEY "
                    "REFERENCES photos (id) ON DELETE CASCADE, "
                    "norm REAL NOT NULL, vector BLOB NOT NULL)"
                )
            if not self._logs(found):
                for statement in _LOG.format(number=found).split("\n\n"):
                    db.execute(statement)
        return found

    def _number(self, fingerprint: str) -> int:
        query = "SELECT id FROM encoders WHERE fingerprint = ?"
        row = self._db.execute(query, (fingerprint,)).fetchone()
        return row[0] if row else 0

    def _logs(self, encoder: int) -> bool:
        query = "SELECT count(*) FROM sqlite_master WHERE name = ?"
        return bool(self._db.execute(query, (f"log_{encoder}",)).fetchone()[0])

    def changes(self, encoder: int, stamp: str) -> tuple[str, np.ndarray | None]:
        """Where the log of an encoder ends now, and int64 photos whose vector was written or
        deleted since `stamp`, rising. None: that is no place of this log; all may be different.
        Of a store that has none and is only read, "" and None."""
        with self._about():
            if not self._logs(encoder):
                return "", None
            last = f"SELECT seq, mark FROM log_{encoder} ORDER BY seq DESC LIMIT 1"
            now = "{}:{}".format(*self._db.execute(last).fetchone())
            if now == stamp:
                return now, np.int64([])
            number, _, mark = stamp.partition(":")
            place = f"SELECT mark FROM log_{encoder} WHERE seq = ?"
            row = self._db.execute(place, (number,)).fetchone()
            if row is None or str(row[0]) != mark:
                return now, None
            query = f"SELECT DISTINCT photo FROM log_{encoder} WHERE seq > ? ORDER BY photo"
            return now, np.int64([row[0] for row in self._db.execute(query, (number,))])

    def origin(self, encoder: int) -> str:
        """Tells the vectors of this encoder apart from those of every other store. Raises DataError
        where there is no log, and none can be made."""
        with self._about():
            if not self._logs(encoder):
                raise DataError(f"{self.path}: index it once where it can be written.")
            row = self._db.execute(f"SELECT mark FROM log_{encoder} ORDER BY seq LIMIT 1")
            return f"{row.fetchone()[0] % (1 << 64):016x}"

    def rearrange(
        self,
        gone: Sequence[Photo],
        touched: Sequence[tuple[Photo, File]],
        moved: Sequence[tuple[Photo, File]],
        copied: Sequence[tuple[Photo, File]],
    ) -> None:
        """What is known without decoding, in one transaction: photos that are no more, files that
        only have another time, another name, or are copies of one that is known."""
        with self._change() as db:
            # names may be swapped: nobody keeps the old one while another takes it
            park = "UPDATE photos SET path = CAST('/' || id AS BLOB) WHERE id = ?"
            db.executemany(park, [(photo.id,) for photo, _ in moved])
            db.executemany("DELETE FROM photos WHERE id = ?", [(photo.id,) for photo in gone])
            db.executemany(
                "UPDATE photos SET path = ?, size = ?, mtime_ns = ? WHERE id = ?",
                [(*file, photo.id) for photo, file in (*touched, *moved)],
            )
            numbers = [row[0] for row in db.execute("SELECT id FROM encoders")]
            for photo, file in copied:
                made = db.execute(
                    "INSERT INTO photos (path, size, mtime_ns, digest, taken, problem) "
                    "SELECT ?, ?, ?, digest, taken, problem FROM photos WHERE id = ?",
                    (*file, photo.id),
                ).lastrowid
                for number in numbers:
                    db.execute(
                        f"INSERT INTO vectors_{number} (photo, norm, vector) "
                        f"SELECT ?, norm, vector FROM vectors_{number} WHERE photo = ?",
                        (made, photo.id),
                    )

    def lacking(self, encoder: int) -> list[Photo]:
        """Photos that have no vector of this encoder, though they can be read."""
        query = (
            "SELECT id, path, size, mtime_ns, digest, problem FROM photos WHERE problem = '' "
            f"AND id NOT IN (SELECT photo FROM vectors_{encoder}) ORDER BY path"
        )
        with self._about():
            return [Photo(*row) for row in self._db.execute(query)]

    def add(self, encoder: int, news: Sequence[New], vectors: np.ndarray) -> None:
        """A batch in one transaction: photos that were read, and float32[n, dim], whose rows of
        those with a problem do not count."""
        vectors = np.nan_to_num(vectors)
        norms = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
        units = (vectors / norms[:, None]).astype("<f2")
        with self._change() as db:
            for new, norm, unit in zip(news, norms, units, strict=True):
                db.execute(
                    "INSERT INTO photos (path, size, mtime_ns, digest, taken, problem) "
                    "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (path) DO UPDATE SET "
                    "size = excluded.size, mtime_ns = excluded.mtime_ns, digest = excluded.digest, "
                    "taken = excluded.taken, problem = excluded.problem",
                    (*new.file, new.digest, new.taken, new.problem),
                )
                if not new.problem:
                    query = "SELECT id FROM photos WHERE path = ?"
                    (photo,) = db.execute(query, (new.file.path,)).fetchone()
                    db.execute(
                        f"INSERT OR REPLACE INTO vectors_{encoder} VALUES (?, ?, ?)",
                        (photo, float(norm), unit.tobytes()),
                    )

    def forget_problems(self) -> None:
        """Photos that could not be read count as unknown again."""
        with self._change() as db:
            db.execute("DELETE FROM photos WHERE problem <> ''")

    def count(self) -> int:
        """Photos that are known, those with a problem included."""
        with self._about():
            return self._db.execute("SELECT count(*) FROM photos").fetchone()[0]

    def vectors(
        self, encoder: int, photos: Sequence[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of an encoder, in the order of the photos' numbers, in pieces, as of one moment: int64
        [some] numbers, float32[some] norms, float16[some, dim] unit vectors; all, or those of these
        photos that are there."""
        query, values = f"SELECT photo, norm, vector FROM vectors_{encoder}", []
        if photos is not None:
            query += " WHERE photo IN (SELECT value FROM json_each(?))"
            values = [json.dumps([int(photo) for photo in photos])]
        with self._about():
            rows = self._db.execute(f"{query} ORDER BY photo", values)
            while some := rows.fetchmany(ROWS):
                numbers, norms, vectors = zip(*some, strict=True)
                yield np.int64(numbers), np.float32(norms), self._array(vectors)

    def _array(self, vectors: Sequence[bytes]) -> np.ndarray:
        size = len(vectors[0]) if vectors else 0
        if any(len(vector) != size for vector in vectors):
            raise sqlite3.DatabaseError("its vectors differ in length")
        return np.frombuffer(b"".join(vectors), "<f2").reshape(len(vectors), size // 2)

    def paths(self, photos: Iterable[int]) -> list[bytes | None]:
        """Of photos, by number; None of those that are gone."""
        query = "SELECT path FROM photos WHERE id = ?"
        with self._about():
            rows = (self._db.execute(query, (int(photo),)).fetchone() for photo in photos)
            return [row[0] if row else None for row in rows]

    def chosen(self, under: bytes = b"", after: str = "") -> np.ndarray:
        """int64: photos below a folder, taken on a day or later ("2024", "2024-05", "2024-05-17");
        where the file does not say when, its own time counts."""
        wanted, values = ["1"], []
        if under:
            wanted.append("path >= ? AND path < ?")
            values += [under + b"/", under + b"0"]  # what follows the slash
        if after:
            time = "strftime('%Y-%m-%dT%H:%M:%S', mtime_ns / 1000000000, 'unixepoch', 'localtime')"
            wanted.append(f"CASE taken WHEN '' THEN {time} ELSE taken END >= ?")
            values.append(after)
        query = f"SELECT id FROM photos WHERE {' AND '.join(wanted)}"
        with self._about():
            return np.fromiter((row[0] for row in self._db.execute(query, values)), np.int64)

    def with_digest(self, digest: bytes) -> list[int]:
        """Photos of this content."""
        with self._about():
            rows = self._db.execute("SELECT id FROM photos WHERE digest = ?", (digest,))
            return [row[0] for row in rows]
