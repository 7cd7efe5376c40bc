"""Image + text baseline: the sum of the two unit features (Pic2Word's "mixture", arXiv 2302.03084).

SEARLE says only that the features "are summed together"; CLIP4Cir sums un-normalised ones, and so
does BGE-VL (MegaPairs, arXiv 2412.14475), whose CLIP was trained for this sum: `unit=False`.
"""

import jax

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.models.backbone import Backbone


class ImageText(Composer):
    """unit: each of the two is normalised before they are summed; the sum is in any case."""

    def __init__(self, backbone: Backbone, unit: bool = True):
        super().__init__(backbone)
        self.unit = unit

    def fuse(self, image: jax.Array, text: jax.Array) -> jax.Array:
        """Un-normalised features float32[batch, dim] -> queries of unit norm."""
        if self.unit:
            image, text = normalise(image), normalise(text)
        return normalise(image + text)

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        text = self.backbone.encode_text(frozen["backbone"], query["token_ids"])
        return self.fuse(self.reference_features(frozen, query), text)
