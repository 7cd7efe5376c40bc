"""What the transformers of all families share: configs of a tower, its blocks, patches, checks.

Sizes and activation come from the checkpoint's own config, never from a flag: OpenAI's weights
want QuickGELU, LAION's the exact GELU, and the wrong one costs many points in silence.
Dimension names: see CONTRIBUTING.md.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import DataError, WeightsError, unknown
from cir_jax.models.attention import attend
from cir_jax.models.layers import run
from cir_jax.sharding.constraints import gathered, split_rows

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    # the same function under two names, one per code base
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One transformer tower; field names and defaults are Hugging Face's."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise WeightsError(unknown("activation", str(self.hidden_act), ACTIVATIONS))
        check_numbers(self)
        if self.hidden_size % self.num_attention_heads:
            raise WeightsError(
                f"hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={self.num_attention_heads}: correct the checkpoint's config."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TowerConfig":
        """From a tower's part of a Hugging Face `config.json`; other fields are not looked at.

        Token ids that are null are the default's; images and patches [n, n] are n.
        """
        known = {}
        for field in dataclasses.fields(cls):
            value = values.get(field.name, field.default)
            if field.name.endswith("_token_id"):
                value = value[0] if isinstance(value, list) and value else value
                value = field.default if value is None else value
            elif isinstance(value, list) and len(set(value)) == 1:
                value = value[0]
            known[field.name] = value
        return cls(**known)


def check_numbers(config: Any) -> None:
    """Raises WeightsError for fields of a dataclass that are no sizes, as of a damaged config."""
    for field in dataclasses.fields(config):
        value, low = getattr(config, field.name), 0 if field.name.endswith("_token_id") else 1
        if field.type is int and not (type(value) is int and value >= low):
            expected = f"a whole number, {low} or more"
        elif field.type is float and not (isinstance(value, int | float) and 0 < value < 1):
            expected = "a number between 0 and 1"
        else:
            continue
        raise WeightsError(
            f"{field.name}={value!r}: expected {expected}. Correct the checkpoint's config, or "
            "copy it again from where the weights come from."
        )


class Attention(nn.Module):
    """Multi-head attention, of a sequence to itself or to a `source`; softmax in float32."""

    config: TowerConfig
    dtype: Any = jnp.float32
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        source: jax.Array | None = None,
        at: jax.Array | None = None,
    ) -> jax.Array:
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        source = x if source is None else source
        std = width**-0.5
        out_std = std * (2 * self.config.num_hidden_layers) ** -0.5

        def dense(name: str, std: float) -> nn.Dense:
            return nn.Dense(
                width, dtype=self.dtype, kernel_init=nn.initializers.normal(std), name=name
            )

        asking = x if at is None else split_rows(take_position(x, at))
        # [batch, length, width] -> [batch, length, heads, head_dim]
        query, key, value = (
            dense(name, std)(of).reshape(*of.shape[:-1], heads, width // heads)
            for name, of in (("query", asking), ("key", source), ("value", source))
        )
        causal = self.causal
        if causal and at is not None:
            seen = (jnp.arange(x.shape[1])[None] <= at[:, None])[:, None, None]
            mask, causal = seen if mask is None else mask & seen, False
        mixed = attend(query, key, value, mask, causal=causal)
        return dense("out", out_std)(mixed.reshape(asking.shape))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP.

    at: int32[batch], the position of each row whose output alone is wanted, [batch, 1, width]:
    where a tower ends in one, the rest of its last block needs no computing but keys and values.
    """

    config: TowerConfig
    dtype: Any = jnp.float32
    causal: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, at: jax.Array | None = None
    ) -> jax.Array:
        config = self.config

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name=name)

        attention = Attention(config, self.dtype, self.causal, name="attention")
        mixed = attention(norm("norm1")(x), mask, at=at)
        x = (x if at is None else split_rows(take_position(x, at))) + mixed
        return x + mlp(config, self.dtype, norm("norm2")(x))


