"""ARTEMIS: a text says where an image should match it, and what of the reference should stay
(ICLR 2022, openreview CVfLvQq9gLo).

    EM = <Tr(m), n(A_EM(m) * t)>        explicit matching of text and target
    IS = <n(A_IS(m) * r), n(A_IS(m) * t)>      implicit similarity of reference and target
    s = EM + IS,   L = cross-entropy over the batch of exp(temperature) s

m, r, t: unit embeddings of text, reference and target; n: unit norm; Tr: a linear layer of unit
norm; A_EM, A_IS: linear, ReLU, linear, softmax over the embedding's own dimensions.

The score is no dot product of a query and a target, but two dot products are all it takes: with
a = A(m), <u, n(a * t)> = <u * a, t> / sqrt(<a^2, t^2>). So a query is the pairs (u * a, a^2) of its
terms, one after the other, and a gallery of n images is scored by matrix products, exactly, without
an array [queries, n, dim]. A term is the same for any multiple of a or of t.

Two kinds of backbone:
* That of an official checkpoint (`cir_jax.models.artemis`: ResNet, words, BiGRU or LSTM) gives
  m, r, t itself; `embed_dim` is 0, and the networks are those of the checkpoint. With
  `train_backbone` its parameters are the method's, too, and begin as in the file; a stage's
  `optimizer.only` says which of them are trained.
* On CLIP and its relatives, as in CompoDiff's comparison (arXiv 2303.11916), whose code is not
  released: one linear layer for texts and one for images, in the place of the released encoders'
  last, on the frozen towers' features, of unit norm.

As in the released code (naver/artemis): the loss has one direction (query to target), the
temperature is learned without a bound. Where the numbers are not the release's:
* Batch norms keep their statistics; there they are those of a batch, of references and of targets
  apart, even while the ResNet is not trained.
* Embeddings of images are of unit norm everywhere; there not on CIRR, of stored features. No score
  depends on it.
* Embeddings of zeros have the score 0; there it is NaN.
* Its second stage goes on with the optimiser's moments; here stages begin anew, at the rate that is
  left. Both orders of FashionIQ's captions are triplets of its epochs; here one of them is drawn.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.composers.losses import pair_cross_entropy, pair_recall
from cir_jax.composers.phi import linear
from cir_jax.errors import ConfigError, WeightsError, unknown
from cir_jax.models.backbone import Backbone
from cir_jax.sharding.constraints import split_rows
from cir_jax.weights import artemis as artemis_weights
from cir_jax.weights import convert

VERSIONS = {"ARTEMIS": ("explicit", "implicit"), "EM-only": ("explicit",), "IS-only": ("implicit",)}
"""The released --model_version -> terms of the score. The others there, late-fusion, cross-modal
and visual-search, are the methods image_text, text_only and image_only on the same backbone."""

TEMPERATURE = 2.65926  # ln(1 / 0.07), as released
MAX_TEMPERATURE = 10.0  # of the start: scores would be multiplied by 22,000


class Attention(nn.Module):
    """Weights of the embedding's dimensions, from a text's embedding."""

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """float32[..., dim] of unit norm -> float32[..., dim], positive, of sum 1."""
        dim = text.shape[-1]
        hidden = nn.relu(split_rows(linear(dim, dim, "hidden")(text)))
        return nn.softmax(split_rows(linear(dim, dim, "out")(hidden)))


def term(direction: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """<direction, n(weights * t)> as the two vectors that `scores` takes, float32[..., dim]."""
    # of any scale: the largest weight is 1, so that no square that counts underflows
    weights = weights / jax.lax.stop_gradient(weights.max(axis=-1, keepdims=True))
    return direction * weights, jnp.square(weights)


def scores(query: jax.Array, gallery: jax.Array) -> jax.Array:
    """float32[batch, terms * 2 * dim], float32[n, dim] -> float32[batch, n]."""
    dim = gallery.shape[-1]
    squares = jnp.square(gallery).T
    total = jnp.zeros((len(query), len(gallery)))
    for start in range(0, query.shape[-1], 2 * dim):
        direction, weights = query[:, start : start + dim], query[:, start + dim : start + 2 * dim]
        norm = jnp.maximum(weights @ squares, 1e-24)
        total += direction @ gallery.T * jax.lax.rsqrt(norm)
    return total


class Matching(nn.Module):
    """The networks on top of both encoders.

    features: of the backbone. embed_dim: 0 = they are the embeddings.
    """

    features: int
    embed_dim: int = 0
    terms: tuple[str, ...] = VERSIONS["ARTEMIS"]
    start: float = TEMPERATURE

    def setup(self) -> None:
        if self.embed_dim:
            self.text_projection = linear(self.features, self.embed_dim)
            self.image_projection = linear(self.features, self.embed_dim)
        dim = self.embed_dim or self.features
        self.transform = linear(dim, dim)
        self.explicit, self.implicit = Attention(), Attention()
        self.temperature = self.param("temperature", nn.initializers.constant(self.start), (1,))

    def text(self, features: jax.Array) -> jax.Array:
        """float32[batch, features] un-normalised -> float32[batch, dim] of unit norm."""
        return normalise(split_rows(self.text_projection(features)) if self.embed_dim else features)

    def image(self, features: jax.Array) -> jax.Array:
        """The same of images."""
        if self.embed_dim:
            features = split_rows(self.image_projection(features))
        return normalise(features)

    def __call__(self, image: jax.Array, text: jax.Array) -> jax.Array:
        """Un-normalised features of reference and text, float32[batch, features] -> what `scores`
        takes, float32[batch, terms * 2 * dim]."""
        reference, text = self.image(image), self.text(text)
        matched = normalise(split_rows(self.transform(text)))
        attended = self.implicit(text)
        kept = normalise(attended * reference)
        pairs = {"explicit": term(matched, self.explicit(text)), "implicit": term(kept, attended)}
        return jnp.concatenate([x for name in self.terms for x in pairs[name]], axis=-1)


NAMES = convert.Names({"temperature": (("temperature",), "same")})
NAMES.linear("Transform_m.0", "transform")
for _theirs, _ours in (("Attention_EM", "explicit"), ("Attention_IS", "implicit")):
    NAMES.linear(f"{_theirs}.attention.0", _ours, "hidden")
    NAMES.linear(f"{_theirs}.attention.2", _ours, "out")


class Artemis(Composer):
    """`params` are those of `Matching`; with `train_backbone` under "networks", beside "backbone",
    the backbone's."""

    trained = True
    official_format = (
        "a checkpoint {args, epoch, best_score, model, optimizer}, such as model_best.pth, which "
        "is the backbone, too"
    )

    def __init__(
        self,
        backbone: Backbone,
        embed_dim: int = 512,
        version: str = "ARTEMIS",
        train_backbone: bool = False,
        temperature: float = TEMPERATURE,
    ):
        """embed_dim: of the projections on top of the backbone; 0 = none. version: which terms the
        score has, a key of VERSIONS. train_backbone: the backbone's parameters are the method's,
        too. temperature: its start, the logarithm of what scores are multiplied by. Raises
        ConfigError."""
        super().__init__(backbone)
        self.tunes_backbone = train_backbone
        if not 0 <= temperature <= MAX_TEMPERATURE:
            raise ConfigError(
                f"temperature={temperature}: expected 0 to {MAX_TEMPERATURE}, the logarithm of "
                f"what scores are multiplied by, such as the released {TEMPERATURE}"
            )
        if embed_dim < 0:
            raise ConfigError(f"embed_dim={embed_dim}: expected 1 or more, or 0 for none")
        if version not in VERSIONS:
            raise ConfigError(unknown("version", version, VERSIONS))
        self.version = version
        self.network = Matching(backbone.dim, embed_dim, VERSIONS[version], float(temperature))
        if backbone.family != "artemis" or embed_dim:
            self.official_format = ""

    def init(self, rng: jax.Array) -> Params:
        one = jnp.zeros((1, self.backbone.dim))
        networks = self.network.init(rng, one, one)["params"]
        if not self.tunes_backbone:
            return networks
        return {"networks": networks, "backbone": self.backbone.init(rng)}

    def start(self, rng: jax.Array, frozen: Params) -> Params:
        """With the backbone as it is."""
        params = self.init(rng)
        return self._beside(params["networks"], frozen) if self.tunes_backbone else params

    def _beside(self, networks: Params, frozen: Params) -> Params:
        return {"networks": networks, "backbone": frozen["backbone"]}

    def _variables(self, params: Params) -> Params:
        return {"params": params["networks"] if self.tunes_backbone else params}

    def encoders(self, params: Params, frozen: Params) -> Params:
        return params["backbone"] if self.tunes_backbone else frozen["backbone"]

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        """What `scores` takes: float32[batch, terms * 2 * dim]."""
        encoders = self.encoders(params, frozen)
        image = split_rows(self.reference_features({"backbone": encoders}, query))
        text = split_rows(self.backbone.encode_text(encoders, query["token_ids"]))
        return split_rows(self.network.apply(self._variables(params), image, text))

    def embed_features(self, params: Params, frozen: Params, features: jax.Array) -> jax.Array:
        del frozen
        return self.network.apply(self._variables(params), features, method="image")

    def score(self, params: Params, query: jax.Array, gallery: jax.Array) -> jax.Array:
        del params
        return scores(query, gallery)

    def joined(self, queries: np.ndarray) -> np.ndarray:
        """As more terms, so that the score is the mean of the texts' scores.

        [queries, texts, terms * 2 * dim] -> [queries, texts * terms * 2 * dim].
        """
        texts = queries.any(axis=-1).sum(axis=1)
        pairs = queries.reshape(*queries.shape[:2], len(self.network.terms), 2, -1).copy()
        pairs[:, :, :, 0] /= texts[:, None, None, None]
        return pairs.reshape(len(queries), -1)

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: token_ids int32[batch, length]; reference_features and target_features
        float32[batch, dim], or reference_images and target_images."""
        encoders = {"backbone": self.encoders(params, frozen)}
        target = self.embed_features(params, frozen, self.target_features(encoders, batch))
        return {"query": self.compose(params, frozen, batch, rngs), "target": target}

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        scale = jnp.exp(self._variables(params)["params"]["temperature"][0])
        logits = scale * scores(rows["query"], rows["target"])
        return pair_cross_entropy(logits), {"in_batch_recall": pair_recall(logits), "scale": scale}

    def read_official(self, path: Path, frozen: Params) -> Params:
        tensors, version = artemis_weights.read_networks(path, frozen["backbone"], self.backbone)
        if version != self.version:
            raise WeightsError(
                f"{path}: its args say model_version={version!r}, config.composer.version is "
                f"{self.version!r}. Set --config.composer.version={version}."
                if version in VERSIONS
                else f"{path}: its args say model_version={version!r}, expected "
                f"{' or '.join(VERSIONS)}; late-fusion, cross-modal and visual-search are the "
                "methods image_text, text_only and image_only on this backbone."
            )
        networks = convert.to_ours(tensors, NAMES, what=str(path), dtype=np.float32)
        return self._beside(networks, frozen) if self.tunes_backbone else networks

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        tensors = convert.to_source(self._variables(params)["params"], NAMES)
        encoders = self.encoders(params, frozen)
        artemis_weights.write_checkpoint(path, encoders, self.backbone, tensors, self.version)
