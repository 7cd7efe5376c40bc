"""MagicLens: image and text are two tokens of a small transformer, pooled (arXiv 2403.19651).

    m(i, t) = pool(layers([i, t])), of unit norm       query q = m(i_q, t), target p = m(i_p, "")
    L = - log exp(q . p / tau) / sum_j [exp(q . p_j / tau) + exp(q . n_j / tau)],  n = m(i_q, "")

i, t: un-normalised CLIP features of an image and a text; `layers`: four pre-norm transformer
layers; `pool`: a learned query attends to both tokens. Gallery images go the same way as queries,
with the empty text. Negatives are the other targets j of the batch, and the reference images of all
queries, their own among them (`query_negatives`): what is like the reference is not the answer.

The authors released weights and inference (google-deepmind/magiclens), neither training nor data.
* The paper trains all of CLIP: `train_backbone=True`. The towers are then parameters of the method,
  beside the pretrained ones in `frozen`, from which they start and which the baselines keep. False
  leaves CLIP as it is and trains the fusion alone, on stored features. Released weights hold
  trained towers, so they want True; a file with the backbone's own towers is read either way.
* tau is learned and starts at 0.07 (`temperature`); 1 / tau stays within 100 here, as CLIP's does.
  It is no part of the released format, whose clip/logit_scale is CLIP's own and not used.
* The paper says neither how the new layers are initialised nor whether they have dropout (here
  none). `initial="random"` is what the released layers do by themselves (LeCun). By default, "sum",
  layers start as identity and the pooler as the mean of both tokens, so that m begins as the sum of
  image and text, which is better on few triplets. Norms start as identity either way: they
  multiply by 1 + scale, and the 1 that the released code begins with would double.
* It trains with Adafactor, the towers with a tenth of the learning rate (`backbone_share` of the
  optimizer); here with AdamW.
* Its batches never say which targets fit other queries of the batch, too; nor do ours.

Of the released network, because its weights want them: attention logits are capped to +-50 (tanh);
the pooler is 4 x dim wide, and learns a scale per dimension of a head; no token knows its place.
Its CLIP hides token 0 in texts, which pads them and is a "!" inside a word; OpenAI's does not. Its
evaluation divides images by their brightest value and resizes them in floating point: here
`preprocessing="squash"`, 8 bits, and images stay as bright as they are. Its texts are those of the
protocols `circo:magiclens` and `fashioniq:magiclens`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.composers.clip_pretraining import MAX_SCALE
from cir_jax.composers.losses import pair_cross_entropy, pair_recall
from cir_jax.errors import ConfigError, WeightsError, unknown
from cir_jax.models.backbone import Backbone
from cir_jax.models.resnet import ResNetConfig
from cir_jax.sharding.constraints import split_rows
from cir_jax.weights import convert, flax_files
from cir_jax.weights import magiclens as released

INITIAL = ("sum", "random")
CAP = 50.0
POOLER_WIDTH = 4  # times dim, whatever the width of the layers is


class Norm(nn.Module):
    """Layer norm whose scale is stored as what it differs from 1 by."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = (
            self.param(name, nn.initializers.zeros, x.shape[-1:]) for name in ("scale", "bias")
        )
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)
        return x * _last(1 + scale, x) + _last(bias, x)


def _last(weight: jax.Array, x: jax.Array) -> jax.Array:
    """A weight of the last axis of x, in as many axes."""
    return weight.reshape(*[1] * (x.ndim - 1), -1)


class Attention(nn.Module):
    """Multi-head attention of `width` with capped logits.

    learned_scale: a factor per dimension of a head, softplus(0) standing for 1.
    """

    width: int
    heads: int
    learned_scale: bool = False

    @nn.compact
    def __call__(self, asking: jax.Array, source: jax.Array) -> jax.Array:
        """float32[..., n, dim], float32[..., tokens, dim] -> float32[..., n, dim]."""
        dim, head_dim = source.shape[-1], self.width // self.heads

        def heads(name: str, x: jax.Array) -> jax.Array:
            x = nn.Dense(self.width, name=name)(x)
            return x.reshape(*x.shape[:-1], self.heads, head_dim)

        query, key, value = heads("query", asking), heads("key", source), heads("value", source)
        scale = head_dim**-0.5
        if self.learned_scale:
            learned = self.param("per_dim_scale", nn.initializers.zeros, (head_dim,))
            scale = _last(scale / np.log(2) * nn.softplus(learned), query)
        query = jnp.broadcast_to(query * scale, (*key.shape[:-3], *query.shape[-3:]))
        logits = CAP * jnp.tanh(jnp.einsum("...qhd,...khd->...hqk", query, key) / CAP)
        mixed = jnp.einsum("...hqk,...khd->...qhd", nn.softmax(logits), value)
        return nn.Dense(dim, name="out")(mixed.reshape(*mixed.shape[:-2], self.width))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    heads: int
    hidden_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim, normed = x.shape[-1], Norm(name="norm1")(x)
        x = x + Attention(dim, self.heads, name="attention")(normed, normed)
        hidden = nn.relu(nn.Dense(self.hidden_dim, name="fc1")(Norm(name="norm2")(x)))
        return x + nn.Dense(dim, name="fc2")(hidden)


