"""Reference images that the method edits before they are encoded: one file each, made once."""

import hashlib
import io
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.composers.base import Composer
from cir_jax.input import images
from cir_jax.input.identity import source_identity
from cir_jax.retrieval import features
from cir_jax.storage.atomic import write_atomically


class Edited(Sequence):
    """References as records {"image": PNG}, `composer.edit`ed when they are first asked for.

    source: records; rows: int[n], which of them; texts: what to do to each; streams: names of the
    noise of each. cache_dir: where the images are kept, None = nowhere; an interrupted evaluation
    goes on behind the last of them.
    """

    def __init__(
        self,
        composer: Composer,
        source: features.Records,
        rows: np.ndarray,
        texts: Sequence[str],
        streams: Sequence[str],
        cache_dir: Path | None,
    ):
        self._composer, self._source, self._texts, self._streams = composer, source, texts, streams
        self._rows = [int(row) for row in rows]
        self._folder, self._lock = None, threading.Lock()
        if cache_dir is not None:
            what = {
                "images": source_identity(source, "image"),
                "composer": _identity(composer),
            }
            digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
            self._folder = Path(cache_dir) / f"edited-{digest}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Mapping[str, Any]:
        row, text, stream = self._rows[index], self._texts[index], self._streams[index]
        name = hashlib.sha256(json.dumps([row, text, stream]).encode()).hexdigest()[:24]
        file = self._folder / f"{name}.png" if self._folder else None
        if file is None or not file.is_file():
            return {"image": self._edit(row, text, stream, file)}
        return {"image": file.read_bytes()}

    def name(self, index: int) -> str:
        return f"the edited reference of query {index}"

    def _edit(self, row: int, text: str, stream: str, file: Path | None) -> bytes:
        what = f"reference image {row}"
        with images.reading(what):
            image = images.to_rgb(features.open_image(self._source[row], "image", what))
        with self._lock:  # one pipeline, which is no function
            edited = self._composer.edit(image, text, stream)
        data = io.BytesIO()
        edited.save(data, "PNG")
        if file is not None:
            write_atomically(file, lambda f: f.write(data.getvalue()))
        return data.getvalue()


def _identity(composer: Composer) -> dict[str, Any]:
    """What the edited image depends on: settings, and what was read."""
    settings = {k: v for k, v in vars(composer).items() if isinstance(v, int | float | str)}
    return {"method": type(composer).__name__, **settings, **composer.contents()}
