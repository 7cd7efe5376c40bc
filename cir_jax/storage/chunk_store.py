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
from tqdm import tqdm

from cir_jax.storage.atomic import write_atomically

CHUNK_ROWS = 8192


class ChunkStore:
    """Rows of features of one description, stored in order, resumed where they end.

    Only process 0 touches the disk; `load` gives all processes the same rows.
    """

    def __init__(self, cache_dir: Path, description: Mapping[str, Any], rows: int):
        self.rows, self.chunk_rows = rows, CHUNK_ROWS
        self.description = {**description, "rows": rows, "chunk_rows": self.chunk_rows}
        text = json.dumps(self.description, sort_keys=True)
        self.directory = Path(cache_dir) / _digest(text.encode())

    def load(self) -> np.ndarray | None:
        """float32[rows stored so far, dim]; None when there are none."""
        chunks: list[np.ndarray] = self._read() if jax.process_index() == 0 else []
        features = np.concatenate(chunks) if chunks else np.zeros((0, 0), np.float32)
        if jax.process_count() > 1:  # the directory need not be shared between hosts
            from jax.experimental import multihost_utils

            shape = multihost_utils.broadcast_one_to_all(np.asarray(features.shape, np.int32))
            if jax.process_index() != 0:
                features = np.zeros(tuple(int(x) for x in shape), np.float32)
            features = np.asarray(multihost_utils.broadcast_one_to_all(features))
        return features if len(features) else None

    def _read(self) -> list[np.ndarray]:
        meta = self.directory / "meta.json"
        try:
            if json.loads(meta.read_text()) != self.description:
                return []
        except (OSError, ValueError):
            return []
        chunks: list[np.ndarray] = []
        for index, start in enumerate(range(0, self.rows, self.chunk_rows)):
            try:
                chunk = np.load(self._file(index), allow_pickle=False)
            except (OSError, ValueError, EOFError):
                break
            expected = (min(self.chunk_rows, self.rows - start), *chunk.shape[1:])
            like = chunks[0] if chunks else chunk
            if chunk.shape != expected or chunk.shape[1:] != like.shape[1:] or chunk.ndim != 2:
                break
            chunks.append(chunk.astype(np.float32, copy=False))
        return chunks

    def write(self, index: int, features: np.ndarray) -> None:
        """Stores chunk `index`: rows index * chunk_rows and following."""
        if jax.process_index() != 0:
            return
        meta = self.directory / "meta.json"
        if index == 0 or not meta.is_file():
            text = json.dumps(self.description, indent=2, sort_keys=True)
            write_atomically(meta, lambda file: file.write(text.encode()))
        write_atomically(self._file(index), lambda file: np.save(file, features))

    def filled(
        self,
        compute: Callable[[int, int], np.ndarray],
        size: int,
        description: str,
        whole: Callable[[np.ndarray], bool] = lambda rows: True,
    ) -> np.ndarray:
        """float32[rows, dim]: what is stored, if it is `whole`, and compute(start, stop) for the
        rest, `size` rows or fewer at a time; stored in turn."""
        stored = self.load()
        if stored is not None and not whole(stored):
            stored = None
        parts = [] if stored is None else [stored]
        done = 0 if stored is None else len(stored)
        with tqdm(
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

    def _file(self, index: int) -> Path:
        return self.directory / f"chunk_{index:05d}.npy"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]
