"""Pretraining of a BLIP for retrieval: the backbone itself is trained (arXiv 2201.12086).

    L = ITC + ITM: symmetric InfoNCE of images and texts + matching (`composers.matching`)

over the global batch. Without what makes BLIP robust to wrong captions of the web: momentum
encoders with their queue and soft labels, and captioning with its filter; the released training has
them. The temperature stays as it is given (BLIP learns it, from 0.07).
"""

import jax

from cir_jax.composers.base import Params, normalise
from cir_jax.composers.losses import info_nce, pair_recall
from cir_jax.composers.matching import matching_loss
from cir_jax.composers.pretraining import Pretraining
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone


class BlipPretraining(Pretraining):
    def __init__(self, backbone: Backbone, temperature: float = 0.07):
        """Raises ConfigError for a backbone that is no BLIP."""
        super().__init__(backbone)
        if backbone.family != "blip":
            raise ConfigError(
                f"blip_pretraining trains a BLIP, and backbone {backbone.weights_id} is none. "
                "Set config.backbone to the directory of one."
            )
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature}: expected more than 0, such as 0.07")
        self.scale = 1 / float(temperature)

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: target_images uint8[batch, height, width, 3], token_ids int32[batch, length]."""
        tokens = self.backbone.visual_tokens(params, batch["target_images"])
        return {
            "tokens": tokens,
            "image": normalise(self.backbone.project_image(params, tokens)),
            "text": normalise(self.backbone.encode_text(params, batch["token_ids"])),
        }

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: dict[str, jax.Array],
        rng: jax.Array,
        microbatches: int = 1,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        rng, drawn = jax.random.split(rng)
        rows = self.rows(params, frozen, batch, rng, microbatches)
        contrastive = info_nce(rows["image"], rows["text"], self.scale)
        scores = rows["text"] @ rows["image"].T
        matching, accuracy = matching_loss(
            lambda ids, tokens: self.backbone.match(params, ids, tokens),
            batch["token_ids"],
            rows["tokens"],
            self.scale * scores,
            drawn,
            microbatches,
        )
        metrics = {
            "contrastive": contrastive,
            "matching": matching,
            "matching_accuracy": accuracy,
            "in_batch_recall": pair_recall(scores),
        }
        return contrastive + matching, metrics
