"""Image-only baseline: the query is the reference image, the modification text is ignored."""

import jax

from cir_jax.composers.base import Composer, Params, Query, normalise


class ImageOnly(Composer):
    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        return normalise(self.reference_features(frozen, query))
