"""Slerp: spherical interpolation of image and text features (arXiv 2405.00571, section 3.2).

    c = sin((1 - alpha) theta) / sin(theta) v + sin(alpha theta) / sin(theta) w, cos(theta) = v.w

v: unit reference image feature, w: unit feature of the raw modification text (no prompt),
alpha: weight of the text. Paper: alpha 0.9 on CIRR, 0.8 on CIRCO and FashionIQ.
Differences from the released code: none in value; there NaN gradients leak through `where` where
the vectors coincide, and opposite vectors give NaN; here both branches are safe.
"""

import jax
import jax.numpy as jnp

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone

NEARLY_PARALLEL = 0.9995  # |cosine| above which the official code blends linearly


def slerp(image: jax.Array, text: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """Unit float[..., dim] twice -> unit float[..., dim]; alpha in [0, 1] weighs `text`, [..., 1]
    or one for all."""
    cosine = jnp.sum(image * text, axis=-1, keepdims=True)
    near = jnp.abs(cosine) > NEARLY_PARALLEL
    angle = jnp.arccos(jnp.where(near, 0.0, cosine))  # a safe input on the branch not taken
    arc = jnp.sin((1 - alpha) * angle) * image + jnp.sin(alpha * angle) * text
    line = image + alpha * (text - image)
    return normalise(jnp.where(near, line, arc / jnp.sin(angle)))


def asked_alpha(query: Query, alpha: float) -> float | jax.Array:
    """What the queries say of it, float32[batch] -> [batch, 1], else the method's own."""
    return query["alpha"][:, None] if "alpha" in query else alpha


class Slerp(Composer):
    conditions = ("alpha",)

    def __init__(self, backbone: Backbone, alpha: float = 0.8):
        """alpha: in [0, 1]; 0 = the image alone, 1 = the text alone. Raises ConfigError."""
        super().__init__(backbone)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"slerp: alpha={alpha}; the share of the text lies in 0..1.")
        self.alpha = float(alpha)

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        image = normalise(self.reference_features(frozen, query))
        text = normalise(self.backbone.encode_text(frozen["backbone"], query["token_ids"]))
        return slerp(image, text, asked_alpha(query, self.alpha))
