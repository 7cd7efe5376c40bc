"""Features of keywords, whose cosines say what may take whose place: by CLIP or by SBERT."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cir_jax import weights
from cir_jax.composers.phrase_features import encode_texts
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.storage.chunk_store import ChunkStore
from cir_jax.weights import finite
from cir_jax.weights.fingerprint import fingerprint

SBERT = "sbert:"
"""What marks the name of a model for the package sentence-transformers."""

TEXTS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Embedder:
    """encode: texts -> float32[texts, dim]. identity: what the features depend on."""

    encode: Callable[[Sequence[str]], np.ndarray]
    identity: dict[str, str]


def read(name: str) -> Embedder:
    """A backbone of this library, or `sbert:NAME`. Raises WeightsError, ConfigError."""
    if name.startswith(SBERT):
        return sentence_transformer(name.removeprefix(SBERT))
    return text_tower(name)


def text_tower(name: str) -> Embedder:
    """The text tower of a backbone of this library: CompoDiff's way.

    Raises WeightsError when there is no such backbone or its weights are damaged, ConfigError for a
    pair of towers.
    """
    backbone, params = weights.load(name)

    def encode(texts: Sequence[str]) -> np.ndarray:
        length = backbone.context_length if backbone.reads_padding else None
        rows = np.asarray(encode_texts(backbone, params, backbone.tokenizer(texts, length)))
        finite.refuse(rows, 0, "text features of keywords", backbone, lambda row: texts[row])
        return rows

    return Embedder(encode, {**backbone.identity, "parameters": fingerprint(params)})


def sentence_transformer(name: str) -> Embedder:
    """A directory or hub id of the package sentence-transformers (PyTorch): RTD's way.

    Raises ConfigError when the package is not installed, WeightsError when there is no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"--embedder={SBERT}{name}: {error}. Install it, `pip install cir_jax[triplets]`, or "
            "name a backbone, whose text tower is taken: --embedder=openai/clip-vit-large-patch14."
        ) from error
    try:
        model = SentenceTransformer(name)
    except Exception as error:  # transformers and the hub raise many types
        raise WeightsError(
            f"--embedder={SBERT}{name}: no sentence transformer there "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}). Give a directory as "
            "sentence-transformers saves it, or a hub id where there is a network."
        ) from error
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.shape}".encode() + tensor.float().cpu().numpy().tobytes())

    def encode(texts: Sequence[str]) -> np.ndarray:
        rows = model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(rows, np.float32)

    return Embedder(encode, {"weights": f"{SBERT}{name}", "parameters": digest.hexdigest()[:24]})


def stored_features(embedder: Embedder, texts: Sequence[str], cache_dir: Path) -> np.ndarray:
    """float32[texts, dim], computed once and stored; an interrupted computation goes on."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    what = {"features": "keywords", "keywords": digest, **embedder.identity}
    return ChunkStore(cache_dir, what, len(texts)).filled(
        lambda start, stop: embedder.encode(texts[start:stop]),
        TEXTS_AT_ONCE,
        "features of keywords",
        lambda rows: bool(np.isfinite(rows).all()),
    )
