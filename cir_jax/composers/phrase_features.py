"""Text features of phrases and of concepts: computed once, stored as image features are."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cir_jax.composers.base import normalise
from cir_jax.input import phrases as files
from cir_jax.models.backbone import Backbone
from cir_jax.storage.chunk_store import ChunkStore
from cir_jax.storage.places import default_cache_dir
from cir_jax.weights import finite
from cir_jax.weights.fingerprint import fingerprint

TEXTS_AT_ONCE = 4096


def phrase_features(ids: np.ndarray, backbone: Backbone, params: Any) -> np.ndarray:
    """float32[phrases, dim]: un-normalised text features of int[phrases, length] ids."""

    def encode(start: int, stop: int) -> np.ndarray:
        return np.asarray(encode_texts(backbone, params, ids[start:stop].astype(np.int32)))

    what = {"features": "phrases", "phrases": hashlib.sha256(ids.tobytes()).hexdigest()}
    return _once(what, len(ids), TEXTS_AT_ONCE, encode, backbone, params)


def concept_features(book: files.PhraseBook, backbone: Backbone, params: Any) -> np.ndarray:
    """float32[concepts, dim] of unit norm: mean of the unit features of all templates (2.1).

    Computed in float32 whatever the backbone's type, as they decide which concept is the nearest.
    """
    backbone = backbone.with_dtype(np.float32)
    names, templates = list(book.concepts), book.templates

    def encode(start: int, stop: int) -> np.ndarray:
        some = names[start:stop]
        texts = [template.format(f" {name} ") for name in some for template in templates]
        return np.asarray(_ensemble(backbone, len(templates), params, backbone.tokenizer(texts)))

    identity = files.PhraseBook(templates, {name: () for name in names}).identity
    what = {"features": "concepts", "concepts": identity}
    return _once(what, len(names), TEXTS_AT_ONCE // len(templates), encode, backbone, params)


def _once(
    what: dict[str, str],
    rows: int,
    size: int,
    encode: Callable[[int, int], np.ndarray],
    backbone: Backbone,
    params: Any,
) -> np.ndarray:
    """float32[rows, dim] of encode(start, stop), `size` rows or fewer at a time; stored."""
    description = {
        **what,
        **backbone.identity,
        "parameters": fingerprint(params),
    }
    label = f"text features of {what['features']}"

    def checked(start: int, stop: int) -> np.ndarray:
        features = encode(start, stop)
        finite.refuse(features, start, label, backbone, lambda row: f"number {row}")
        return features

    store = ChunkStore(default_cache_dir(), description, rows)
    bar = f"{what['features']}: text features"
    return store.filled(checked, size, bar, lambda x: finite.stored_whole(x, unreadable=False))


@functools.partial(jax.jit, static_argnums=0)
def encode_texts(backbone: Backbone, params: Any, ids: jax.Array) -> jax.Array:
    """int32[batch, length] -> float32[batch, dim], un-normalised, infinite rows `marked`."""
    with backbone.full_precision():
        return finite.marked(backbone.encode_text(params, ids))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ensemble(backbone: Backbone, templates: int, params: Any, ids: jax.Array) -> jax.Array:
    with backbone.full_precision():
        features = normalise(backbone.encode_text(params, ids))
    means = features.reshape(-1, templates, features.shape[-1]).mean(axis=1)
    return finite.marked(normalise(means))
