"""T5's encoder (Raffel et al., arXiv 1910.10683), v1.0 (ReLU) and v1.1 (gated GELU), Flax Linen.

Pre-norm with RMS norms, no biases, attention logits without 1/sqrt(d), and one table of relative
position biases that all layers share. Source: Hugging Face `T5EncoderModel`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError, unknown
from cir_jax.models.layers import run
from cir_jax.models.transformer import (
    ACTIVATIONS,
    Embed,
    check_batch,
    check_numbers,
    check_token_ids,
)
from cir_jax.sharding.constraints import split_rows

_ACTIVATIONS = ACTIVATIONS | {"relu": jax.nn.relu, "silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Field names and defaults of Hugging Face's T5Config."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "relu"
    is_gated_act: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.dense_act_fn not in _ACTIVATIONS:
            raise WeightsError(unknown("activation of a T5", str(self.dense_act_fn), _ACTIVATIONS))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "T5Config":
        """From the dictionary of a Hugging Face T5 `config.json`.

        dense_act_fn and is_gated_act, where they are there, outweigh feed_forward_proj, which says
        both in one word ("gated-gelu", where the gelu is the tanh one); as in transformers.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        proj = str(values.get("feed_forward_proj", "relu"))
        gate, _, act = proj.rpartition("-")
        if gate not in ("", "gated"):
            raise WeightsError(
                f"T5 feed_forward_proj {proj!r}: expected an activation, or gated-ACTIVATION. "
                "Correct the checkpoint's config, or copy it from where the weights come from."
            )
        said = {
            "dense_act_fn": "gelu_new" if proj == "gated-gelu" else act,
            "is_gated_act": gate == "gated",
        }
        return cls(**said | {key: value for key, value in values.items() if key in known})


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """int32[length, length]: bucket of (key position - query position), half for each sign.

    Small distances have their own bucket, larger ones share logarithmically wider ones. float32 as
    in the original, where it decides the bucket at the borders.
    """
    relative = np.arange(length)[None] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    scaled = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    scaled = scaled / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    wide = np.minimum(exact + scaled.astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, wide) + half * (relative > 0)).astype(np.int32)


class Attention(nn.Module):
    """Self-attention with an additive bias; logits unscaled, softmax in float32."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        """float[batch, length, width], float[1, heads, length, length], bool[batch, 1, 1, keys]."""
        config = self.config
        inner = config.num_heads * config.d_kv
        # queries start smaller by what other transformers divide the logits by
        stds = {
            "query": (config.d_model * config.d_kv) ** -0.5,
            "key": config.d_model**-0.5,
            "value": config.d_model**-0.5,
        }
        query, key, value = (
            linear(inner, name, std, self.dtype)(x).reshape(
                *x.shape[:-1], config.num_heads, config.d_kv
            )
            for name, std in stds.items()
        )
        mixed = jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=1.0)
        mixed = mixed.reshape(*x.shape[:-1], inner)
        return linear(config.d_model, "out", inner**-0.5, self.dtype)(mixed)


class Block(nn.Module):
    """Attention, then MLP, each on a normed copy."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> jax.Array:
        config = self.config

        def norm(name: str, x: jax.Array) -> jax.Array:
            return nn.RMSNorm(config.layer_norm_epsilon, dtype=self.dtype, name=name)(x)

        def wide(name: str, x: jax.Array) -> jax.Array:
            return linear(config.d_ff, name, config.d_model**-0.5, self.dtype)(x)

        x = x + Attention(config, self.dtype, name="attention")(norm("norm1", x), bias, mask)
        y = norm("norm2", x)
        act = _ACTIVATIONS[config.dense_act_fn]
        if config.is_gated_act:
            hidden = act(wide("gate", y)) * wide("fc1", y)
        else:
            hidden = act(wide("fc1", y))
        return x + linear(config.d_model, "fc2", config.d_ff**-0.5, self.dtype)(hidden)


class T5Encoder(nn.Module):
    """Token ids -> hidden states; `remat` recomputes layers in the backward pass."""

    config: T5Config
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        normal = nn.initializers.normal
        self.token_embedding = Embed(
            config.vocab_size, config.d_model, embedding_init=normal(1.0), dtype=self.dtype
        )
        self.relative_bias = self.param(
            "relative_bias",
            normal(config.d_model**-0.5),
            (config.relative_attention_num_buckets, config.num_heads),
        )
        block = nn.remat(Block) if self.remat else Block
        self.layers = [block(config, self.dtype) for _ in range(config.num_layers)]
        self.final_norm = nn.RMSNorm(config.layer_norm_epsilon, dtype=self.dtype)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """int32[batch, length] -> float[batch, length, d_model]."""
        check_batch(token_ids, "texts")
        check_token_ids(token_ids, self.config.vocab_size)
        return self.token_embedding(token_ids)

    def encode(self, embeddings: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Token embeddings -> hidden states, float[batch, length, d_model] both.

        attention_mask: bool[batch, length], False at padding; None = all are words.
        """
        config = self.config
        buckets = relative_buckets(
            embeddings.shape[1],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        # [length, length, heads] -> [1, heads, length, length]
        bias = self.relative_bias[buckets].transpose(2, 0, 1)[None].astype(self.dtype)
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None]
        x = split_rows(embeddings.astype(self.dtype))
        x = run(self.layers, lambda layer, x: split_rows(layer(x, bias, mask)), x)
        return self.final_norm(x)

    def __call__(self, token_ids: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """int32[batch, length] -> float[batch, length, d_model]."""
        return self.encode(self.embed(token_ids), attention_mask)


def linear(features: int, name: str, std: float, dtype: Any) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.normal(std),
        name=name,
    )
