"""BLIP (Li et al., arXiv 2201.12086): contrastive (ITC) and matching (ITM) encoders, Flax Linen.

The same methods as `Clip`, so that a backbone can be either; matching comes on top. The image tower
is CLIP's ViT without the first norm, with a bias in the patch embedding, and its last norm on all
tokens. The epsilon of its norms comes with the checkpoint: salesforce 1e-6, Hugging Face 1e-5.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import ConfigError, DataError
from cir_jax.models.bert import Bert, BertConfig, dense, layer_norm
from cir_jax.models.transformer import (
    Block,
    PatchEmbedding,
    TowerConfig,
    check_batch,
    check_token_ids,
    run_blocks,
)


@dataclasses.dataclass(frozen=True)
class BlipVisionConfig(TowerConfig):
    """Field names and defaults of Hugging Face's BlipVisionConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 384
    patch_size: int = 16


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """A whole BLIP; `projection_dim` is the joint dimension `dim` (image_text_hidden_size)."""

    text: BertConfig = BertConfig()
    vision: BlipVisionConfig = BlipVisionConfig()
    projection_dim: int = 256

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "BlipConfig":
        """From the dictionary of a Hugging Face BLIP `config.json`."""
        vision = BlipVisionConfig.from_dict(config.get("vision_config") or {})
        text = BertConfig.from_dict(config.get("text_config") or {})
        return cls(
            # as transformers does: the text tower's own field is not trusted
            text=dataclasses.replace(text, encoder_hidden_size=vision.hidden_size),
            vision=vision,
            projection_dim=config.get("image_text_hidden_size", 256),
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a Hugging Face `config.json`."""
        return {
            "architectures": ["BlipForImageTextRetrieval"],
            "model_type": "blip",
            "image_text_hidden_size": self.projection_dim,
            "text_config": {"model_type": "blip_text_model", **dataclasses.asdict(self.text)},
            "vision_config": {"model_type": "blip_vision_model", **dataclasses.asdict(self.vision)},
        }

    @classmethod
    def published(cls, size: str = "base", image_size: int = 224) -> "BlipConfig":
        """ViT-B/16 ("base") or ViT-L/16 ("large") of salesforce's files, with BERT base."""
        if size not in ("base", "large"):
            raise ConfigError(f"BLIP size {size!r}: give 'base' or 'large'.")
        width, layers, heads = (768, 12, 12) if size == "base" else (1024, 24, 16)
        return cls(
            text=BertConfig(num_attention_heads=12, encoder_hidden_size=width),
            vision=BlipVisionConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                layer_norm_eps=1e-6,
                image_size=image_size,
            ),
        )


def bicubic_weights(old: int, new: int) -> np.ndarray:
    """float32[new, old]: PyTorch's bicubic interpolation of one axis (align_corners=False).

    Not `jax.image.resize`: PyTorch's kernel has a = -0.75 (there -0.5), does not widen when it
    shrinks, and repeats the border.
    """
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        d = np.abs(centre - (first + tap))
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        column = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), column), np.where(d <= 1, near, far))
    return weights.astype(np.float32)


