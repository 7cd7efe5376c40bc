"""Both encoders of ARTEMIS (naver/artemis): a ResNet as torchvision's, and words of a recurrent
network.

An image is the last map of a ResNet (version 1.5: a bottleneck's stride is in its 3x3 convolution),
pooled by a generalised mean (p = 3), then a linear layer; on CIRR it is a linear layer on what a
ResNet-152 of ImageNet gives after its own average pool. Batch norms are frozen, in training, too.

A text is the last states of a bidirectional GRU on embedded words, or the maximum over the states
of an LSTM, then a linear layer. Gates are PyTorch's. Nothing behind a text's end is read; the
released LSTM reads the padding up to the longest text of a batch, so that a feature there depends
on its batch: here it is that of a batch of one.

Features are those before the unit norm, as all backbones give them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cir_jax.errors import WeightsError
from cir_jax.models.resnet import FrozenBatchNorm, conv
from cir_jax.models.transformer import Embed, check_batch, check_images, check_numbers
from cir_jax.sharding.constraints import split_rows

RECURRENT = {"bigru": 3, "lstm": 4}
"""Kind of recurrent network -> gates."""

POOLS = ("gem", "mean")
"""Generalised mean with p = 3 | mean: of what stored features were made."""

_POWER, _LEAST = 3.0, 1e-6


@dataclasses.dataclass(frozen=True)
class WordConfig:
    """hidden_size: of the embedding of a word. state_size: of a recurrent network's state, in one
    direction. recurrent: a key of RECURRENT. eos_token_id: of what ends a text."""

    vocab_size: int = 3780
    hidden_size: int = 300
    recurrent: str = "bigru"
    state_size: int = 256
    max_position_embeddings: int = 128
    eos_token_id: int = 3

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.recurrent not in RECURRENT:
            raise WeightsError(
                f"recurrent={self.recurrent!r}: expected {' or '.join(RECURRENT)}. Correct the "
                "checkpoint's config."
            )

    @property
    def intermediate_size(self) -> int:
        """Numbers of a word at their most."""
        return RECURRENT[self.recurrent] * self.state_size


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """layers: blocks of the four stages; bottleneck: their kind; width: channels of the stem."""

    layers: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    width: int = 64
    pool: str = "gem"
    image_size: int = 224

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.pool not in POOLS:
            raise WeightsError(
                f"pool={self.pool!r}: expected {' or '.join(POOLS)}. Correct the config."
            )

    @property
    def hidden_size(self) -> int:
        """Channels of the last map."""
        return self.width * 8 * (4 if self.bottleneck else 1)


@dataclasses.dataclass(frozen=True)
class ArtemisConfig:
    """projection_dim: of both features."""

    text: WordConfig = WordConfig()
    vision: ResNetConfig = ResNetConfig()
    projection_dim: int = 512

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.text.recurrent == "bigru" and 2 * self.text.state_size != self.projection_dim:
            raise WeightsError(
                f"both states of a BiGRU of {self.text.state_size} are the feature of a text, of "
                f"{self.projection_dim} dimensions. Correct the checkpoint's config."
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ArtemisConfig":
        """From what `to_dict` gives."""
        vision = dict(config["vision_config"])
        return cls(
            WordConfig(**config["text_config"]),
            ResNetConfig(**vision | {"layers": tuple(vision["layers"])}),
            config["projection_dim"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a `config.json`."""
        return {
            "model_type": "artemis",
            "projection_dim": self.projection_dim,
            "text_config": dataclasses.asdict(self.text),
            "vision_config": dataclasses.asdict(self.vision) | {"layers": list(self.vision.layers)},
        }


