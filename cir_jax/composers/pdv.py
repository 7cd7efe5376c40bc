"""PDV-F: what a prompt changes in the text feature, added to the image feature (arXiv 2502.07215).

    d = T("a photo of $ that c") - T("a photo of $")                 the prompt's directional vector
    q = (1 - beta) (v + alpha_image d) + beta (T("a photo of $") + alpha_text d)

of a modification text c and a reference image with the feature v, whose pseudo-word $ another
method makes: Pic2Word, SEARLE or its OTI, LinCIR, PALAVRA, ISA, or RTD around one. Nothing more is
trained.
beta = alpha_text = 1 is that method; beta = 1 alone is the paper's PDV-T, beta = 0 its PDV-I.

No code was released. The paper does not say whether embeddings are normalised before they are
subtracted and summed: here they are, as they are compared by cosine.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cir_jax.composers import build, for_others
from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.composers.pseudo_word import PseudoWord
from cir_jax.composers.rtd import Rtd
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone


class Pdv(Composer):
    """`params` and `frozen` are those of the method inside."""

    trained = True
    inference_settings = ("alpha_image", "alpha_text", "beta")

    def __init__(
        self,
        backbone: Backbone,
        word: Mapping[str, Any],
        alpha_image: float = 1.0,
        alpha_text: float = 1.0,
        beta: float = 0.8,
    ):
        """word: name and settings of the method inside. beta: share of the text, 0..1.

        Raises ConfigError, for a method without a pseudo-word, too.
        """
        super().__init__(backbone)
        if "name" not in word:
            raise ConfigError("composer.word of pdv: expected the name of a pseudo-word method")
        settings = dict(word)
        self.word = build(settings.pop("name"), backbone, **settings)
        if not isinstance(self.word, PseudoWord | Rtd):
            raise ConfigError(
                f"composer.word.name={word['name']!r}: PDV is put around a method whose query is a "
                "prompt with a pseudo-word: pic2word, searle, searle_oti, lincir, palavra, isa, "
                "or rtd."
            )
        self.trained, self.reads_images = self.word.trained, self.word.reads_images
        self.word_rows = self.word.word_rows
        if not 0 <= beta <= 1:
            raise ConfigError(f"pdv: beta={beta}; the share of the text lies in 0..1.")
        self.alpha_image, self.alpha_text = float(alpha_image), float(alpha_text)
        self.beta = float(beta)
        self.named_ids = backbone.tokenizer([self.prompt("")])
        self.official_format = self.word.official_format

    @classmethod
    def for_others(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return dict(settings) | {"word": for_others(settings["word"])}

    def write_files(self, directory: Path) -> dict[str, str]:
        return {f"word.{key}": name for key, name in self.word.write_files(directory).items()}

    def prompt(self, text: str) -> str:
        return self.word.prompt(text)

    def contents(self) -> dict[str, str]:
        return self.word.contents()

    def freeze(self, backbone_params: Params, shapes_only: bool = False) -> Params:
        return self.word.freeze(backbone_params, shapes_only)

    def init(self, rng: jax.Array) -> Params:
        return self.word.init(rng)

    def take_over(self, given: Params, frozen: Params) -> Params:
        return self.word.take_over(given, frozen)

    def read_official(self, path: Path, frozen: Params) -> Params:
        return self.word.read_official(path, frozen)

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        self.word.write_official(path, params, frozen)

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        ids = query["token_ids"]
        named = jnp.broadcast_to(self.named_ids, (len(ids), self.named_ids.shape[1]))
        features = self.word.read(params, frozen, query, rng, [ids, named])
        composed, plain = (normalise(x.astype(jnp.float32)) for x in features)
        image = normalise(self.reference_features(frozen, query))
        direction = composed - plain
        of_image = image + self.alpha_image * direction
        of_text = plain + self.alpha_text * direction
        return normalise((1 - self.beta) * of_image + self.beta * of_text)