def interpolate_positions(positions: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """float[1, 1 + size * size, width] -> [1, 1 + rows * columns, width]; the first stays as is."""
    size = round((positions.shape[1] - 1) ** 0.5)
    if grid == (size, size):
        return positions
    rows, columns = (bicubic_weights(size, new) for new in grid)
    patches = positions[0, 1:].reshape(size, size, -1)
    patches = jnp.einsum("rs,sqw->rqw", rows, patches, precision="highest")
    patches = jnp.einsum("cq,rqw->rcw", columns, patches, precision="highest")
    return jnp.concatenate([positions[:, :1], patches.reshape(1, -1, positions.shape[2])], axis=1)


class BlipVision(nn.Module):
    """ViT over square patches; an image of another size gets interpolated position embeddings."""

    config: BlipVisionConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        width, normal = config.hidden_size, nn.initializers.normal(0.02)
        self.patch_embedding = PatchEmbedding(width, config.patch_size, self.dtype)
        self.patch_bias = self.param("patch_bias", nn.initializers.zeros, (width,))
        self.class_embedding = self.param("class_embedding", normal, (1, 1, width))
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = self.param("position_embedding", normal, (1, tokens, width))
        block = nn.remat(Block) if self.remat else Block
        self.layers = [block(config, self.dtype) for _ in range(config.num_hidden_layers)]
        self.post_norm = layer_norm(config, self.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised float[batch, height, width, 3] -> float[batch, tokens, width]."""
        if images.ndim != 4 or images.shape[3] != 3:
            raise DataError(
                f"images of shape {images.shape}; expected [batch, height, width, 3]. "
                "Use the image transform that comes with the weights."
            )
        check_batch(images, "images")
        batch, height, width, _ = images.shape
        size = self.config.patch_size
        if height % size or width % size:
            raise DataError(
                f"images of {height} x {width} pixels are not made of {size} x {size} patches. "
                "Resize them to a multiple."
            )
        positions = interpolate_positions(self.position_embedding, (height // size, width // size))
        patches = self.patch_embedding(images.astype(self.dtype))
        patches = patches + self.patch_bias.astype(self.dtype)[None, None]
        first = jnp.broadcast_to(
            self.class_embedding.astype(self.dtype), (batch, 1, patches.shape[-1])
        )
        x = jnp.concatenate([first, patches], axis=1) + positions.astype(self.dtype)
        return self.post_norm(run_blocks(self.layers, x))


class Blip(nn.Module):
    """Both towers, their projections and the matching head. Features are un-normalised.

    Texts are token ids [CLS] ... [SEP] padded with `pad_token_id`; padding is masked wherever the
    ids are given.
    """

    config: BlipConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        self.vision = BlipVision(config.vision, self.dtype, self.remat)
        self.text = Bert(config.text, self.dtype, self.remat)
        self.visual_projection = dense(config.projection_dim, None, self.dtype)
        self.text_projection = dense(config.projection_dim, None, self.dtype)
        self.match_head = dense(2, None, self.dtype)

    def visual_tokens(self, images: jax.Array) -> jax.Array:
        """Normalised float[batch, height, width, 3] -> float[batch, tokens, vision width]."""
        return self.vision(images)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Normalised float[batch, height, width, 3] -> float[batch, dim], projected."""
        return self.project_image(self.vision(images))

    def project_image(self, visual_tokens: jax.Array) -> jax.Array:
        """float[batch, tokens, vision width] -> float[batch, dim] of the class token."""
        return self.visual_projection(visual_tokens[:, 0])

    def embed_tokens(self, token_ids: jax.Array) -> jax.Array:
        """int32[batch, length] -> float[batch, length, token_dim]."""
        check_token_ids(token_ids, self.config.text.vocab_size)
        return self.text.embed(token_ids)

    def text_hidden_states(
        self,
        embeddings: jax.Array,
        attention_mask: jax.Array | None = None,
        visual_tokens: jax.Array | None = None,
    ) -> jax.Array:
        """Word embeddings -> float[batch, length, token_dim]; see `Bert`."""
        return self.text(embeddings, attention_mask, visual_tokens)

    def encode_text(self, token_ids: jax.Array, embeddings: jax.Array | None = None) -> jax.Array:
        """float[batch, dim] of [CLS], projected.

        embeddings: float[batch, length, token_dim] in place of the embedded `token_ids`
        (pseudo-words); the ids then only say where the padding is.
        """
        return self.text_projection(self._first(token_ids, embeddings, None))

    def match(
        self, token_ids: jax.Array, visual_tokens: jax.Array, embeddings: jax.Array | None = None
    ) -> jax.Array:
        """float[batch, 2]: logits of (no match, match) of each text with its own image.

        visual_tokens: float[batch, tokens, vision width]. salesforce's retrieval and pre-training
        put [ENC] first (`with_enc_token`), its ITM demo and Hugging Face leave [CLS] there.
        """
        return self.match_head(self._first(token_ids, embeddings, visual_tokens))

    def _first(
        self, token_ids: jax.Array, embeddings: jax.Array | None, visual_tokens: jax.Array | None
    ) -> jax.Array:
        check_batch(token_ids, "texts")
        if embeddings is None:
            embeddings = self.embed_tokens(token_ids)
        words = token_ids != self.config.text.pad_token_id
        return self.text(embeddings, words, visual_tokens)[:, 0]

    def __call__(
        self, images: jax.Array, token_ids: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Image features, text features, match logits; used to create all parameters."""
        tokens = self.vision(images)
        text = self.encode_text(token_ids)
        return self.project_image(tokens), text, self.match(token_ids, tokens)


def with_enc_token(token_ids: jax.Array, config: BlipConfig) -> jax.Array:
    """int32[batch, length] with [ENC] in place of [CLS], for `Blip.match`."""
    return token_ids.at[:, 0].set(config.text.enc_token_id)
