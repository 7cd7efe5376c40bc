"""Contrastive image-text pretraining (CLIP, arXiv 2103.00020): the backbone itself is trained.

Symmetric InfoNCE over the global batch. Not a way to compose: as one, it is text-to-image
retrieval, which is how the pretrained model is judged.
"""

import jax
import jax.numpy as jnp

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.composers.losses import info_nce, pair_recall
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone
from cir_jax.models.resnet import ResNetConfig

MAX_SCALE = 100.0  # CLIP clips the learned scale here


class ClipPretraining(Composer):
    trained = True
    pretrained_backbone = False

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

    def freeze(self, backbone_params: Params, shapes_only: bool = False) -> Params:
        return {}

    def init(self, rng: jax.Array) -> Params:
        return self.backbone.init(rng)

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

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        return normalise(self.backbone.encode_text(params, query["token_ids"]))

    def embed_gallery(self, params: Params, frozen: Params, images: jax.Array) -> jax.Array:
        return normalise(self.backbone.encode_image(params, images))
