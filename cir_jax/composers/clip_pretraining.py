"""Contrastive image-text pretraining (CLIP, arXiv 2103.00020): the backbone itself is trained.

Symmetric InfoNCE over the global batch.
"""

import jax
import jax.numpy as jnp

from cir_jax.composers.base import Params, normalise
from cir_jax.composers.losses import info_nce, pair_recall
from cir_jax.composers.pretraining import Pretraining
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone
from cir_jax.models.resnet import ResNetConfig

MAX_SCALE = 100.0  # CLIP clips the learned scale here


class ClipPretraining(Pretraining):
    def __init__(self, backbone: Backbone, learned_scale: bool = True):
        """learned_scale: False keeps the scale at the config's logit_scale_init_value."""
        super().__init__(backbone)
        if backbone.family != "clip" or not backbone.joint:
            raise ConfigError(
                f"clip_pretraining trains a CLIP, and backbone {backbone.weights_id} is none. "
                "Set config.backbone to the directory of one."
            )
        if isinstance(backbone.config.vision, ResNetConfig):
            raise ConfigError(
                f"clip_pretraining starts from random weights, but the batch norms of "
                f"{backbone.weights_id}, a ResNet, are frozen and would never learn their "
                "statistics. Set config.backbone to a CLIP with a ViT image tower."
            )
        self.learned_scale = learned_scale

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: target_images uint8[batch, height, width, 3], token_ids int32[batch, length]."""
        return {
            "image": normalise(self.backbone.encode_image(params, batch["target_images"])),
            "text": normalise(self.backbone.encode_text(params, batch["token_ids"])),
        }

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        scale = params["logit_scale"]
        if not self.learned_scale:
            scale = jax.lax.stop_gradient(scale)
        scale = jnp.minimum(jnp.exp(scale), MAX_SCALE)
        loss = info_nce(rows["image"], rows["text"], scale)
        recall = pair_recall(rows["text"] @ rows["image"].T)
        return loss, {"scale": scale, "in_batch_recall": recall}
