"""Layers of CompoDiff's denoising transformer (arXiv 2303.11916, Appendix A; as released).

The residual stream holds two tokens (noisy embedding, time) and may hold several samples of one
query: float[rows, samples, 2, width]. Conditions enter through cross-attention only; their keys and
values depend neither on the time nor on the sample, so they are computed once and passed in.

"tokens" is the paper's ablation instead ("Prior-like", table 5): the conditions stand before time
and embedding in one sequence, as in DALL-E 2's prior, and there is no cross-attention.

Every linear map of the transformer is without bias; every norm has a gain and no bias. Statistics,
softmax and normalised keys are float32 whatever `dtype` is (the released code raises the epsilon of
its norms to 1e-3 in half precision instead).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype

from cir_jax.models.layers import run
from cir_jax.sharding.constraints import split_rows


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Sizes; the defaults are those of the released CompoDiff-Aesthetic.

    more_text_dim: width of a second text encoder's states, 0 = there is none.
    conditioning: how conditions are read, see CONDITIONING.
    """

    embed_dim: int = 768
    text_dim: int = 1280
    depth: int = 12
    heads: int = 16
    dim_head: int = 64
    cross_heads: int = 8
    mask_size: int = 64
    timesteps: int = 1000
    more_text_dim: int = 0
    conditioning: str = "cross_attention"


CONDITIONING = ("cross_attention", "tokens")

KeysValues = tuple[jax.Array, ...]
"""Keys and values, each float[rows, length, heads, dim_head]; where some are hidden, then which are
seen: bool[rows, length]."""

Conditions = list[KeysValues] | list[jax.Array]
"""Of each layer its keys and values; for "tokens" one array, float[rows, length, width]."""

TextStates = jax.Array | tuple[jax.Array, jax.Array]
"""Hidden states of one text encoder, or of two."""

ROTARY_DIM = 32
"""Features of a head that are rotated; all of them when the head is smaller."""

COSINE_SCALE = 16.0
"""Self-attention logits = 16 cos(q, k)."""

BUCKETS, FARTHEST = 32, 128
"""Rows of the relative-position table, of which two positions and a null key read 0 and 1 alone;
the distance from which on all are alike."""

# the default of torch.nn.Linear, which the released model was built with: U(+-1 / sqrt(inputs))
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Linear(nn.Dense):
    """A dense layer that also takes its kernel as `transposed` leaves it."""

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.has_variable("params", "transposed"):
            return super().__call__(x)
        kernel = self.get_variable("params", "transposed")
        bias = self.get_variable("params", "bias") if self.use_bias else None
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))
        return y if bias is None else y + bias.reshape(*[1] * (y.ndim - 1), -1)


def transposed(params: Any) -> Any:
    """The denoiser's parameters with its kernels as [outputs, inputs].

    XLA's products on a CPU read these faster where few rows meet large kernels, as when one query
    is sampled (24 rows; `alone` of benchmarks/compodiff.py).
    """

    def of(name: str, value: Any) -> tuple[str, Any]:
        if isinstance(value, Mapping):
            return name, transposed(value)
        return ("transposed", value.T) if name == "kernel" else (name, value)

    return dict(of(name, value) for name, value in params.items())


def linear(features: int, name: str | None = None, *, bias: bool = False, dtype: Any) -> Linear:
    return Linear(features, use_bias=bias, dtype=dtype, kernel_init=_kernel_init, name=name)


def norm(name: str | None = None, *, dtype: Any) -> nn.LayerNorm:
    # the fast variance is E[x^2] - E[x]^2, which cancels
    return nn.LayerNorm(1e-5, use_bias=False, use_fast_variance=False, dtype=dtype, name=name)


def stabilised(x: jax.Array) -> jax.Array:
    """x over its (signed) largest feature, a constant to gradients; goes before the final norm."""
    return x / jax.lax.stop_gradient(x.max(axis=-1, keepdims=True))


