"""SigLIP (Zhai et al., arXiv 2303.15343) and SigLIP 2 of fixed resolution (arXiv 2502.14786).

The same methods as `Clip`. No class token: a learned probe attends to all patches, and its own MLP
makes the image feature of them, in the joint space without a projection. The text tower looks both
ways and masks no padding: the feature is that of the last position, so texts are always padded to
the length of training. Source: Hugging Face `SiglipModel`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cir_jax.errors import WeightsError
from cir_jax.models.clip import TextTower
from cir_jax.models.transformer import (
    Attention,
    PatchEmbedding,
    TowerConfig,
    blocks,
    check_batch,
    check_images,
    check_token_ids,
    mlp,
    run_blocks,
)


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig(TowerConfig):
    """Field names and defaults of Hugging Face's SiglipTextConfig.

    projection_size: the joint dimension; None = hidden_size.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vocab_size: int = 32000
    max_position_embeddings: int = 64
    projection_size: int | None = None


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig(TowerConfig):
    """Field names and defaults of Hugging Face's SiglipVisionConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 16


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """A whole SigLIP; the joint dimension is the width of the image tower."""

    text: SiglipTextConfig = SiglipTextConfig()
    vision: SiglipVisionConfig = SiglipVisionConfig()

    def __post_init__(self) -> None:
        text, width = self.text, self.vision.hidden_size
        if (text.projection_size or text.hidden_size) != width:
            raise WeightsError(
                f"SigLIP with text features of {text.projection_size or text.hidden_size} and "
                f"image features of {width}: they are compared, so text_config.projection_size "
                "(without it, its hidden_size) must be vision_config.hidden_size. Correct "
                "config.json."
            )

    @property
    def projection_dim(self) -> int:
        return self.vision.hidden_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SiglipConfig":
        """From the dictionary of a Hugging Face SigLIP `config.json`.

        Raises WeightsError for settings with another network.
        """
        text, vision = (config.get(f"{name}_config") or {} for name in ("text", "vision"))
        if not vision.get("vision_use_head", True):
            raise WeightsError(
                "SigLIP with vision_config.vision_use_head=False: no head that embeds images. Use "
                "a SigLIP that embeds images and texts."
            )
        text = {key: value for key, value in text.items() if value is not None}
        return cls(SiglipTextConfig.from_dict(text), SiglipVisionConfig.from_dict(vision))

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a Hugging Face `config.json`."""
        text = dataclasses.asdict(self.text) | {"projection_size": self.projection_dim}
        return {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model", **text},
            "vision_config": {
                "model_type": "siglip_vision_model",
                **dataclasses.asdict(self.vision),
            },
        }


class AttentionPool(nn.Module):
    """A learned probe attends to all tokens, then an MLP; without the probe's own value."""

    config: SiglipVisionConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """float[batch, tokens, width] -> float[batch, width]."""
        config, batch = self.config, len(tokens)
        init = nn.initializers.normal(config.hidden_size**-0.5)
        probe = self.param("probe", init, (1, 1, config.hidden_size)).astype(self.dtype)
        probe = jnp.broadcast_to(probe, (batch, *probe.shape[1:]))
        # not "attention": PyTorch's is no linear layer that adapters can be put on (models.lora)
        attention = Attention(config, self.dtype, name="pool_attention")
        x = attention(probe, None, tokens)[:, 0]
        norm = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="norm")
        return x + mlp(config, self.dtype, norm(x))


class SiglipVision(nn.Module):
    """ViT without a class token; the last norm is on all tokens."""

    config: SiglipVisionConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        width, normal = config.hidden_size, nn.initializers.normal(config.hidden_size**-0.5)
        self.patch_embedding = PatchEmbedding(width, config.patch_size, self.dtype)
        self.patch_bias = self.param("patch_bias", nn.initializers.zeros, (width,))
        tokens = (config.image_size // config.patch_size) ** 2
        self.position_embedding = self.param("position_embedding", normal, (tokens, width))
        self.layers = blocks(config, self.dtype, self.remat)
        self.post_norm = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype)
        self.pool = AttentionPool(config, self.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised float[batch, height, width, 3] -> float[batch, tokens, width]."""
        x = self.patch_embedding(images.astype(self.dtype))
        x = x + self.patch_bias.astype(self.dtype)[None, None]
        x = x + self.position_embedding.astype(self.dtype)[None]
        return self.post_norm(run_blocks(self.layers, x))


class Siglip(nn.Module):
    """Both towers, and scale and bias of the logits, of which features do not depend.

    Features are un-normalised. Texts are token ids ... end, padded to the context length.
    """

    config: SiglipConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        self.vision = SiglipVision(config.vision, self.dtype, self.remat)
        self.text = TextTower(config.text, self.dtype, self.remat, causal=False)
        self.text_projection = nn.Dense(config.projection_dim, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.zeros, ())
        self.logit_bias = self.param("logit_bias", nn.initializers.zeros, ())

    def visual_tokens(self, images: jax.Array) -> jax.Array:
        """Normalised float[batch, height, width, 3] -> float[batch, tokens, dim], normed."""
        check_images(images, self.config.vision.image_size)
        return self.vision(images)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Normalised float[batch, height, width, 3] -> float[batch, dim]."""
        return self.vision.pool(self.visual_tokens(images))

    def embed_tokens(self, token_ids: jax.Array) -> jax.Array:
        """int32[batch, length] -> float[batch, length, token_dim]."""
        check_token_ids(token_ids, self.config.text.vocab_size)
        return self.text.embed(token_ids)

    def text_hidden_states(
        self, embeddings: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """Token embeddings -> float[batch, length, token_dim], after the final norm.

        attention_mask: bool[batch, length]; None = all, padding too, as in training.
        """
        return self.text(embeddings, attention_mask)

    def encode_text(self, token_ids: jax.Array, embeddings: jax.Array | None = None) -> jax.Array:
        """float[batch, dim] of the last position, be it a word, the end or padding.

        embeddings: float[batch, length, token_dim] in place of the embedded `token_ids`
        (pseudo-words), which then do not matter.
        """
        check_batch(token_ids, "texts")
        if embeddings is None:
            embeddings = self.embed_tokens(token_ids)
        last = jnp.full(len(token_ids), token_ids.shape[1] - 1)
        return self.text_projection(self.text(embeddings, at=last)[:, 0])

    def __call__(self, images: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Image and text features; used to create all parameters."""
        return self.encode_image(images), self.encode_text(token_ids)
