"""Texts cut in front of a placeholder: what they begin with is read once (`models.clip_suffix`)."""

import collections
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.composers.pseudo_word import PseudoWord
from cir_jax.models import clip_suffix
from cir_jax.models.clip import overwrite_tokens

MAX_PREFIXES = 64
"""Beginnings whose states are kept; texts that begin otherwise are read as a whole."""


Array = np.ndarray | jax.Array
"""On the host, or in the compiled program."""


@flax.struct.dataclass
class Split:
    """Texts with a placeholder, cut in front of it (models.clip_suffix).

    ids: int[texts, length], from the placeholder on. prefix: int32[texts], row of the beginning in
    prefixes: int32[beginnings, length], prefix_lengths: int32[beginnings] long. Row 0 is empty: it
    goes with texts that are whole. lengths: int32[texts] of ids, with the end token.
    """

    ids: Array
    lengths: Array
    prefix: Array
    prefixes: Array
    prefix_lengths: Array

    @classmethod
    def of(cls, token_ids: np.ndarray, mark: int, eos: int | None, causal: bool = True) -> "Split":
        """token_ids: int[texts, length], each with a placeholder `mark`. causal: False cuts
        nothing. eos: None = padding counts, too."""
        at = (token_ids == mark).argmax(axis=1)
        begins = [bytes(row[:n].tobytes()) for row, n in zip(token_ids, at, strict=True)]
        common = collections.Counter(b for b in begins if b).most_common(MAX_PREFIXES)
        rows = {b"": 0} | ({b: i + 1 for i, (b, _) in enumerate(common)} if causal else {})
        prefix = np.asarray([rows.get(b, 0) for b in begins], np.int32)
        ids = _shifted(token_ids, np.where(prefix > 0, at, 0))
        parts = [np.frombuffer(b, token_ids.dtype) for b in rows]
        widest = max(1, *map(len, parts)) if len(parts) > 1 else 1
        prefixes = np.zeros((len(parts), widest), np.int32)
        for row, part in zip(prefixes, parts, strict=True):
            row[: len(part)] = part
        sizes = np.asarray(list(map(len, parts)), np.int32)
        return cls(ids, lengths_of(ids, eos), prefix, prefixes, sizes)

    def like(self, token_ids: np.ndarray, eos: int | None) -> "Split":
        """Other texts of the same number, int[texts, length], cut where they begin as these do."""
        known, sizes = self.prefixes[self.prefix], self.prefix_lengths[self.prefix]
        columns = np.arange(known.shape[1])
        beginning = np.take(token_ids, np.minimum(columns, token_ids.shape[1] - 1), axis=1)
        same = ((beginning == known) | (columns >= sizes[:, None])).all(axis=1)
        prefix = np.where(same, self.prefix, 0).astype(np.int32)
        ids = _shifted(token_ids, self.prefix_lengths[prefix])
        return self.replace(ids=ids, lengths=lengths_of(ids, eos), prefix=prefix)


def _shifted(token_ids: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Rows shifted to the left; what comes in from the right is padding behind the end."""
    columns = np.minimum(by[:, None] + np.arange(token_ids.shape[1]), token_ids.shape[1] - 1)
    return np.take_along_axis(token_ids, columns, axis=1)


def lengths_of(token_ids: np.ndarray, eos: int | None) -> np.ndarray:
    """int32[texts]: up to the end token, or of int[texts, length] all columns; see `Split.of`."""
    last = token_ids.shape[1] - 1 if eos is None else (token_ids == eos).argmax(axis=1)
    return np.full(len(token_ids), last + 1, np.int32)


class Suffixes:
    """Text features of split texts; the states of their beginnings are computed once.

    backbone: parameters of the text tower.
    """

    def __init__(self, composer: PseudoWord, backbone: Any, texts: Split):
        self.composer, self.params, self.past = composer, backbone, None
        self.texts = jax.tree.map(jnp.asarray, texts)
        if composer.backbone.family == "clip":
            model = composer.backbone.model
            beginnings = self.texts.prefixes, self.texts.prefix_lengths
            past = clip_suffix.read_prefixes(model.config, backbone, *beginnings, model.dtype)
            self.past = jax.lax.stop_gradient(past)

    def features(self, rows: jax.Array, words: jax.Array, length: int | None = None) -> jax.Array:
        """float32[batch, dim] of the texts `rows` with `words`, float[batch, token_dim], put in.

        rows: int32[batch]. length: one that the ids of all of them fit into; None = of all texts.
        Only the first placeholder is replaced, as in SEARLE.
        """
        token_ids = self.texts.ids[rows][:, :length].astype(jnp.int32)
        if self.past is None:  # not causal: the texts are whole
            return self.composer.text_features(self.params, token_ids, words)
        at = (token_ids == self.composer.placeholder_id).argmax(axis=-1)
        embeddings = self.composer.backbone.embed_tokens(self.params, token_ids)
        embeddings = overwrite_tokens(embeddings, at, words)
        return self._encode(self.texts.prefix[rows], token_ids, embeddings)

    def without_words(self, texts: Split, rows: jax.Array, length: int | None = None) -> jax.Array:
        """As `features`, of texts without a placeholder, which `Split.like` has cut."""
        texts = jax.tree.map(jnp.asarray, texts)
        token_ids = texts.ids[rows][:, :length].astype(jnp.int32)
        backbone = self.composer.backbone
        if self.past is None:
            return backbone.encode_text(self.params, token_ids)
        embeddings = backbone.embed_tokens(self.params, token_ids)
        return self._encode(texts.prefix[rows], token_ids, embeddings)

    def _encode(self, prefix: jax.Array, token_ids: jax.Array, embeddings: jax.Array) -> jax.Array:
        past = clip_suffix.of_rows(self.past, prefix)
        config = self.composer.backbone.config
        return clip_suffix.encode(config, self.params, past, token_ids, embeddings)
