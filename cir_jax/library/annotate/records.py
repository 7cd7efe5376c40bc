"""What annotators said, in one SQLite file: one action, one transaction."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cir_jax.errors import DataError
from cir_jax.storage import databases
from cir_jax.storage.databases import transaction

FILE = "annotations.sqlite"

_SCHEMA = """
CREATE TABLE queries (
  id INTEGER PRIMARY KEY, annotator TEXT NOT NULL, reference BLOB NOT NULL, target BLOB NOT NULL,
  concept TEXT NOT NULL DEFAULT '', caption TEXT NOT NULL DEFAULT '', begun REAL NOT NULL
);
CREATE TABLE skipped (
  annotator TEXT NOT NULL, reference BLOB NOT NULL, PRIMARY KEY (annotator, reference)
) WITHOUT ROWID;
CREATE TABLE pool (
  query INTEGER NOT NULL REFERENCES queries ON DELETE CASCADE, position INTEGER NOT NULL,
  photo BLOB NOT NULL, sources TEXT NOT NULL, PRIMARY KEY (query, position)
) WITHOUT ROWID;
CREATE TABLE judgements (
  query INTEGER NOT NULL REFERENCES queries ON DELETE CASCADE, annotator TEXT NOT NULL,
  photo BLOB NOT NULL, fits INTEGER NOT NULL, PRIMARY KEY (query, annotator, photo)
) WITHOUT ROWID;
CREATE TABLE finished (
  query INTEGER NOT NULL REFERENCES queries ON DELETE CASCADE, annotator TEXT NOT NULL,
  aspects TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (query, annotator)
) WITHOUT ROWID;
"""

KIND = databases.Kind(0x43495241, 1, _SCHEMA)

ASPECTS = (
    "cardinality", "addition", "negation", "direct_addressing", "compare_change",
    "comparative_statement", "statement_with_conjunction", "spatial_relations_background",
    "viewpoint",
)  # fmt: skip
"""CIRCO's semantic aspects, as its files name them."""


class Query(NamedTuple):
    """reference, target: contents of photos (their digests), which outlive a renaming."""

    id: int
    annotator: str
    reference: bytes
    target: bytes
    concept: str
    caption: str

    @property
    def worded(self) -> bool:
        return bool(self.concept and self.caption)


class Candidate(NamedTuple):
    """sources: what found it: methods, and "target" for what looks like the target."""

    photo: bytes
    sources: tuple[str, ...]


