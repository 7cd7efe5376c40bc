"""CLIP's text features from a position on, what lies before it being the same every time.

The text tower is causal, so the hidden states of "a photo of" do not depend on what follows: their
keys and values are computed once (`read_prefixes`), and `encode` runs the tower on the rest alone.
An optimised pseudo-word needs no gradient before its position either. Of the last block only the
pooled row is computed. Features and gradients are those of `Clip.encode_text`, whose parameters
these functions read. They do not run its blocks: `transformer.Block` with a past was tried, and its
inversions were no faster and took more memory.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cir_jax.models.attention import attend
from cir_jax.models.clip import ClipConfig, end_positions
from cir_jax.models.transformer import ACTIVATIONS
from cir_jax.sharding.constraints import gathered, split_rows, whole


class Past(NamedTuple):
    """Of each layer, keys and values [texts, length, heads, head_dim]; lengths: int32[texts]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    lengths: jax.Array


def read_prefixes(
    config: ClipConfig, params: Any, token_ids: jax.Array, lengths: jax.Array, dtype: Any
) -> Past:
    """The states of texts' beginnings.

    token_ids: int32[texts, length], right-padded; lengths: int32[texts], 0 = nothing lies before.
    params: of the whole CLIP. dtype: of the computation.
    """
    text = params["text"]
    x = gathered(text["token_embedding"]["embedding"].astype(dtype))[token_ids]
    x = whole(x + text["position_embedding"].astype(dtype)[None, : x.shape[1]])
    mask = _causal(x.shape[1])
    keys, values = [], []
    for layer in _layers(config, text):
        query, key, value = _heads(config, layer, x)
        keys.append(key)
        values.append(value)
        x = whole(_block(config, layer, x, attend(query, key, value, mask)))
    return Past(tuple(keys), tuple(values), lengths)


def encode(
    config: ClipConfig, params: Any, past: Past, token_ids: jax.Array, embeddings: jax.Array
) -> jax.Array:
    """float32[batch, dim]: features of the texts whose beginnings are `past` (one per row).

    token_ids: int32[batch, length], the rest of each text; embeddings: float[batch, length,
    token_dim] of them, pseudo-words put in. Computes in the dtype of the embeddings.
    """
    text, dtype = params["text"], embeddings.dtype
    end = end_positions(token_ids, config.text.eos_token_id)
    # padding behind the end may reach beyond the table; nothing attends to it
    positions = past.lengths[:, None] + jnp.arange(token_ids.shape[1])[None]
    x = split_rows(
        embeddings
        + jnp.take(text["position_embedding"].astype(dtype), positions, axis=0, mode="clip")
    )
    before = jnp.arange(past.keys[0].shape[1])[None] < past.lengths[:, None]
    # [batch, 1, length, before + length]
    mask = jnp.concatenate(
        [
            jnp.broadcast_to(before[:, None, None], (len(x), 1, x.shape[1], before.shape[1])),
            jnp.broadcast_to(_causal(x.shape[1]), (len(x), 1, x.shape[1], x.shape[1])),
        ],
        axis=-1,
    )
    layers = _layers(config, text)
    for i, layer in enumerate(layers):
        query, key, value = _heads(config, layer, x)
        key = jnp.concatenate([past.keys[i].astype(dtype), key], axis=1)
        value = jnp.concatenate([past.values[i].astype(dtype), value], axis=1)
        if i == len(layers) - 1:  # of the last block the pooled row alone counts
            query, x = _row(query, end), split_rows(_row(x, end))
            mask = jnp.take_along_axis(mask, end[:, None, None, None], axis=2)
        x = split_rows(_block(config, layer, x, attend(query, key, value, mask)))
    pooled = _norm(config, text["final_norm"], x[:, 0])
    return (pooled @ params["text_projection"]["kernel"].astype(dtype)).astype(jnp.float32)


def of_rows(past: Past, rows: jax.Array) -> Past:
    """The beginning of each row, rows: int32[batch]."""
    return jax.tree.map(lambda x: x[rows], past)


def _layers(config: ClipConfig, text: Any) -> list[Any]:
    return [text[f"layers_{i}"] for i in range(config.text.num_hidden_layers)]


def _heads(config: ClipConfig, layer: Any, x: jax.Array) -> list[jax.Array]:
    """Query, key and value [batch, length, heads, head_dim] of a block."""
    normed, heads = _norm(config, layer["norm1"], x), config.text.num_attention_heads
    names = ("query", "key", "value")
    projected = (_dense(layer["attention"][name], normed) for name in names)
    return [part.reshape(*x.shape[:-1], heads, x.shape[-1] // heads) for part in projected]


def _block(config: ClipConfig, layer: Any, x: jax.Array, mixed: jax.Array) -> jax.Array:
    x = x + _dense(layer["attention"]["out"], mixed.reshape(x.shape))
    hidden = _dense(layer["fc1"], _norm(config, layer["norm2"], x))
    return x + _dense(layer["fc2"], ACTIVATIONS[config.text.hidden_act](hidden))


def _dense(layer: Any, x: jax.Array) -> jax.Array:
    bias = layer["bias"].astype(x.dtype)
    return x @ layer["kernel"].astype(x.dtype) + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _norm(config: ClipConfig, layer: Any, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(
        jnp.square(centred).mean(axis=-1, keepdims=True) + config.text.layer_norm_eps
    )
    shape = (1,) * (x.ndim - 1) + layer["scale"].shape
    normed = centred * scale * layer["scale"].reshape(shape) + layer["bias"].reshape(shape)
    return normed.astype(x.dtype)


def _row(x: jax.Array, position: jax.Array) -> jax.Array:
    """[batch, length, ...], int32[batch] -> [batch, 1, ...]."""
    return jnp.take_along_axis(x, position.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


def _causal(length: int) -> jax.Array:
    return jnp.tril(jnp.ones((length, length), bool))[None, None]
