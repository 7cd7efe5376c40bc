"""Networks that turn features into a word, and what the methods built on one have in common.

`Phi` is the network of SEARLE and LinCIR, with the names of their checkpoints. It computes in
float32 whatever the backbone computes in: next to a text tower it costs nothing.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cir_jax.composers.base import Params, Query
from cir_jax.composers.pseudo_word import PseudoWord
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone
from cir_jax.sharding.constraints import each_row, split_rows
from cir_jax.weights import convert, official


def linear(fan_in: int, width: int, name: str | None = None, bias: bool = True) -> nn.Dense:
    """A layer that starts as PyTorch's Linear: kernel, bias uniform in +-1/sqrt(fan_in)."""
    bound = fan_in**-0.5

    def uniform(rng: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return nn.Dense(width, use_bias=bias, kernel_init=uniform, bias_init=uniform, name=name)


class Phi(nn.Module):
    """Two hidden layers of 4 x dim (or `hidden_dim`), exact GELU and dropout; linear output.

    Nothing is normalised. SEARLE's text says that each of the three layers is followed by GELU and
    dropout; the released code and the paper's Table 5 have neither after the last.
    """

    token_dim: int
    dropout: float = 0.5
    hidden_dim: int | None = None

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        """float32[..., dim] un-normalised features -> float32[..., token_dim] words."""
        x, hidden = features, self.hidden_dim or 4 * features.shape[-1]
        for name in ("fc1", "fc2"):
            x = nn.gelu(split_rows(linear(x.shape[-1], hidden, name)(x)), approximate=False)
            x = split_rows(nn.Dropout(self.dropout, deterministic=not train)(x))
        return linear(hidden, self.token_dim, "out")(x)


PHI_NAMES = convert.Names()
for _theirs, _ours in (("layers.0", "fc1"), ("layers.3", "fc2"), ("layers.6", "out")):
    PHI_NAMES.linear(_theirs, _ours)


class LearnedWord(PseudoWord):
    """A pseudo-word method whose inversion is a network: `params` are the network's.

    Its networks are Linen modules with `__call__(features, train)`.
    """

    trained = True

    def __init__(self, backbone: Backbone, network: nn.Module):
        super().__init__(backbone)
        self.network = network

    def init(self, rng: jax.Array) -> Params:
        return self.network.init(rng, jnp.zeros((1, self.backbone.dim)))["params"]

    def words(
        self, params: Params, features: jax.Array, rngs: jax.Array | None = None
    ) -> jax.Array:
        """float32[batch, dim] un-normalised features -> float32[batch, token_dim].

        rngs: a key per row, for dropout; None = no dropout.
        """
        variables = {"params": params}
        features, apply = split_rows(features), self.network.apply
        if rngs is None:
            return split_rows(apply(variables, features))
        train = each_row(lambda x, rng: apply(variables, x, True, rngs={"dropout": rng}))
        return split_rows(train(features, rngs))

    def invert(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        return self.words(params, self.reference_features(frozen, query))


class PhiWord(LearnedWord):
    """A method with `Phi`, whose checkpoints are `{"epoch": int, "Phi": state dict}`."""

    official_format = "a file {epoch, Phi}, such as SEARLE_ViT-L14.pt or lincir_large.pt"

    def __init__(self, backbone: Backbone, dropout: float = 0.5):
        check_share("dropout", dropout)
        super().__init__(backbone, Phi(backbone.token_dim, float(dropout)))

    def read_official(self, path: Path, frozen: Params) -> Params:
        del frozen
        tensors = official.read(path, "Phi")
        return convert.to_ours(tensors, PHI_NAMES, what=str(path), dtype=np.float32)

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        del frozen
        official.write(path, {"epoch": 0, "Phi": convert.to_source(params, PHI_NAMES)})


def check_share(name: str, value: float) -> None:
    """Raises ConfigError unless value is in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value}: expected a fraction from 0 to less than 1")


def check_weight(name: str, value: float) -> None:
    """Raises ConfigError for a negative weight of a loss."""
    if not value >= 0:
        raise ConfigError(f"{name}={value}: expected 0 or more")
