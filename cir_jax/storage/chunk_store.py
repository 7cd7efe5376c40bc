"""Features on disk, keyed by all that makes them, written in chunks that survive a kill.

`<cache_dir>/<key>/` holds `meta.json` (what the key stands for) and `chunk_00000.npy`, ... Any of
these directories may be deleted at any time. Chunks appear whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cir_jax.errors import CheckpointError
from cir_jax.progress import Progress
from cir_jax.storage import disks
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.places import CACHE_VARIABLE
from cir_jax.storage.stored_rows import StoredRows, chunk_name, header

CHUNK_ROWS = 8192


class ChunkStore:
    """Rows of features of one description, stored in order, resumed where they end.

    Each process reads what it sees on its own disk; process 0 writes, and those that do not see its
    disk, so that nothing has to travel. All make, load and write in one order.
    """

    def __init__(self, cache_dir: Path, description: Mapping[str, Any], rows: int):
        self.rows, self.chunk_rows = rows, CHUNK_ROWS
        self.description = {**description, "rows": rows, "chunk_rows": self.chunk_rows}
        text = json.dumps(self.description, sort_keys=True)
        self.directory = Path(cache_dir) / _digest(text.encode())
        self.writes = not disks.sees_process_0(self.directory) or jax.process_index() == 0

    def load(self, whole: Callable[[np.ndarray], bool] = lambda rows: True) -> np.ndarray | None:
        """float32[rows stored so far, dim]; None when there are none, or when they are not `whole`
        on some process."""
        done = self.done()
        if not done:
            return None
        count = -(-done // self.chunk_rows)
        chunks = [np.load(self.file(i), allow_pickle=False) for i in range(count)]
        rows = np.concatenate([chunk.astype(np.float32, copy=False) for chunk in chunks])
        return rows if min(disks.of_all(int(whole(rows)))) else None

    def done(self) -> int:
        """Rows stored so far, of the unbroken sequence of chunks that all processes see."""
        return min(disks.of_all(self._done()))

    def _done(self) -> int:
        meta = self.directory / "meta.json"
        try:
            if json.loads(meta.read_text()) != self.description:
                return 0
        except (OSError, ValueError):
            return 0
        first = None
        for index, start in enumerate(range(0, self.rows, self.chunk_rows)):
            found = header(self.file(index))
            if found is None or not found.whole:
                return start
            first = first or found
            rows = min(self.chunk_rows, self.rows - start)
            if found[:3] != ((rows, *first.shape[1:]), *first[1:3]):
                return start
        return self.rows

    def stored(self) -> StoredRows:
        """The rows, all of which are stored, to be read one by one.

        Raises CheckpointError when a process does not see them within `disks.PATIENCE`: disks that
        are shared may take a while.
        """
        done = disks.until(self.done, lambda done: done == self.rows)
        if done < self.rows:
            raise CheckpointError(
                f"{self.directory}: {done} of {self.rows} rows of features are seen by all "
                f"processes. Is the disk in order? Set ${CACHE_VARIABLE} to a folder on another."
            )
        return StoredRows(self.directory, self.rows, header(self.file(0)))

    def write(self, index: int, features: np.ndarray) -> None:
        """Stores chunk `index`: rows index * chunk_rows and following."""
        if not self.writes:
            return
        meta = self.directory / "meta.json"
        if index == 0 or not meta.is_file():
            text = json.dumps(self.description, indent=2, sort_keys=True)
            write_atomically(meta, lambda file: file.write(text.encode()))
        write_atomically(self.file(index), lambda file: np.save(file, features))

    def filled(
        self,
        compute: Callable[[int, int], np.ndarray],
        size: int,
        description: str,
        whole: Callable[[np.ndarray], bool] = lambda rows: True,
    ) -> np.ndarray:
        """float32[rows, dim]: what is stored, if it is `whole`, and compute(start, stop) for the
        rest, `size` rows or fewer at a time; stored in turn."""
        stored = self.load(whole)
        parts = [] if stored is None else [stored]
        done = 0 if stored is None else len(stored)
        with Progress(
            total=self.rows, initial=done, desc=description, unit="text", delay=2,
            disable=jax.process_index() != 0,
        ) as progress:  # fmt: skip
            while done < self.rows:
                chunk = []
                end = min(done + self.chunk_rows, self.rows)
                for start in range(done, end, size):
                    chunk.append(compute(start, min(start + size, end)))
                    progress.update(len(chunk[-1]))
                parts.append(np.concatenate(chunk))
                self.write(done // self.chunk_rows, parts[-1])
                done = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def file(self, index: int) -> Path:
        return self.directory / chunk_name(index)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]