class Fusion(nn.Module):
    """The multimodal encoder and its pooler; hidden_dim: None = 4 x dim."""

    dim: int
    num_layers: int = 4
    heads: int = 8
    hidden_dim: int | None = None

    def setup(self) -> None:
        hidden = self.hidden_dim or 4 * self.dim
        self.layers = [Layer(self.heads, hidden) for _ in range(self.num_layers)]
        self.pooling_query = self.param(
            "pooling_query", nn.initializers.lecun_normal(), (1, self.dim)
        )
        self.pooling = Attention(POOLER_WIDTH * self.dim, self.heads, learned_scale=True)
        self.pooling_norm = Norm()

    def encode(self, image: jax.Array, text: jax.Array) -> jax.Array:
        """float32[..., dim] twice -> float32[..., 2, dim]."""
        x = split_rows(jnp.stack([image, text], axis=-2))
        for layer in self.layers:
            x = split_rows(layer(x))
        return x

    def __call__(self, image: jax.Array, text: jax.Array) -> jax.Array:
        """float32[..., dim] un-normalised features, twice -> float32[..., dim], not normalised."""
        tokens = self.encode(image, text)
        query = self.pooling_query.reshape(*[1] * (tokens.ndim - 2), 1, self.dim)
        return self.pooling_norm(split_rows(self.pooling(query, tokens)))[..., 0, :]


def as_sum(params: Params, rng: jax.Array) -> Params:
    """Parameters of `Fusion` with which it gives the mean of both tokens, without the mean over
    dimensions, of variance 1."""

    def still(part: Params) -> Params:
        return part | {"kernel": jnp.zeros_like(part["kernel"])}

    params = dict(params)
    for name in (name for name in params if name.startswith("layers_")):
        layer = params[name]
        attention = layer["attention"] | {"out": still(layer["attention"]["out"])}
        params[name] = layer | {"attention": attention, "fc2": still(layer["fc2"])}
    pooling = dict(params["pooling"])
    shape = pooling["value"]["kernel"].shape
    # orthonormal rows: what `value` widens, `out` gives back
    value = nn.initializers.orthogonal(column_axis=-1)(rng, shape)
    pooling["value"] = pooling["value"] | {"kernel": value}
    pooling["out"] = pooling["out"] | {"kernel": value.T}
    return params | {"pooling": pooling | {"query": still(pooling["query"])}}


