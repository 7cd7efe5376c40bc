"""Image + text baseline: the sum of the two unit features (Pic2Word's "mixture", arXiv 2302.03084).

SEARLE says only that the features "are summed together"; CLIP4Cir sums un-normalised ones.
"""

import jax

from cir_jax.composers.base import Composer, Params, Query, normalise


class ImageText(Composer):
    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        image = normalise(self.reference_features(frozen, query))
        text = normalise(self.backbone.encode_text(frozen["backbone"], query["token_ids"]))
        return normalise(image + text)
