"""Features of keywords, whose cosines say what may take whose place: by CLIP or by SBERT."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from cir_jax import weights
from cir_jax.composers.phrase_features import encode_texts
from cir_jax.weights.fingerprint import fingerprint

SBERT = "sbert:"
"""What marks the name of a model for the package sentence-transformers."""


@dataclasses.dataclass(frozen=True)
class Embedder:
    """encode: texts -> float32[texts, dim]. identity: what the features depend on."""

    encode: Callable[[Sequence[str]], np.ndarray]
    identity: dict[str, str]


def text_tower(name: str) -> Embedder:
    """The text tower of a backbone of this library: CompoDiff's way.

    Raises WeightsError when there is no such backbone.
    """
    backbone, params = weights.load(name)

    def encode(texts: Sequence[str]) -> np.ndarray:
        length = backbone.context_length if backbone.reads_padding else None
        return np.asarray(encode_texts(backbone, params, backbone.tokenizer(texts, length)))

    return Embedder(encode, {**backbone.identity, "parameters": fingerprint(params)})