class Records:
    """The file in the folder `out`, made where there is none. May be open in several processes.

    Raises DataError for a file that is damaged or of another program or version, and where none can
    be made.
    """

    def __init__(self, out: Path):
        self.path = out / FILE
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{out}: cannot be made ({error.strerror}). Give another --out."
            ) from error
        with self._about():
            self._db = self._open()

    def close(self) -> None:
        self._db.close()

    def _open(self) -> sqlite3.Connection:
        db = databases.connect(self.path)
        db.execute("PRAGMA synchronous = FULL")  # an action that was taken survives a power cut
        version = databases.prepare(db, KIND)
        if version == KIND.version:
            # hours of work are in it: better no page more on top of a damaged one
            found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                db.close()
                raise sqlite3.DatabaseError(found.strip().replace("\n", " "))
            return db
        db.close()
        raise DataError(
            f"{self.path}: no annotations of this version (it says {version}, this is "
            f"{KIND.version}). Give another --out."
        )

    @contextlib.contextmanager
    def _about(self) -> Iterator[None]:
        """SQLite's errors in words."""
        try:
            yield
        except sqlite3.OperationalError as error:  # full, locked, not to be written
            raise DataError(
                f"{self.path}: {error}. What was annotated before is kept; look after the disk."
            ) from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path}: it is damaged ({error}). Take a backup, or let sqlite3's command "
                f"`.recover` write what can be read to a new file, and put it in this one's place."
            ) from error

    @contextlib.contextmanager
    def _action(self) -> Iterator[sqlite3.Connection]:
        """Whole or not at all."""
        with self._about(), transaction(self._db) as db:
            yield db

    # --- actions

    def skip(self, annotator: str, reference: bytes) -> None:
        """No target suits this reference."""
        with self._action() as db:
            db.execute("INSERT OR IGNORE INTO skipped VALUES (?, ?)", (annotator, reference))

    def pair(self, annotator: str, reference: bytes, target: bytes) -> int:
        """A new query's number. Raises DataError where the two are one photo."""
        if reference == target:
            raise DataError("the target is the reference itself. Choose another photo.")
        with self._action() as db:
            values = (annotator, reference, target, time.time())
            done = db.execute(
                "INSERT INTO queries (annotator, reference, target, begun) VALUES (?, ?, ?, ?)",
                values,
            )
            return int(done.lastrowid or 0)

    def word(self, query: int, concept: str, caption: str) -> None:
        """Raises DataError for empty texts, and once right answers have been chosen: they were
        chosen for the old ones."""
        concept, caption = (" ".join(text.split()) for text in (concept, caption))
        if not concept or not caption:
            raise DataError("both the shared concept and the relative caption are needed.")
        with self._action() as db:
            if db.execute("SELECT 1 FROM judgements WHERE query = ?", (query,)).fetchone():
                raise DataError(
                    f"query {query}: its right answers were chosen for the words that it has. Drop "
                    "it, and make it anew."
                )
            db.execute(
                "UPDATE queries SET concept = ?, caption = ? WHERE id = ?",
                (concept, caption, query),
            )
            db.execute("DELETE FROM pool WHERE query = ?", (query,))  # found for other words

    def keep_pool(self, query: int, candidates: Sequence[Candidate]) -> None:
        """In the order in which all annotators see them."""
        with self._action() as db:
            db.execute("DELETE FROM pool WHERE query = ?", (query,))
            db.executemany(
                "INSERT INTO pool VALUES (?, ?, ?, ?)",
                [
                    (query, i, one.photo, json.dumps(one.sources))
                    for i, one in enumerate(candidates)
                ],
            )

    def judge(self, query: int, annotator: str, photo: bytes, fits: bool) -> None:
        """Raises DataError for a photo that is not in the query's pool."""
        with self._action() as db:
            row = db.execute("SELECT 1 FROM pool WHERE query = ? AND photo = ?", (query, photo))
            if not row.fetchone():
                raise DataError(f"query {query}: this photo is none of its candidates.")
            db.execute(
                "INSERT INTO judgements VALUES (?, ?, ?, ?) "
                "ON CONFLICT (query, annotator, photo) DO UPDATE SET fits = excluded.fits",
                (query, annotator, photo, fits),
            )

    def finish(self, query: int, annotator: str, aspects: Sequence[str]) -> None:
        """All of the pool is looked through: what is not judged does not fit.

        Raises DataError for aspects that are not CIRCO's, and a query without its candidates.
        """
        if unknown := sorted(set(aspects) - set(ASPECTS)):
            raise DataError(f"aspect {unknown[0]!r}: expected one of {', '.join(ASPECTS)}.")
        with self._action() as db:
            if not db.execute("SELECT 1 FROM pool WHERE query = ?", (query,)).fetchone():
                raise DataError(f"query {query}: nobody has looked through its candidates.")
            said = json.dumps([name for name in ASPECTS if name in aspects])
            db.execute(
                "INSERT OR REPLACE INTO finished VALUES (?, ?, ?, ?)",
                (query, annotator, said, time.time()),
            )

    def drop(self, query: int) -> None:
        """With all that was said of it."""
        with self._action() as db:
            db.execute("DELETE FROM queries WHERE id = ?", (query,))

    # --- what was said

    def _rows(self, statement: str, *values: object) -> list[tuple]:
        with self._about():
            return self._db.execute(statement, values).fetchall()

    def queries(self) -> list[Query]:
        """In the order in which they were begun."""
        columns = ", ".join(Query._fields)
        return [Query(*row) for row in self._rows(f"SELECT {columns} FROM queries ORDER BY id")]

    def query(self, number: int) -> Query:
        """Raises DataError where there is none of this number."""
        for query in self.queries():
            if query.id == number:
                return query
        raise DataError(f"query {number}: there is none; it may have been dropped.")

    def pool(self, query: int) -> list[Candidate]:
        """[] = it was not asked for yet."""
        found = self._rows(
            "SELECT photo, sources FROM pool WHERE query = ? ORDER BY position", query
        )
        return [Candidate(photo, tuple(json.loads(sources))) for photo, sources in found]

    def judgements(self, query: int) -> dict[str, dict[bytes, bool]]:
        """Annotator -> photo -> whether it fits; of those who have finished, all of the pool."""
        said: dict[str, dict[bytes, bool]] = {}
        for annotator in self.finished(query):
            said[annotator] = dict.fromkeys((one.photo for one in self.pool(query)), False)
        for annotator, photo, fits in self._rows(
            "SELECT annotator, photo, fits FROM judgements WHERE query = ?", query
        ):
            said.setdefault(annotator, {})[photo] = bool(fits)
        return said

    def finished(self, query: int) -> dict[str, tuple[str, ...]]:
        """Annotator -> the aspects that were chosen, of those who have looked through all."""
        found = self._rows(
            "SELECT annotator, aspects FROM finished WHERE query = ? ORDER BY at", query
        )
        return {annotator: tuple(json.loads(aspects)) for annotator, aspects in found}

    def seen(self, annotator: str) -> set[bytes]:
        """References that an annotator need not see again: skipped, or somebody's query."""
        mine = self._rows("SELECT reference FROM skipped WHERE annotator = ?", annotator)
        return {row[0] for row in [*mine, *self._rows("SELECT reference FROM queries")]}