class MagicLens(Composer):
    """`params`: fusion, logit_scale (log of 1 / tau), and backbone where that is trained."""

    trained = True
    official_format = "magic_lens_clip_base.pkl or magic_lens_clip_large.pkl"

    def __init__(
        self,
        backbone: Backbone,
        layers: int = 4,
        heads: int = 8,
        hidden_dim: int | None = None,
        temperature: float = 0.07,
        query_negatives: bool = True,
        train_backbone: bool = False,
        initial: str = "sum",
    ):
        """heads: 8 of 64 at base, 16 of 48 at large. hidden_dim: of the layers, None = 4 x dim.

        temperature: that training begins with; initial: likewise the fusion, "sum" or "random".
        Raises ConfigError.
        """
        super().__init__(backbone)
        if initial not in INITIAL:
            raise ConfigError(unknown("initial", initial, INITIAL))
        if layers < 1 or heads < 1 or backbone.dim % heads:
            raise ConfigError(
                f"layers={layers}, heads={heads}: expected 1 or more, and heads that divide the "
                f"backbone's dim={backbone.dim}"
            )
        if hidden_dim is not None and hidden_dim < 1:
            raise ConfigError(f"hidden_dim={hidden_dim}: expected 1 or more, or None")
        if not 1 / MAX_SCALE <= temperature < np.inf:
            raise ConfigError(
                f"temperature={temperature}: expected {1 / MAX_SCALE} or more, such as 0.07"
            )
        self.network = Fusion(backbone.dim, layers, heads, hidden_dim)
        self.temperature, self.query_negatives = float(temperature), query_negatives
        self.train_backbone = self.tunes_backbone = train_backbone
        self.initial = initial
        tokenizer = backbone.tokenizer
        length = backbone.context_length if backbone.reads_padding else None
        self.empty_ids = tokenizer([tokenizer.plain("")], length)
        # where 0 ends texts, it is no "!"
        self.hides_token_0 = backbone.family == "clip" and tokenizer.eos_id != 0
        if backbone.family != "clip" or isinstance(backbone.config.vision, ResNetConfig):
            self.official_format = ""  # the file holds a CLIP with a ViT

    def init(self, rng: jax.Array) -> Params:
        rng, of_sum, of_backbone = jax.random.split(rng, 3)
        one = jnp.zeros((1, self.backbone.dim))
        fusion = self.network.init(rng, one, one)["params"]
        params = {
            "fusion": as_sum(fusion, of_sum) if self.initial == "sum" else fusion,
            "logit_scale": -jnp.log(jnp.float32(self.temperature)),
        }
        if self.train_backbone:
            params["backbone"] = self.backbone.init(of_backbone)
        return params

    def start(self, rng: jax.Array, frozen: Params) -> Params:
        """With the pretrained towers."""
        params = self.init(rng)
        if self.train_backbone:
            params["backbone"] = jax.tree.map(jnp.float32, frozen["backbone"])
        return params

    def encoders(self, params: Params, frozen: Params) -> Params:
        return params["backbone"] if self.train_backbone else frozen["backbone"]

    def encode_text(self, params: Params, frozen: Params, token_ids: jax.Array) -> jax.Array:
        """Un-normalised text features float32[batch, dim]."""
        mask = token_ids != 0 if self.hides_token_0 else None
        towers = self.encoders(params, frozen)
        return split_rows(self.backbone.encode_text(towers, token_ids, attention_mask=mask))

    def empty(self, params: Params, frozen: Params, rows: int) -> jax.Array:
        """Features of the empty text, float32[rows, dim]."""
        text = self.encode_text(params, frozen, jnp.asarray(self.empty_ids))
        return split_rows(jnp.broadcast_to(text, (rows, self.backbone.dim)))

    def fuse(self, params: Params, image: jax.Array, text: jax.Array) -> jax.Array:
        """float32[..., dim] un-normalised features, twice -> float32[..., dim] of unit norm."""
        fused = self.network.apply({"params": params["fusion"]}, image, text)
        return split_rows(normalise(fused))

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: token_ids int32[batch, length]; reference_images and target_images uint8[batch,
        height, width, 3], or without `train_backbone` reference_features and target_features
        float32[batch, dim]."""
        towers = {"backbone": self.encoders(params, frozen)}
        image = split_rows(self.reference_features(towers, batch))
        target = split_rows(self.target_features(towers, batch))
        text = self.encode_text(params, frozen, batch["token_ids"])
        empty = self.empty(params, frozen, len(text))
        # side by side, for one pass
        images, texts = [image, target], [text, empty]
        if self.query_negatives:
            images, texts = [*images, image], [*texts, empty]
        fused = self.fuse(params, jnp.stack(images, axis=1), jnp.stack(texts, axis=1))
        names = ("query", "target", "reference")
        return {name: fused[:, i] for i, name in enumerate(names[: len(images)])}

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        scale = jnp.minimum(jnp.exp(params["logit_scale"]), MAX_SCALE)
        gallery = [rows[name] for name in ("target", "reference") if name in rows]
        query = scale * rows["query"]
        logits = jnp.concatenate([query @ images.T for images in gallery], axis=1)
        metrics = {"temperature": 1 / scale, "in_batch_recall": pair_recall(logits)}
        return pair_cross_entropy(logits), metrics

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        towers = {"backbone": self.encoders(params, frozen)}
        image = split_rows(self.reference_features(towers, query))
        return self.fuse(params, image, self.encode_text(params, frozen, query["token_ids"]))

    def embed_features(self, params: Params, frozen: Params, features: jax.Array) -> jax.Array:
        empty = self.empty(params, frozen, len(features))
        return self.fuse(params, split_rows(features), empty)

    def read_official(self, path: Path, frozen: Params) -> Params:
        found = flax_files.read(path)
        tensors = {name.removeprefix(released.ROOT): array for name, array in found.items()}
        fusion, clip = self._tables()
        # all of it at once, so that whatever is left over shows
        both = released.Table()
        for part, table in (("fusion", fusion), ("backbone", clip)):
            both |= table.under(part)
        params = released.to_params(tensors, both, str(path))
        params["logit_scale"] = -np.log(np.float32(self.temperature))
        if not self.train_backbone:
            self._check_towers(path, params.pop("backbone"), frozen["backbone"])
        return params

    def exports_by_torch(self, path: Path) -> bool:
        return False

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        """With the towers, trained or not, as the released code wants them."""
        fusion, clip = self._tables()
        tensors = released.to_tensors(params["fusion"], fusion)
        tensors |= released.to_tensors(self.encoders(params, frozen), clip)
        flax_files.write(path, {released.ROOT + name: x for name, x in tensors.items()})

    def _tables(self) -> tuple[released.Table, released.Table]:
        fusion = released.fusion_table(self.network.num_layers, self.network.heads)
        return fusion, released.clip_table(self.backbone.config)

    def _check_towers(self, path: Path, theirs: Params, ours: Params) -> None:
        convert.check_shapes(theirs, ours, str(path))
        expected = convert.flatten(ours)
        for name, array in convert.flatten(theirs).items():
            if not np.array_equal(array, np.asarray(expected[name], np.float32)):
                raise WeightsError(
                    f"{path}: its CLIP was trained ({'/'.join(name)} is not that of the backbone "
                    f"{self.backbone.weights_id}). Set --config.composer.train_backbone=True, "
                    "and the stage's data.features=False."
                )
