"""LinCIR: the network of words is trained on captions alone (arXiv 2312.01998).

    L = || text(caption with its keywords replaced by v) - text(caption) ||^2 / dim,
    v = phi(text(caption) + s u n),  u ~ Unif(0, 1), n ~ N(0, I)

The noise stands for the gap between texts and images, as at query time phi is given the image's
feature. Keywords are maximal runs of adjectives, nouns, names and determiners; every one of them
becomes the same word (`cir_jax.input.keywords` has the masking, with all its fallbacks). Images are
never read in training.

As in the released code (navervision/lincir) features are un-normalised on both sides of the loss
and at the network's input; `l2_normalize` (off there) normalises the input, noise included, and at
query time too. Where the numbers are not the release's:
* It trains in fp16 with loss scaling: the towers' weights, the sum with the noise, phi; the squares
  are fp32. At query time the pixels are fp16. Here towers compute in `config.dtype`, all else in
  float32.
* Its result is the checkpoint of the best R@1 on CIRR val, of every 1000 steps (and of step 50).
  Here the last step, or with `--config.checkpoint.best="cirr R@1"` the best of the checkpoints.
* Its moving average (off) is fp16, of decay min(0.9999, (1 + step) / (10 + step)), and scored, but
  not what is then kept as the best. Here the decay `stage.smp.ema` is constant, and the average is
  what is scored and kept.
* Empty captions, which it trains on as "$", are dropped when the table of texts is made.
"""

import jax
import jax.numpy as jnp

from cir_jax.composers.base import Params, Query, normalise
from cir_jax.composers.phi import PhiWord, check_weight
from cir_jax.composers.pseudo_word import text_noise
from cir_jax.models.backbone import Backbone


class LinCir(PhiWord):
    """`params` are those of `Phi`."""

    every = True

    def __init__(
        self,
        backbone: Backbone,
        dropout: float = 0.5,
        noise: float = 1.0,
        l2_normalize: bool = False,
    ):
        """noise: the factor s of the noise on text features."""
        super().__init__(backbone, dropout)
        check_weight("noise", noise)
        self.noise, self.l2_normalize = float(noise), l2_normalize

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: token_ids int32[batch, length] of captions, masked_token_ids of the same masked.

        Squared error of each row, float32[batch].
        """
        backbone = frozen["backbone"]
        target = jax.lax.stop_gradient(self.backbone.encode_text(backbone, batch["token_ids"]))
        noise, dropout = jax.vmap(self.draw)(rngs)
        words = self.words(params, self.network_input(target + noise), dropout)
        text = self.text_features(backbone, batch["masked_token_ids"], words)
        return {"error": jnp.mean(jnp.square(text - target), axis=-1)}

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        return rows["error"].mean(), {}

    def draw(self, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of one row: noise float32[dim], and the key of its dropout."""
        share, normal, dropout = jax.random.split(rng, 3)
        return self.noise * text_noise(share, normal, self.backbone.dim), dropout

    def network_input(self, features: jax.Array) -> jax.Array:
        return normalise(features) if self.l2_normalize else features

    def invert(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        return self.words(params, self.network_input(self.reference_features(frozen, query)))