def mlp(config: TowerConfig, dtype: Any, x: jax.Array) -> jax.Array:
    """float[..., width] -> the same shape; its layers, fc1 and fc2, are the calling module's."""
    width = config.hidden_size
    hidden = nn.Dense(
        config.intermediate_size,
        dtype=dtype,
        kernel_init=nn.initializers.normal((2 * width) ** -0.5),
        name="fc1",
    )(x)
    out_std = width**-0.5 * (2 * config.num_hidden_layers) ** -0.5
    return nn.Dense(width, dtype=dtype, kernel_init=nn.initializers.normal(out_std), name="fc2")(
        ACTIVATIONS[config.hidden_act](hidden)
    )


def blocks(config: TowerConfig, dtype: Any, remat: bool, causal: bool = False) -> list[nn.Module]:
    """The blocks of a tower.

    remat: only what goes into a block is kept for the backward pass, which computes the rest again:
    same gradients, about a third more computation, far less memory. On CPU, XLA saves memory only
    with XLA_FLAGS=--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED: its default order
    computes everything again at once.
    """
    block = nn.remat(Block) if remat else Block
    return [block(config, dtype, causal) for _ in range(config.num_hidden_layers)]


def run_blocks(
    layers: Sequence[nn.Module],
    x: jax.Array,
    mask: jax.Array | None = None,
    at: jax.Array | None = None,
) -> jax.Array:
    """float[batch, length, width] -> the same, or [batch, 1, width] of the positions `at`."""
    x = run(layers[:-1], lambda layer, x: split_rows(layer(x, mask)), split_rows(x))
    return split_rows(layers[-1](x, mask, at))


def take_position(x: jax.Array, at: jax.Array) -> jax.Array:
    """float[batch, length, width], int32[batch] -> float[batch, 1, width]."""
    return jnp.take_along_axis(x, at[:, None, None], axis=1)


class Embed(nn.Embed):
    """A table of token embeddings; it moves to the rows that read it, not they to it."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """int[batch, length] -> float[batch, length, features]."""
        (table,) = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)
        return split_rows(jnp.take(gathered(table), inputs, axis=0))


class PatchEmbedding(nn.Module):
    """Convolution whose stride is its size, as one matrix product: several times faster on CPU."""

    width: int
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float[batch, height, width, 3] -> float[batch, patches, width], row by row.

        As of a convolution, pixels on the right and below that make no whole patch are left out.
        """
        size = self.patch_size
        height, width = (side // size * size for side in images.shape[1:3])
        images = images[:, :height, :width]
        batch, channels = len(images), images.shape[3]
        shape = (size, size, channels, self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), shape)
        # [batch, rows, size, columns, size, channels] -> [batch, patches, size * size * channels]
        grid = images.reshape(batch, height // size, size, width // size, size, channels)
        patches = grid.swapaxes(2, 3).reshape(batch, -1, size * size * channels)
        return patches @ kernel.astype(self.dtype).reshape(-1, self.width)


def check_token_ids(token_ids: jax.Array, vocab_size: int) -> None:
    """Raises DataError naming the first row with an id out of range.

    Under jit the ids have no values yet; there an id out of range gives NaN features.
    """
    if isinstance(token_ids, jax.core.Tracer):
        return
    ids = np.asarray(token_ids)
    if (bad := (ids < 0) | (ids >= vocab_size)).any():
        row, column = np.argwhere(bad)[0]
        raise DataError(
            f"row {row}, position {column}: token id {ids[row, column]} is not one of the model's "
            f"{vocab_size}. Use the tokenizer that comes with the weights."
        )


def check_images(images: jax.Array, size: int) -> None:
    """Raises DataError unless images are [batch, size, size, 3], with at least one of them."""
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise DataError(
            f"images of shape {images.shape}; this model takes [batch, {size}, {size}, 3]. "
            "Use the image transform that comes with the weights."
        )
    check_batch(images, "images")


def check_batch(rows: jax.Array, what: str) -> None:
    """Raises DataError for a batch of zero."""
    if not len(rows):
        raise DataError(f"a batch of no {what}: give at least one.")
