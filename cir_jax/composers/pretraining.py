"""What the pretraining of a backbone has in common: the backbone itself is what is trained.

Not a way to compose: as one, it is text-to-image retrieval, by which the pretrained model is
judged.
"""

import jax

from cir_jax.composers.base import Composer, Params, Query, normalise


class Pretraining(Composer):
    """`params` are the backbone's, beginning at random."""

    trained = True
    pretrained_backbone = False

    def freeze(self, backbone_params: Params, shapes_only: bool = False) -> Params:
        return {}

    def init(self, rng: jax.Array) -> Params:
        return self.backbone.init(rng)

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        return normalise(self.backbone.encode_text(params, query["token_ids"]))

    def embed_gallery(self, params: Params, frozen: Params, images: jax.Array) -> jax.Array:
        return normalise(self.backbone.encode_image(params, images))
