"""CLIP (Radford et al., arXiv 2103.00020) with a ViT or ResNet image tower, as Flax Linen.

Sizes and activation come from the checkpoint's own config, never from a flag: OpenAI's weights
want QuickGELU, LAION's the exact GELU, and the wrong one costs many points in silence.
Dimension names: see CONTRIBUTING.md. All functions take the parameter tree of `Clip.init`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import DataError, WeightsError, unknown
from cir_jax.models.attention import attend
from cir_jax.models.resnet import ResNetConfig, ResNetTower

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


class Attention(nn.Module):
    """Multi-head attention, of a sequence to itself or to a `source`; softmax in float32."""

    config: TowerConfig
    dtype: Any = jnp.float32
    causal: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, source: jax.Array | None = None
    ) -> jax.Array:
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        source = x if source is None else source
        std = width**-0.5
        out_std = std * (2 * self.config.num_hidden_layers) ** -0.5

        def dense(name: str, std: float) -> nn.Dense:
            return nn.Dense(
                width, dtype=self.dtype, kernel_init=nn.initializers.normal(std), name=name
            )

        # [batch, length, width] -> [batch, length, heads, head_dim]
        query, key, value = (
            dense(name, std)(inputs).reshape(*inputs.shape[:-1], heads, width // heads)
            for name, inputs in (("query", x), ("key", source), ("value", source))
        )
        mixed = attend(query, key, value, mask, causal=self.causal)
        return dense("out", out_std)(mixed.reshape(x.shape))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP."""

    config: TowerConfig
    dtype: Any = jnp.float32
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        config = self.config

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name=name)

        attention = Attention(config, self.dtype, self.causal, name="attention")
        x = x + attention(norm("norm1")(x), mask)
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
        patches = self.patch_embedding(images.astype(self.dtype))
        first = jnp.broadcast_to(
            self.class_embedding.astype(self.dtype), (patches.shape[0], 1, patches.shape[-1])
        )
        x = jnp.concatenate([first, patches], axis=1)
        x = self.pre_norm(x + self.position_embedding.astype(self.dtype)[None])
        for layer in self.layers:
            x = layer(x)
        return x

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
        self.token_embedding = nn.Embed(
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

    def __call__(self, embeddings: jax.Array, attention_mask: jax.Array | None = None) -> jax.Array:
        """Hidden states after the final norm: float[batch, length, token_dim] of the same shape.

        attention_mask: bool[batch, length], True where a key may be attended to; None = all.
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
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x)


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
        pooled = self.vision.pool(self.visual_tokens(images))
        # the attention pool of a ResNet ends in the joint dimension
        if isinstance(self.config.vision, ResNetConfig):
            return pooled
        return self.visual_projection(pooled)

    def embed_tokens(self, token_ids: jax.Array) -> jax.Array:
        """int32[batch, length] -> float[batch, length, token_dim]."""
        check_token_ids(token_ids, self.config.text.vocab_size)
        return self.text.embed(token_ids)

    def text_hidden_states(
        self, embeddings: jax.Array, attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """Token embeddings -> float[batch, length, token_dim], after the final norm."""
        return self.text(embeddings, attention_mask)

    def encode_text(self, token_ids: jax.Array, embeddings: jax.Array | None = None) -> jax.Array:
        """float[batch, dim] of the end token, projected.

        embeddings: float[batch, length, token_dim] in place of the embedded `token_ids`
        (pseudo-words); the ids then only say where the end token is.
        """
        check_batch(token_ids, "texts")
        if embeddings is None:
            embeddings = self.embed_tokens(token_ids)
        hidden = self.text(embeddings)
        end = end_positions(token_ids, self.config.text.eos_token_id)
        pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
        return self.text_projection(pooled)

    def __call__(self, images: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Image and text features; used to create all parameters."""
        return self.encode_image(images), self.encode_text(token_ids)


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
    rows = jnp.arange(embeddings.shape[0])[:, None]
    columns = positions[:, None] + jnp.arange(pseudo_words.shape[1])[None]
    return embeddings.at[rows, columns].set(pseudo_words.astype(embeddings.dtype))
