"""Encoders that are no vision-language backbone, with what they need of their input.

Like `Backbone`, they hold no parameters: every function takes `params` or `variables`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cir_jax.input.images import ImageTransform
from cir_jax.input.text import Tokenizer
from cir_jax.models.backbone import pixels
from cir_jax.models.light import LightEncoder
from cir_jax.models.t5 import T5Encoder
from cir_jax.models.transformer import check_batch


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """A T5 encoder with its tokenizer. weights_id: name + content hash of the weights."""

    model: T5Encoder
    tokenizer: Tokenizer
    weights_id: str

    @property
    def dim(self) -> int:
        """Width of the hidden states."""
        return self.model.config.d_model

    @property
    def context_length(self) -> int:
        """Tokens of the longest text; the model itself has no limit."""
        return self.tokenizer.context_length

    def hidden_states(
        self, params: Any, token_ids: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """int32[batch, length] -> float[batch, length, dim].

        attention_mask: bool[batch, length]; None = all but the padding.
        """
        if attention_mask is None:
            attention_mask = jnp.asarray(token_ids) != self.tokenizer.pad_id
        return self.model.apply({"params": params}, token_ids, attention_mask)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageEncoder:
    """A light image encoder with its preprocessing. weights_id: name + hash of the weights.

    `variables` are {"params", "batch_stats"}.
    """

    model: LightEncoder
    image_transform: ImageTransform
    weights_id: str

    @property
    def dim(self) -> int:
        """Channels of the feature map."""
        return self.model.config.num_features

    def feature_map(self, variables: Any, images: jax.Array) -> jax.Array:
        """uint8 or normalised float images [batch, height, width, 3] -> float[batch, h, w, dim]."""
        check_batch(images, "images")
        return self.model.apply(variables, pixels(images, self.image_transform))

    def train_feature_map(self, variables: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        """The same with the batch's own statistics, and the new batch_stats."""
        check_batch(images, "images")
        feature_map, changed = self.model.apply(
            variables, pixels(images, self.image_transform), train=True, mutable=["batch_stats"]
        )
        return feature_map, changed["batch_stats"]
