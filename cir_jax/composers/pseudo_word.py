"""What all inversion methods share: the reference image becomes a word of the prompt.

    query = norm(text feature of "a photo of $ that {modification text}", $ = invert(image))

A subclass says how an image is inverted; prompt, injection and query are one path for training and
evaluation. The word goes in as a token embedding, neither scaled nor normalised, before position
embeddings are added (SEARLE, arXiv 2303.15247, section 3; METHODS differ only in the two class
attributes below).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.composers.slerp import slerp
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone
from cir_jax.models.clip import overwrite_tokens
from cir_jax.sharding.constraints import split_rows


class PseudoWord(Composer):
    """A composer whose text features hold a pseudo-word token."""

    placeholder: str = "$"
    """The token that the pseudo-word replaces."""

    image_weight: float = 0.0
    inference_settings = ("image_weight",)

    every: bool = False
    """Whether each placeholder of a text is replaced (LinCIR, RTD), or only the first one."""

    def __init__(self, backbone: Backbone, words: int = 1):
        """words: that an image becomes (ISA's sentence has several)."""
        super().__init__(backbone)
        self.placeholder_id = backbone.tokenizer.id_of(self.placeholder)
        self.words_per_image = words

        self.template = f"a photo of {self.named} that {{}}"
        """The prompt of a query, {} where its text comes."""

    def share(self, image_weight: float = 0.0) -> None:
        """image_weight: of the reference image's own feature in a query, by Slerp of both (arXiv
        2405.00571, equation 1); 0 = none, as published. Raises ConfigError."""
        if not 0 <= image_weight <= 1:
            raise ConfigError(f"image_weight={image_weight}: the image's share lies in 0..1")
        self.image_weight = float(image_weight)

    @property
    def named(self) -> str:
        """What stands for the image in a text."""
        return " ".join([self.placeholder] * self.words_per_image)

    def prompt(self, text: str) -> str:
        """`template` with the text in it; without one, the prompt that names the image alone."""
        plain = self.backbone.tokenizer.plain(text)
        return self.template.replace("{}", plain) if text else f"a photo of {self.named}"

    def invert(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        """Pseudo-word tokens of the reference images: float32[batch, token_dim], of several words
        [batch, words, token_dim]."""
        raise TypeError(f"{type(self).__name__} does not say how to invert an image")

    def text_features(self, backbone: Params, token_ids: jax.Array, words: jax.Array) -> jax.Array:
        """Un-normalised features float32[batch, dim] of texts with the pseudo-words put in.

        backbone: parameters of the text tower, not necessarily the frozen ones (RTD).
        token_ids: int32[batch, length], each row with a placeholder; words: of `invert`.
        """
        embeddings = self.embed_words(backbone, token_ids, words)
        return self.backbone.encode_text(backbone, token_ids, embeddings)

    def embed_words(self, backbone: Params, token_ids: jax.Array, words: jax.Array) -> jax.Array:
        """Likewise their token embeddings, float[batch, length, token_dim]."""
        where = token_ids == self.placeholder_id
        positions = where if self.every else where.argmax(axis=-1)
        embeddings = self.backbone.embed_tokens(backbone, token_ids)
        return split_rows(overwrite_tokens(embeddings, positions, split_rows(words)))

    def read(
        self,
        params: Params,
        frozen: Params,
        query: Query,
        rng: jax.Array,
        texts: Sequence[jax.Array],
    ) -> list[jax.Array]:
        """Un-normalised features of texts, int32[batch, length] each, with the query's words."""
        words = self.invert(params, frozen, query, rng)
        return [self.text_features(frozen["backbone"], ids, words) for ids in texts]

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        (features,) = self.read(params, frozen, query, rng, [query["token_ids"]])
        composed = normalise(features.astype(jnp.float32))
        if not self.image_weight:
            return composed
        image = normalise(self.reference_features(frozen, query))
        return slerp(image, composed, 1 - self.image_weight)


def text_noise(share: jax.Array, normal: jax.Array, dim: int) -> jax.Array:
    """float32[dim], Unif(0, 1) x N(0, I) by two keys: what LinCIR and RTD add to a text feature,
    scaled, to stand for the gap between texts and images."""
    return jax.random.uniform(share) * jax.random.normal(normal, (dim,))
