"""Text-only baseline: the query is the raw modification text, the reference image is ignored."""

import jax

from cir_jax.composers.base import Composer, Params, Query, normalise


class TextOnly(Composer):
    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        return normalise(self.backbone.encode_text(frozen["backbone"], query["token_ids"]))
