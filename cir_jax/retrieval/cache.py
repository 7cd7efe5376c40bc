"""Features on disk, keyed by all that makes them, written in chunks that survive a kill.

`<cache_dir>/<key>/` holds `meta.json` (what the key stands for) and `chunk_00000.npy`, ... Any of
these directories may be deleted at any time. Chunks appear whole or not at all.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from cir_jax.errors import DataError
from cir_jax.input.tables import Table
from cir_jax.retrieval.batches import to_host

CACHE_VARIABLE = "CIR_JAX_CACHE"
CROP = "crop"
"""Field of records of which only a part is meant; see `features.open_image`."""

CHUNK_ROWS = 8192
SAMPLES = 4096


def default_cache_dir() -> Path:
    """`$CIR_JAX_CACHE`, else `~/.cache/cir_jax/features`."""
    value = os.environ.get(CACHE_VARIABLE)
    return Path(value).expanduser() if value else Path.home() / ".cache" / "cir_jax" / "features"


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """The whole file or none: a temporary file in the same directory, then `os.replace`.

    Raises DataError when the disk is full or the directory is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}). Free some space or choose "
            f"another folder: --workdir or --output for results, ${CACHE_VARIABLE} for features."
        ) from error


def source_identity(source: Sequence[Mapping[str, Any]], field: str) -> str:
    """What tells one list of images from another.

    A prepared table: its name and its files' names, sizes and times, so that a table prepared again
    is another one. A source with `identity()`: that. Other records: a hash of the bytes themselves,
    and of the part of the image that is meant.
    """
    if isinstance(source, Table):
        root = source.data_dir / source.dataset / source.table / source.version
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in root.iterdir())
        return f"{source!r} {_digest(repr(files).encode())}"
    if hasattr(source, "identity"):
        return str(source.identity())
    digest = hashlib.sha256()
    for i in range(len(source)):
        record = source[i]
        data = bytes(record[field])
        digest.update(len(data).to_bytes(8, "little") + data)
        if CROP in record:  # the same file, another part of it
            digest.update(f"black square {[int(x) for x in record[CROP]]}".encode())
    return f"records {digest.hexdigest()}"


def fingerprint(tree: Any) -> str:
    """Hash of a parameter tree: names, shapes, dtypes and up to SAMPLES values of each leaf.

    A name of the weights is not enough: fine-tuned parameters keep the name they started from. Any
    optimiser step moves all values of the leaves it trains, so a sample of each leaf tells.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        stride = -(-max(1, leaf.size) // SAMPLES)
        digest.update(to_host(leaf).reshape(-1)[::stride].tobytes())
    return digest.hexdigest()[:24]


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

    def _file(self, index: int) -> Path:
        return self.directory / f"chunk_{index:05d}.npy"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]
