"""SEARLE: a network learns the words that optimisation found (arXiv 2303.15247, section 3.2).

    L = w_distil NT-Xent(v_oti, phi(I)) + w_gpt (1 - cos(T(phrase of phi(I)), T(phrase)))

I: un-normalised image feature; v_oti: the image's stored word, from a stage that ran `searle_oti`;
NT-Xent over the 2 x batch rows of both at temperature 0.25; phrase: about one of the image's top_k
concepts, drawn anew each time (`composers.phrases`).

The released code (miccunifi/SEARLE) decides where it is not the paper; so here, too:
* w_gpt = 0.25 and top_k = 15 in the paper, 0.75 and 150 in the code. The code's NT-Xent is half of
  the paper's formula, and has rows of their own kind among its negatives, so the weights mean
  different things.
* All occurrences of the concept in the phrase become `$`, but the first alone is overwritten.
* A concept that is listed twice is drawn twice as often (the released list has none).

Where the numbers are not the release's:
* It trains in fp16 with loss scaling (text tower and phi), on fp32 image features; concepts are
  associated by fp16 features. Here towers compute in `config.dtype`, phi and losses in float32, and
  so does the association with stored features, even if the step is bfloat16: that would choose
  others. Images that are encoded in the step have its type.
* Other random numbers. It draws the concepts of a whole batch until none is discarded, here each
  image draws among its usable ones: the distribution is the same. Where an image has none it would
  draw forever; here such an image has the nearest usable one (`Phrases.associate`).
* A concept of whose phrases one is cut off before its `$` is discarded, too; there it is an error.
* It watches CIRR's val split without saying which epoch was released. Here the result is the last
  step, or the best one by `config.checkpoint.best`.

The ablations of Table 4 are settings: `distillation` "cosine" or "none" (the cycle contrastive loss
of PALAVRA: NT-Xent of the image features and the text features of "a photo of $"), `weight_gpt` 0.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cir_jax.composers.base import Params
from cir_jax.composers.losses import cosine_loss, nt_xent
from cir_jax.composers.phi import PhiWord, check_weight
from cir_jax.composers.phrases import Phrases, phrase_loss
from cir_jax.errors import ConfigError, unknown
from cir_jax.models.backbone import Backbone

DISTILLATIONS = ("contrastive", "cosine", "none")


class Searle(PhiWord):
    """`params` are those of `Phi`. Phrases and stored words are for training only."""

    speed_settings = ("cached_phrases",)

    def __init__(
        self,
        backbone: Backbone,
        phrases: str = "",
        names: str = "",
        top_k: int = 150,
        dropout: float = 0.5,
        distillation: str = "contrastive",
        temperature: float = 0.25,
        weight_distil: float = 1.0,
        weight_gpt: float = 0.75,
        cached_phrases: int = 1 << 16,
    ):
        """phrases: phrase book; names: file of its concepts to use, "" = all.

        cached_phrases: features of so many phrases are kept (`Phrases.freeze`).
        """
        super().__init__(backbone, dropout)
        if distillation not in DISTILLATIONS:
            raise ConfigError(unknown("distillation of searle:", distillation, DISTILLATIONS))
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature}: expected more than 0")
        check_weight("weight_distil", weight_distil)
        check_weight("weight_gpt", weight_gpt)
        self.distillation, self.temperature = distillation, float(temperature)
        self.weight_distil, self.weight_gpt = float(weight_distil), float(weight_gpt)
        self.cached_phrases = cached_phrases
        self.cycle_ids = backbone.tokenizer([self.prompt("")])
        self.phrases = None
        if phrases and weight_gpt:
            self.phrases = Phrases.read(phrases, backbone, top_k, every=True, names=names)

    @classmethod
    def for_others(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return dict(settings) | {"phrases": "", "names": ""}

    def contents(self) -> dict[str, str]:
        return {} if self.phrases is None else {"phrases": self.phrases.book.identity}

    def freeze(self, backbone_params: Params, shapes_only: bool = False) -> Params:
        frozen = super().freeze(backbone_params, shapes_only)
        if self.phrases is None:
            return frozen
        tables = self.phrases.freeze(
            self.backbone, backbone_params, self.cached_phrases, shapes_only
        )
        return frozen | {"phrases": tables}

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: reference_features float32[batch, dim] or reference_images; pseudo_words
        float32[batch, token_dim] unless distillation is "none".

        Raises ConfigError when a loss with a weight has nothing to work on.
        """
        features = jax.lax.stop_gradient(self.reference_features(frozen, batch))
        keys = jax.vmap(jax.random.split)(rngs)
        words = self.words(params, features, keys[:, 0])
        rows = {"estimate": words, "target": features}
        if self.distillation == "none":
            ids = jnp.broadcast_to(self.cycle_ids, (len(words), self.cycle_ids.shape[1]))
            rows["estimate"] = self.text_features(frozen["backbone"], ids, words)
        elif "pseudo_words" in batch:
            rows["target"] = batch["pseudo_words"]
        else:
            raise ConfigError(
                f"distillation={self.distillation!r} needs stored words: set data.tokens of the "
                "stage to the one that makes them, or distillation='none'."
            )
        if not self.weight_gpt:
            return rows
        if self.phrases is None:
            raise ConfigError(
                f"weight_gpt={self.weight_gpt} needs phrases: set composer.phrases of the stage to "
                "a phrase book, or weight_gpt=0."
            )
        top = self.phrases.associate(frozen["phrases"], features)
        drawn = self.phrases.draw_concept_first(frozen["phrases"], top, keys[:, 1])
        return rows | {"gpt": phrase_loss(self, self.phrases, frozen, drawn, words)}

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        target, estimate = rows["target"], rows["estimate"]
        if self.distillation == "cosine":
            distil = cosine_loss(target, estimate).mean()
        else:
            distil = nt_xent(target, estimate, self.temperature)
        gpt = rows["gpt"].mean() if "gpt" in rows else jnp.zeros(())
        return self.weight_distil * distil + self.weight_gpt * gpt, {"distil": distil, "gpt": gpt}