def sinusoid(time: jax.Array, width: int) -> jax.Array:
    """int32[...] -> float32[..., width]: sines then cosines of the raw step number."""
    half = width // 2
    frequencies = np.exp(-np.log(10_000.0) * np.arange(half) / (half - 1)).astype(np.float32)
    angles = time.astype(jnp.float32)[..., None] * frequencies.reshape(*[1] * time.ndim, half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotary_frequencies(dim_head: int) -> np.ndarray:
    """float32[rotated / 2]: radians per position of each feature pair."""
    rotated = min(ROTARY_DIM, dim_head)
    return (10_000.0 ** (-np.arange(0, rotated, 2) / rotated)).astype(np.float32)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions of float32[..., position, dim_head]; pairs are neighbouring features."""
    positions, dim_head = x.shape[-2:]
    frequencies = rotary_frequencies(dim_head)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies[None]
    shape = (*[1] * (x.ndim - 2), positions, len(frequencies))
    sin, cos = np.sin(angles).reshape(shape), np.cos(angles).reshape(shape)
    rotated = 2 * len(frequencies)
    even, odd = x[..., 0:rotated:2], x[..., 1:rotated:2]
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([pairs.reshape(*x.shape[:-1], rotated), x[..., rotated:]], axis=-1)


def relative_buckets(positions: int) -> np.ndarray:
    """int32[positions, 1 + positions]: T5's causal buckets, the null key counted as position 0.

    Distances below half of BUCKETS are their own bucket, longer ones are parted by logarithm.
    """
    distance = np.arange(positions)[:, None] - np.arange(1 + positions)[None]
    distance, half = np.maximum(distance, 0), BUCKETS // 2
    far = np.log(np.maximum(distance, half) / half) / np.log(FARTHEST / half) * (BUCKETS - half)
    far = np.minimum(half + far.astype(np.int32), BUCKETS - 1)
    return np.where(distance < half, distance, far).astype(np.int32)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


class Mlp(nn.Module):
    """Linear, SiLU, Linear, SiLU, Linear with biases; hidden width 2 * width."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = split_rows(x)
        for name in ("fc1", "fc2"):
            x = linear(2 * self.width, name, bias=True, dtype=self.dtype)(x)
            x = nn.silu(split_rows(x))
        return split_rows(linear(self.width, "fc3", bias=True, dtype=self.dtype)(x))


class SelfAttention(nn.Module):
    """Cosine attention of many query heads to one shared key and value head, plus a null key.

    The released code scales q by 16 first, which the normalisation undoes: left out.
    """

    heads: int
    dim_head: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x: float[..., positions, width]; bias: float32[heads, positions, 1 + positions]."""
        dim_head, lead, width = self.dim_head, x.shape[:-1], x.shape[-1]
        x = norm("norm", dtype=self.dtype)(x)
        query = linear(self.heads * dim_head, "query", dtype=self.dtype)(x)
        query = query.reshape(*lead, self.heads, dim_head)
        key, value = jnp.split(linear(2 * dim_head, "key_value", dtype=self.dtype)(x), 2, axis=-1)
        query = rotate(jnp.swapaxes(query, -2, -3).astype(jnp.float32))
        key = rotate(key.astype(jnp.float32))
        null = self.param("null_key_value", nn.initializers.normal(1.0), (2, dim_head))
        # the null key stands first and is not rotated
        key, value = (
            jnp.concatenate(
                [jnp.broadcast_to(first.astype(rest.dtype), (*lead[:-1], 1, dim_head)), rest], -2
            )
            for first, rest in zip(null, (key, value), strict=True)
        )
        logits = COSINE_SCALE * jnp.einsum("...hid,...jd->...hij", _unit(query), _unit(key))
        weights = nn.softmax(logits + bias.reshape(*[1] * (logits.ndim - 3), *bias.shape))
        mixed = jnp.einsum("...hij,...jd->...ihd", weights.astype(value.dtype), value)
        out = linear(width, "out", dtype=self.dtype)(mixed.reshape(*lead, -1))
        return norm("out_norm", dtype=self.dtype)(out)


class CrossAttention(nn.Module):
    """Dot-product attention of tokens to the conditions and a null key shared by the heads."""

    width: int
    heads: int
    dim_head: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        inner = self.heads * self.dim_head
        self.norm = norm(dtype=self.dtype)
        self.query = linear(inner, dtype=self.dtype)
        self.key_value = linear(2 * inner, dtype=self.dtype)
        self.null_key_value = self.param(
            "null_key_value", nn.initializers.normal(1.0), (2, self.dim_head)
        )
        self.out = linear(self.width, dtype=self.dtype)
        self.out_norm = norm(dtype=self.dtype)

    def keys_values(self, *context: jax.Array) -> KeysValues:
        """Parts float[rows or 1, length, width], not normalised -> those of all, null key first.

        A part with one row (the null text) is projected once for all rows.
        """
        rows = max(part.shape[0] for part in context)

        def joined(null: jax.Array, parts: Sequence[jax.Array]) -> jax.Array:
            """The same null for all heads, then the parts."""
            null = jnp.broadcast_to(null.astype(self.dtype), (rows, 1, self.heads, self.dim_head))
            heads = [part.reshape(*part.shape[:-1], self.heads, self.dim_head) for part in parts]
            return jnp.concatenate(
                [null, *(jnp.broadcast_to(part, (rows, *part.shape[1:])) for part in heads)], axis=1
            )

        # keys and values are parted before they are joined: parting both later costs a copy, and
        # two more in the gradient
        projected = [jnp.split(self.key_value(part), 2, axis=-1) for part in context]
        keys, values = zip(*projected, strict=True)
        return joined(self.null_key_value[0], keys), joined(self.null_key_value[1], values)

    def __call__(self, x: jax.Array, keys_values: KeysValues) -> jax.Array:
        """x: float[rows, samples, tokens, width]; the samples of a row share keys and values."""
        query = self.query(self.norm(x)).reshape(x.shape[0], -1, self.heads, self.dim_head)
        keys, values, *seen = keys_values
        mask = seen[0][:, None, None] if seen else None
        mixed = jax.nn.dot_product_attention(query, keys, values, mask=mask)
        return self.out_norm(self.out(mixed.reshape(*x.shape[:-1], -1)))


class FeedForward(nn.Module):
    """Norm, Linear, SwiGLU (the gate is the second half), Linear; inner width 4 * width."""

    width: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.norm = norm(dtype=self.dtype)
        self.fc1 = linear(8 * self.width, dtype=self.dtype)
        self.fc2 = linear(self.width, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = jnp.split(self.fc1(self.norm(x)), 2, axis=-1)
        return self.fc2(value * nn.silu(gate))


class Layer(nn.Module):
    """Self-attention, cross-attention, feed-forward; each added to the stream.

    cross_heads 0 = no cross-attention.
    """

    width: int
    heads: int
    dim_head: int
    cross_heads: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.self_attention = SelfAttention(self.heads, self.dim_head, self.dtype)
        if self.cross_heads:
            self.cross_attention = CrossAttention(
                self.width, self.cross_heads, self.dim_head, self.dtype
            )
        self.feed_forward = FeedForward(self.width, self.dtype)

    def keys_values(self, *context: jax.Array) -> KeysValues:
        return self.cross_attention.keys_values(*context)

    def __call__(
        self, x: jax.Array, bias: jax.Array, keys_values: KeysValues | None = None
    ) -> jax.Array:
        x = split_rows(x + self.self_attention(x, bias))
        if keys_values is not None:
            x = split_rows(x + self.cross_attention(x, keys_values))
        return split_rows(x + self.feed_forward(x))


class Denoiser(nn.Module):
    """The denoising transformer (Appendix A); the hidden width is that of the embeddings.

    `condition` once per query, `denoise` once per step; `__call__` is both.
    """

    config: DenoiserConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c, dtype = self.config, self.dtype
        self.text_embedding = linear(c.embed_dim, bias=True, dtype=dtype)
        self.time_embedding = Mlp(c.embed_dim, dtype)
        self.mask_embedding = Mlp(c.embed_dim, dtype)
        self.relative_bias = self.param(
            "relative_bias", nn.initializers.normal(1.0), (BUCKETS, c.heads)
        )
        if c.more_text_dim:
            self.text_projection = linear(c.text_dim, bias=True, dtype=dtype)
        cross_heads = c.cross_heads if c.conditioning == "cross_attention" else 0
        self.layers = [
            Layer(c.embed_dim, c.heads, c.dim_head, cross_heads, dtype) for _ in range(c.depth)
        ]
        self.final_norm = norm(dtype=dtype)
        self.out = linear(c.embed_dim, dtype=dtype)

    def condition(
        self,
        text: TextStates,
        image: jax.Array,
        mask: jax.Array,
        visible: jax.Array | None = None,
    ) -> Conditions:
        """What does not change over the steps: per layer the keys and values of the conditions, or
        their tokens.

        text: float[rows, length, text_dim], or this and float[rows, length, more_text_dim];
        image: float[rows, embed_dim], zeros = none; mask: float[rows, mask_size, mask_size],
        zeros = none. Any of them may have one row for all. visible: bool[rows, length], which
        positions of the text are conditions; None = all.
        """
        parts = self.parts(text, image, mask)
        if self.config.conditioning == "cross_attention":
            return [self.keys_values(layer, parts, visible) for layer in self.layers]
        rows = max(part.shape[0] for part in parts)
        parts = (jnp.broadcast_to(p, (rows, *p.shape[1:])) for p in parts)
        return [jnp.concatenate(list(parts), axis=1)]

    def parts(self, text: TextStates, image: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
        """The tokens of each condition, float[rows or 1, length, embed_dim]."""
        # rows flattened; a mask of zeros is a token too: what the biases make of it
        mask = self.mask_embedding(mask.reshape(mask.shape[0], 1, -1))
        return self.text_tokens(text), image.astype(self.dtype)[:, None], mask

    def keys_values(
        self, layer: "Layer", parts: tuple[jax.Array, ...], visible: jax.Array | None
    ) -> KeysValues:
        """Of one layer."""
        projected = layer.keys_values(*parts)
        if visible is None:
            return projected
        # the null key stands before the text, image and mask behind it
        seen = jnp.pad(visible, ((0, 0), (1, 2)), constant_values=True)
        return (*projected, jnp.broadcast_to(seen, projected[0].shape[:2]))

    def text_tokens(self, text: TextStates) -> jax.Array:
        """Hidden states -> float[rows, length, embed_dim]: the second encoder's behind the first's,
        brought to their width by a perceptron of a single layer (section 5.1)."""
        if self.config.more_text_dim:
            first, second = text
            second = self.text_projection(split_rows(second))
            text = jnp.concatenate([first.astype(second.dtype), second], axis=1)
        return split_rows(self.text_embedding(split_rows(text)))

    def denoise(self, x: jax.Array, time: jax.Array, conditions: Conditions) -> jax.Array:
        """Predicted clean embeddings, float32[rows, samples, embed_dim].

        x: float[rows, samples, embed_dim], noisy; time: int32[rows, samples], or with size 1 where
        it is the same for all; conditions: from `condition`, with as many rows.
        """

        def through(tokens: jax.Array) -> jax.Array:
            bias = self.position_bias()
            return run(self.layers, lambda layer, x, own: layer(x, bias, own), tokens, conditions)

        if self.config.conditioning == "tokens":
            through = functools.partial(self._behind, before=conditions[0])
        return self._clean(x, time, through)

    def _behind(self, tokens: jax.Array, before: jax.Array) -> jax.Array:
        """float[rows, samples, 2, width] behind the tokens of the conditions, in one sequence."""
        shape = (*tokens.shape[:2], *before.shape[1:])
        before = jnp.broadcast_to(before[:, None], shape)
        tokens = split_rows(jnp.concatenate([before, tokens[:, :, ::-1]], axis=-2))
        bias = self.position_bias(tokens.shape[-2])
        return run(self.layers, lambda layer, x: layer(x, bias), tokens)[:, :, ::-1]

    def _clean(
        self, x: jax.Array, time: jax.Array, through: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        dim = x.shape[-1]
        x = split_rows(x)
        time = jnp.broadcast_to(self.embed_time(time), x.shape)
        tokens = split_rows(jnp.stack([x.astype(self.dtype), time], axis=-2))
        tokens = through(tokens)
        clean = tokens[:, :, 0].astype(jnp.float32)
        clean = self.final_norm(stabilised(clean))
        clean = split_rows(self.out(split_rows(clean)))
        return clean.astype(jnp.float32).reshape(*x.shape[:-1], dim)

    def embed_time(self, time: jax.Array) -> jax.Array:
        """int32[...] -> float[..., embed_dim]."""
        return self.time_embedding(sinusoid(time, self.config.embed_dim))

    def position_bias(self, positions: int = 2) -> jax.Array:
        """float32[heads, positions, 1 + positions]; of two, from (noisy embedding, time) to (null
        key, the same two)."""
        return self.relative_bias[relative_buckets(positions)].transpose(2, 0, 1)

    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        text: TextStates,
        image: jax.Array,
        mask: jax.Array,
        visible: jax.Array | None = None,
    ) -> jax.Array:
        if self.config.conditioning == "tokens":
            return self.denoise(x, time, self.condition(text, image, mask, visible))
        parts, bias = self.parts(text, image, mask), self.position_bias()

        def step(layer: Layer, x: jax.Array) -> jax.Array:
            return layer(x, bias, self.keys_values(layer, parts, visible))

        return self._clean(x, time, lambda tokens: run(self.layers, step, tokens))