class Block(nn.Module):
    """1x1, 3x3 with the stride, 1x1 (bottleneck), or two 3x3; the shortcut is projected where
    shapes change."""

    features: int
    stride: int
    bottleneck: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, height, width, channels] -> the next map."""
        out = self.features * (4 if self.bottleneck else 1)
        small = [(self.features, 1, 1), (self.features, 3, self.stride), (out, 1, 1)]
        plain = [(self.features, 3, self.stride), (self.features, 3, 1)]
        layers, hidden = small if self.bottleneck else plain, x
        for i, (width, size, stride) in enumerate(layers, 1):
            hidden = conv(width, size, stride, dtype=self.dtype, name=f"conv{i}")(hidden)
            hidden = FrozenBatchNorm(width, self.dtype, name=f"norm{i}")(hidden)
            hidden = jax.nn.relu(hidden) if i < len(layers) else hidden
        if self.stride > 1 or x.shape[-1] != out:
            x = conv(out, 1, self.stride, dtype=self.dtype, name="shortcut_conv")(x)
            x = FrozenBatchNorm(out, self.dtype, name="shortcut_norm")(x)
        return jax.nn.relu(hidden + x)


class ResNet(nn.Module):
    """torchvision's, without pool and classes. remat: blocks are computed twice in training."""

    config: ResNetConfig
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised float[batch, height, width, 3] -> float[batch, height / 32, width / 32,
        hidden_size]."""
        width, block = self.config.width, nn.remat(Block) if self.remat else Block
        x = conv(width, 7, 2, dtype=self.dtype, name="conv1")(images.astype(self.dtype))
        x = jax.nn.relu(FrozenBatchNorm(width, self.dtype, name="norm1")(x))
        x = split_rows(nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1))))
        for stage, count in enumerate(self.config.layers):
            for i in range(count):
                stride = 2 if stage and not i else 1
                name = f"stage{stage + 1}_{i}"
                x = split_rows(
                    block(width * 2**stage, stride, self.config.bottleneck, self.dtype, name=name)(
                        x
                    )
                )
        return x


def pooled(x: jax.Array, pool: str) -> jax.Array:
    """float[batch, height, width, channels] -> float32[batch, channels]; pool: of POOLS."""
    x = x.astype(jnp.float32)
    if pool == "mean":
        return x.mean(axis=(1, 2))
    powers = jnp.maximum(x, _LEAST) ** _POWER
    return powers.mean(axis=(1, 2)) ** (1 / _POWER)


class Recurrent(nn.Module):
    """One direction of PyTorch's GRU or LSTM, in float32."""

    kind: str
    state_size: int
    reverse: bool = False

    @nn.compact
    def __call__(self, words: jax.Array, read: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32[batch, length, width], bool[batch, length] -> the last state float32[batch,
        state_size] and all, float32[batch, length, state_size]. Words that are not read leave the
        state as it is."""
        size, gates = self.state_size, RECURRENT[self.kind]

        def uniform(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            return jax.random.uniform(rng, shape, dtype, -(size**-0.5), size**-0.5)

        layer = nn.Dense(gates * size, kernel_init=uniform, bias_init=uniform, name="input")
        inputs, start = split_rows(layer(words)), jnp.zeros((len(words), size))
        kernel = self.param("state_kernel", uniform, (size, gates * size))
        bias = self.param("state_bias", uniform, (gates * size,))

        def gru(hidden: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
            reset, update, new = jnp.split(x, 3, axis=-1)
            own = jnp.split(hidden @ kernel + bias[None], 3, axis=-1)
            reset, update = jax.nn.sigmoid(reset + own[0]), jax.nn.sigmoid(update + own[1])
            new = jnp.tanh(new + reset * own[2])
            return ((1 - update) * new + update * hidden,)

        def lstm(hidden: jax.Array, cell: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
            put, keep, new, out = jnp.split(x + hidden @ kernel + bias[None], 4, axis=-1)
            cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(put) * jnp.tanh(new)
            return jax.nn.sigmoid(out) * jnp.tanh(cell), cell

        def step(carry: tuple[jax.Array, ...], word: tuple[jax.Array, jax.Array]) -> Any:
            x, valid = word
            new = (gru if self.kind == "bigru" else lstm)(*carry, x)
            carry = tuple(
                jnp.where(valid[:, None], now, before)
                for now, before in zip(new, carry, strict=True)
            )
            return carry, carry[0]

        carry = (start,) if self.kind == "bigru" else (start, start)
        over_time = (inputs.swapaxes(0, 1), read.T)
        carry, states = jax.lax.scan(step, carry, over_time, reverse=self.reverse)
        return carry[0], split_rows(states.swapaxes(0, 1))


class Words(nn.Module):
    """The text encoder."""

    config: WordConfig
    dim: int

    def setup(self) -> None:
        config = self.config
        # N(0, 1), as PyTorch's; on the real datasets words of GloVe are put there
        init = nn.initializers.normal(1.0)
        self.embed = Embed(config.vocab_size, config.hidden_size, embedding_init=init)
        self.ahead = Recurrent(config.recurrent, config.state_size)
        if config.recurrent == "bigru":
            self.back = Recurrent(config.recurrent, config.state_size, reverse=True)
        else:
            self.projection = nn.Dense(self.dim)

    def __call__(self, words: jax.Array, read: jax.Array) -> jax.Array:
        """Embedded float32[batch, length, hidden_size], bool[batch, length] -> float32[batch, dim].

        read: which words are; the first of a text, at least.
        """
        words = split_rows(words.astype(jnp.float32))
        last, states = self.ahead(words, read)
        if self.config.recurrent == "bigru":
            return split_rows(jnp.concatenate([last, self.back(words, read)[0]], axis=-1))
        largest = jnp.where(read[..., None], states, -jnp.inf).max(axis=1)
        return split_rows(self.projection(largest))


class Artemis(nn.Module):
    """Both encoders. Texts are token ids <start> ... <end>, then padding, which is not read."""

    config: ArtemisConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        config = self.config
        self.vision = ResNet(config.vision, self.dtype, self.remat)
        self.visual_projection = nn.Dense(config.projection_dim)
        self.text = Words(config.text, config.projection_dim)

    def __call__(self, images: jax.Array, token_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.encode_image(images), self.encode_text(token_ids)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Normalised float[batch, height, width, 3] -> float32[batch, projection_dim]."""
        check_images(images, self.config.vision.image_size)
        return self.pool(self.vision(images))

    def pool(self, feature_map: jax.Array) -> jax.Array:
        """float[batch, height, width, hidden_size] -> float32[batch, projection_dim]."""
        return split_rows(self.visual_projection(pooled(feature_map, self.config.vision.pool)))

    def visual_tokens(self, images: jax.Array) -> jax.Array:
        """-> float[batch, cells, hidden_size], the last map row by row."""
        x = self.vision(images)
        return x.reshape(len(x), -1, x.shape[-1])

    def embed_tokens(self, token_ids: jax.Array) -> jax.Array:
        """int32[batch, length] -> float32[batch, length, hidden_size]."""
        return self.text.embed(token_ids)

    def encode_text(self, token_ids: jax.Array, embeddings: jax.Array | None = None) -> jax.Array:
        """int32[batch, length] -> float32[batch, projection_dim].

        embeddings: of other words than those of the ids, float[batch, length, hidden_size].
        """
        check_batch(token_ids, "texts")
        ends = token_ids == self.config.text.eos_token_id
        before = jnp.cumsum(ends, axis=1) - ends  # a text without an end is read as a whole
        words = self.embed_tokens(token_ids) if embeddings is None else embeddings
        return self.text(words, before == 0)
