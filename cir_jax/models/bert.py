"""BLIP's text tower: BERT with cross-attention to visual tokens in every layer (Flax Linen).

Post-norm, bidirectional, without token-type embeddings. One set of weights serves two encoders:
without visual tokens the text encoder (features of position 0), with them the matching encoder.
Source: salesforce/BLIP `models/med.py`; Hugging Face `BlipTextModel`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cir_jax.errors import DataError
from cir_jax.models.layers import run
from cir_jax.models.transformer import ACTIVATIONS, Embed, TowerConfig
from cir_jax.sharding.constraints import split_rows


@dataclasses.dataclass(frozen=True)
class BertConfig(TowerConfig):
    """Field names and defaults of Hugging Face's BlipTextConfig; published BLIPs have 12 heads."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    vocab_size: int = 30524
    encoder_hidden_size: int = 768
    max_position_embeddings: int = 512
    pad_token_id: int = 0
    bos_token_id: int = 30522
    sep_token_id: int = 102

    @property
    def eos_token_id(self) -> int:
        """The token after the text: BERT's [SEP] (the eos of Hugging Face's config is no token)."""
        return self.sep_token_id

    @property
    def enc_token_id(self) -> int:
        """[ENC], added to BERT's words right after [DEC] = bos."""
        return self.bos_token_id + 1


def dense(features: int, name: str | None, dtype: Any) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name=name)


def layer_norm(config: TowerConfig, dtype: Any, name: str | None = None) -> nn.LayerNorm:
    # the fast variance is E[x^2] - E[x]^2, which cancels
    return nn.LayerNorm(config.layer_norm_eps, use_fast_variance=False, dtype=dtype, name=name)


class Attention(nn.Module):
    """Multi-head attention from `x` to `context` (to itself: the same array twice)."""

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        """float[batch, length, width], float[batch, keys, any], bool[batch, 1, 1, keys]."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads

        def split(x: jax.Array, name: str) -> jax.Array:
            # [batch, length, any] -> [batch, length, heads, head_dim]
            x = dense(width, name, self.dtype)(x)
            return x.reshape(*x.shape[:-1], heads, width // heads)

        mixed = jax.nn.dot_product_attention(
            split(x, "query"), split(context, "key"), split(context, "value"), mask=mask
        )
        return dense(width, "out", self.dtype)(mixed.reshape(x.shape))


class Layer(nn.Module):
    """Self-attention, cross-attention when there are visual tokens, MLP; a norm after each."""

    config: BertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, visual_tokens: jax.Array | None
    ) -> jax.Array:
        config = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return layer_norm(config, self.dtype, name)(x)

        attend = Attention(config, self.dtype, name="attention")
        x = norm("attention_norm", x + attend(x, x, mask))
        if visual_tokens is not None:
            attend = Attention(config, self.dtype, name="cross_attention")
            x = norm("cross_attention_norm", x + attend(x, visual_tokens, None))
        hidden = dense(config.intermediate_size, "fc1", self.dtype)(x)
        hidden = ACTIVATIONS[config.hidden_act](hidden)
        return norm("norm", x + dense(config.hidden_size, "fc2", self.dtype)(hidden))


class Bert(nn.Module):
    """The text tower; `remat` recomputes layers in the backward pass to save memory."""

    config: BertConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        normal = nn.initializers.normal(0.02)
        self.token_embedding = Embed(
            config.vocab_size, config.hidden_size, embedding_init=normal, dtype=self.dtype
        )
        self.position_embedding = self.param(
            "position_embedding", normal, (config.max_position_embeddings, config.hidden_size)
        )
        self.embedding_norm = layer_norm(config, self.dtype)
        layer = nn.remat(Layer) if self.remat else Layer
        self.layers = [layer(config, self.dtype) for _ in range(config.num_hidden_layers)]

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """int32[batch, length] -> float[batch, length, token_dim], before positions and norm."""
        return self.token_embedding(token_ids)

    def __call__(
        self,
        embeddings: jax.Array,
        attention_mask: jax.Array | None = None,
        visual_tokens: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states float[batch, length, token_dim] of word embeddings of the same shape.

        attention_mask: bool[batch, length], False at padding; None = all are words.
        visual_tokens: float[batch, tokens, encoder_hidden_size] turns on cross-attention.
        """
        length = embeddings.shape[1]
        if length > self.config.max_position_embeddings:
            raise DataError(
                f"text of {length} tokens; this text tower takes at most "
                f"{self.config.max_position_embeddings}. Truncate it when tokenising."
            )
        positions = self.position_embedding[None, :length].astype(self.dtype)
        x = self.embedding_norm(embeddings.astype(self.dtype) + positions)
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None]

        def step(layer: nn.Module, x: jax.Array) -> jax.Array:
            return split_rows(layer(x, mask, visual_tokens))

        return run(self.layers, step, split_rows(x))
