"""A backbone: a vision-language model behind one interface, whatever its family.

Composers talk to this interface only. It holds no parameters: every function takes `params`, the
tree of the wrapped Flax module.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.input.images import ImageTransform
from cir_jax.input.text import Tokenizer
from cir_jax.models.clip import Clip, ClipConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """CLIP with its tokenizer and image preprocessing.

    weights_id: name + content hash of the weights; stored in checkpoints, caches and results.
    """

    model: Clip
    tokenizer: Tokenizer
    image_transform: ImageTransform
    weights_id: str

    @property
    def config(self) -> ClipConfig:
        return self.model.config

    @property
    def dim(self) -> int:
        """Joint dimension of image and text features."""
        return self.config.projection_dim

    @property
    def token_dim(self) -> int:
        """Width of token embeddings and of text hidden states."""
        return self.config.text.hidden_size

    @property
    def context_length(self) -> int:
        return self.config.text.max_position_embeddings

    def init(self, rng: jax.Array) -> Any:
        """Random parameters (float32)."""
        size = self.config.vision.image_size
        images = jnp.zeros((1, size, size, 3))
        token_ids = jnp.full((1, 4), self.config.text.eos_token_id, jnp.int32)
        return self.model.init(rng, images, token_ids)["params"]

    def encode_image(self, params: Any, images: jax.Array) -> jax.Array:
        """uint8 or normalised float images -> float32[batch, dim], un-normalised."""
        return self._apply(params, self._pixels(images), method="encode_image").astype(jnp.float32)

    def visual_tokens(self, params: Any, images: jax.Array) -> jax.Array:
        """uint8 or normalised float images -> float[batch, tokens, vision width]."""
        return self._apply(params, self._pixels(images), method="visual_tokens")

    def embed_tokens(self, params: Any, token_ids: jax.Array) -> jax.Array:
        """int32[batch, length] -> float[batch, length, token_dim]."""
        return self._apply(params, token_ids, method="embed_tokens")

    def encode_text(
        self, params: Any, token_ids: jax.Array, embeddings: jax.Array | None = None
    ) -> jax.Array:
        """int32[batch, length] -> float32[batch, dim], un-normalised.

        embeddings: token embeddings with pseudo-words put in, in place of the embedded ids.
        """
        return self._apply(params, token_ids, embeddings, method="encode_text").astype(jnp.float32)

    def text_hidden_states(
        self, params: Any, token_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """int32[batch, length] -> float[batch, length, token_dim] after the final norm.

        attention_mask: bool[batch, length], True where a key may be attended to; None = all.
        """
        embeddings = self.embed_tokens(params, token_ids)
        return self._apply(params, embeddings, attention_mask, method="text_hidden_states")

    def _apply(self, params: Any, *args: Any, method: str) -> jax.Array:
        return self.model.apply({"params": params}, *args, method=method)

    def _pixels(self, images: jax.Array) -> jax.Array:
        # uint8 crosses to the device four times as fast; the normalisation is one fused operation
        if images.dtype != jnp.uint8:
            return images
        mean, std = np.asarray(self.image_transform.statistics, np.float32).reshape(2, 1, 1, 1, 3)
        return (images.astype(jnp.float32) / 255.0 - mean) / std
