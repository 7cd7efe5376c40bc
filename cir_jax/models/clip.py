"""CLIP (Radford et al., arXiv 2103.00020) with a ViT or ResNet image tower, as Flax Linen.

Dimension names: see CONTRIBUTING.md. All functions take the parameter tree of `Clip.init`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cir_jax.errors import DataError
from cir_jax.models.resnet import ResNetConfig, ResNetTower
from cir_jax.models.transformer import (
    Embed,
    PatchEmbedding,
    TowerConfig,
    blocks,
    check_batch,
    check_images,
    check_token_ids,
    run_blocks,
)
from cir_jax.sharding.constraints import split_rows


@dataclasses.dataclass(frozen=True)
class TextConfig(TowerConfig):
    """eos_token_id: the pooled token; 2, of configs older than the field, means the largest id."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """A whole CLIP; `projection_dim` is the joint dimension `dim`."""

    text: TextConfig = TextConfig()
    vision: VisionConfig | ResNetConfig = VisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ClipConfig":
        """From the dictionary of a Hugging Face CLIP `config.json`."""
        # some early configs say it in text_config_dict; as transformers reads it, that replaces
        # every field of text_config, by the class's default where it does not name the field
        text, vision = (
            tower.from_dict(
                (config.get(name) or {})
                if config.get(f"{name}_dict") is None
                else config[f"{name}_dict"]
            )
            for tower, name in ((TextConfig, "text_config"), (VisionConfig, "vision_config"))
        )
        return cls(
            text=text,
            vision=vision,
            projection_dim=config.get("projection_dim", 512),
            logit_scale_init_value=config.get("logit_scale_init_value", 2.6592),
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a Hugging Face `config.json`, which has no form for ResNets."""
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            "text_config": {
                "model_type": "clip_text_model",
                "projection_dim": self.projection_dim,
                **dataclasses.asdict(self.text),
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "projection_dim": self.projection_dim,
                **dataclasses.asdict(self.vision),
            },
        }


class VisionTower(nn.Module):
    """ViT: class token first, pre-norm before the blocks, post-norm on the pooled token only."""

    config: VisionConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        width, eps = config.hidden_size, config.layer_norm_eps
        normal = nn.initializers.normal
        self.patch_embedding = PatchEmbedding(width, config.patch_size, self.dtype)
        self.class_embedding = self.param("class_embedding", normal(width**-0.5), (width,))
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.position_embedding = self.param(
            "position_embedding", normal(width**-0.5), (tokens, width)
        )
        self.pre_norm = nn.LayerNorm(eps, dtype=self.dtype)
        self.layers = blocks(config, self.dtype, self.remat)
        self.post_norm = nn.LayerNorm(eps, dtype=self.dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised float[batch, height, width, 3] -> float[batch, tokens, width]."""
        return run_blocks(self.layers, self._embed(images))

    def pooled(self, images: jax.Array) -> jax.Array:
        """`pool` of the tokens, of which the last block computes the class token alone."""
        first = jnp.zeros(images.shape[0], jnp.int32)
        return self.pool(run_blocks(self.layers, self._embed(images), at=first))

    def _embed(self, images: jax.Array) -> jax.Array:
        patches = self.patch_embedding(images.astype(self.dtype))
        first = jnp.broadcast_to(
            self.class_embedding.astype(self.dtype), (patches.shape[0], 1, patches.shape[-1])
        )
        x = jnp.concatenate([first, patches], axis=1)
        return self.pre_norm(x + self.position_embedding.astype(self.dtype)[None])

    def pool(self, tokens: jax.Array) -> jax.Array:
        """float[batch, tokens, width] -> float[batch, width] of the class token."""
        return self.post_norm(tokens[:, 0])


class TextTower(nn.Module):
    """Text transformer of any length up to `max_position_embeddings`, with equal features if it is
    causal."""

    config: TextConfig
    dtype: Any = jnp.float32
    remat: bool = False
    causal: bool = True

    def setup(self) -> None:
        config = self.config
        self.token_embedding = Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
        )
        self.position_embedding = self.param(
            "position_embedding",
            nn.initializers.normal(0.01),
            (config.max_position_embeddings, config.hidden_size),
        )
        self.layers = blocks(config, self.dtype, self.remat, self.causal)
        self.final_norm = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """int32[batch, length] -> float[batch, length, token_dim], before position embeddings."""
        return self.token_embedding(token_ids)

    def __call__(
        self,
        embeddings: jax.Array,
        attention_mask: jax.Array | None = None,
        at: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm: float[batch, length, token_dim] of the same shape.

        attention_mask: bool[batch, length], True where a key may be attended to; None = all.
        at: int32[batch], the one position of each row that is wanted: float[batch, 1, token_dim].
        """
        length = embeddings.shape[1]
        if length > self.config.max_position_embeddings:
            raise DataError(
                f"text of {length} tokens; this text tower takes at most "
                f"{self.config.max_position_embeddings}. Truncate it when tokenising."
            )
        mask = None
        if attention_mask is not None:
            mask = attention_mask.astype(bool)[:, None, None, :]
        x = (
            embeddings.astype(self.dtype)
            + self.position_embedding.astype(self.dtype)[None, :length]
        )
        return split_rows(self.final_norm(run_blocks(self.layers, x, mask, at)))


class Clip(nn.Module):
    """Both towers and their projections. Features are un-normalised unless said otherwise.

    remat: trade computation for memory in training, see `blocks`.
    """

    config: ClipConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        self.text = TextTower(config.text, self.dtype, self.remat)
        self.text_projection = self._projection(config.text.hidden_size)
        if isinstance(config.vision, ResNetConfig):
            self.vision = ResNetTower(config.vision, config.projection_dim, self.dtype, self.remat)
        else:
            self.vision = VisionTower(config.vision, self.dtype, self.remat)
            self.visual_projection = self._projection(config.vision.hidden_size)
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(config.logit_scale_init_value), ()
        )

    def _projection(self, width: int) -> nn.Dense:
        return nn.Dense(
            self.config.projection_dim,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(width**-0.5),
        )

    def visual_tokens(self, images: jax.Array) -> jax.Array:
        """float[batch, height, width, 3] normalised -> float[batch, tokens, vision width].

        ViT: class token first, before the post-norm. ResNet: the cells of the last map.
        """
        check_images(images, self.config.vision.image_size)
        return self.vision(images)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """float[batch, height, width, 3] normalised -> float[batch, dim], projected."""
        check_images(images, self.config.vision.image_size)
        # the attention pool of a ResNet ends in the joint dimension
        if isinstance(self.config.vision, ResNetConfig):
            return self.vision.pool(self.vision(images))
        return self.visual_projection(self.vision.pooled(images))

    def embed_tokens(self, token_ids: jax.Array) -> jax.Array:
        """int32[batch, length] -> float[batch, length, token_dim]."""
        check_token_ids(token_ids, self.config.text.vocab_size)
        return self.text.embed(token_ids)

    def text_hidden_states(
        self, embeddings: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """Token embeddings -> float[batch, length, token_dim], after the final norm."""
        return self.text(embeddings, attention_mask)

    def encode_text(
        self,
        token_ids: jax.Array,
        embeddings: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """float[batch, dim] of the end token, projected.

        embeddings: float[batch, length, token_dim] in place of the embedded `token_ids`
        (pseudo-words); the ids then only say where the end token is.
        attention_mask: bool[batch, length], True where a key may be attended to; None = all.
        """
        check_batch(token_ids, "texts")
        if embeddings is None:
            embeddings = self.embed_tokens(token_ids)
        end = end_positions(token_ids, self.config.text.eos_token_id)
        return self.text_projection(self.text(embeddings, attention_mask, end)[:, 0])

    def __call__(self, images: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Image and text features; used to create all parameters."""
        return self.encode_image(images), self.encode_text(token_ids)


def end_positions(token_ids: jax.Array, eos_token_id: int) -> jax.Array:
    """int32[batch]: the pooled position; eos 2 (configs older than the field) means argmax."""
    if eos_token_id == 2:
        return jnp.argmax(token_ids, axis=-1)
    return jnp.argmax(token_ids == eos_token_id, axis=-1)


def overwrite_tokens(
    embeddings: jax.Array, positions: jax.Array, pseudo_words: jax.Array
) -> jax.Array:
    """Puts pseudo-word tokens into token embeddings, before position embeddings are added.

    embeddings: float[batch, length, token_dim]; positions: int32[batch] (the first of each row) or
    bool[batch, length] (every marked one); pseudo_words: float[batch, token_dim] or
    float[batch, n, token_dim] (n consecutive positions, only with int positions).
    """
    if positions.dtype == jnp.bool_:
        return jnp.where(
            positions[..., None], pseudo_words[:, None].astype(embeddings.dtype), embeddings
        )
    if pseudo_words.ndim == 2:
        pseudo_words = pseudo_words[:, None]
    columns = positions[:, None] + jnp.arange(pseudo_words.shape[1])[None]

    def of_row(row: jax.Array, columns: jax.Array, words: jax.Array) -> jax.Array:
        return row.at[columns].set(words, unique_indices=True)

    # row by row: with the row as an index, devices would exchange what they hold
    return jax.vmap(of_row)(embeddings, columns, pseudo_words.astype(embeddings.dtype))
