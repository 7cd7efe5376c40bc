"""ISA: a light encoder makes a sentence of the reference image (Image2Sentence, ICLR 2024).

    F = light encoder(augmented image)                                            feature map
    a_hw = softmax_l(w_l . f_hw),   z_l = sum_hw a_l f / sum_hw a_l               (1), (2)
    Z = Z + attention(Z, Z),  Z = Z + FFN(Z)                                      (3)
    Z = Z + attention(Z, F),  Z = Z + FFN(Z),  U = Z W_p                          (4)
    t = text feature of "a photo of u_1 ... u_L",  v, F^v: image feature and map of the large tower
    L = GCD + LAR: InfoNCE(t, v) + matching of (U, F^v)                           (5) - (8)

A query is "a photo of u_1 ... u_L that {text}". Gallery images are seen by the large tower, which
is frozen, as the text tower is: asymmetric retrieval. Symmetric: the map is the large tower's own.

No code was released. What the paper leaves open is a setting, or done so:
* `width`: the map is projected to it before (1). Table 1's parameters want that: with 256, and the
  two FFNs 256 and 512 wide, encoder and learner have the printed 5.3, 5.0, 3.5 and 5.5 million
  (EfficientNet-B2: 9.1, printed 8.5). 0 = the equations as printed, of the map's own width.
* (3) and (4) are of one head without norms, scaled by width^-0.5. Their softmax "over L" is not
  consistent in (4), where keys are the map's: here it is over the keys. `softmax="tokens"` is the
  literal one, over the tokens. The FFNs' sigma is GELU.
* `dropout` of the tokens, before W_p; none by default (the group's earlier module has 0.1).
* The temperature of GCD: 0.07, with which BLIP begins.
* Pairs that do not match, for LAR: drawn as BLIP does (`composers.matching`); `negatives="random"`
  draws any other row.
* The augmentation: RandomResizedCrop (`stage.NAME.data.crop`), of the query's side alone.
* LLM text regularisation (Table 14) is SEARLE's phrase loss (`composers.phrases`), whose concept is
  replaced by the sentence.
Of the ablations: mapping="mlp" (Table 5) makes one word of the pooled map, as Pic2Word does;
self_attention and cross_attention False are Tables 18 to 20; `train_tower` trains a copy of the
large tower for queries (Table 13).

Batch norms of a light encoder that is trained see the statistics of the global batch (of a part of
it, with microbatches); the running ones are `params["statistics"]`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cir_jax.composers.base import Params, Query, normalise
from cir_jax.composers.losses import info_nce, pair_recall
from cir_jax.composers.matching import matching_loss
from cir_jax.composers.phi import Phi, check_share, check_weight, linear
from cir_jax.composers.phrases import Phrases, phrase_loss
from cir_jax.composers.pseudo_word import PseudoWord
from cir_jax.errors import ConfigError, unknown
from cir_jax.models import subtree
from cir_jax.models.backbone import Backbone
from cir_jax.models.encoders import ImageEncoder
from cir_jax.models.resnet import ResNetConfig
from cir_jax.sharding.constraints import each_row, split_rows
from cir_jax.weights import encoders

MAPPINGS = ("tokens", "mlp")
SOFTMAX = {"keys": -1, "tokens": -2}
NEGATIVES = ("hard", "random")
VISION = "vision/.*"


class Attention(nn.Module):
    """From tokens to a context, one head; softmax over `axis` of [..., tokens, keys]."""

    axis: int

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32[..., tokens, dim], float32[..., keys, dim] -> the mix, and its weights."""
        dim = x.shape[-1]
        query, key, value = (
            linear(dim, dim, name, bias=False)(given)
            for name, given in (("query", x), ("key", context), ("value", context))
        )
        query, key, value = split_rows((query, key, value))
        logits = query @ key.swapaxes(-1, -2) * dim**-0.5
        weights = nn.softmax(logits, axis=self.axis)
        return split_rows(weights @ value), weights


class TokenLearner(nn.Module):
    """The adaptive token learner. hidden: of the two FFNs; width: of attention, 0 = the map's."""

    tokens: int
    token_dim: int
    width: int = 256
    hidden: tuple[int, int] = (256, 512)
    self_attention: bool = True
    cross_attention: bool = True
    softmax: str = "keys"
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, feature_map: jax.Array, rngs: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """float32[batch, pixels, channels] -> float32[batch, tokens, token_dim], and what was
        attended to: "groups" and "cross", float32[batch, tokens, pixels]. rngs: a key per row."""
        f = feature_map
        if self.width:
            f = split_rows(linear(f.shape[-1], self.width, "reduce")(f))
        dim, axis = f.shape[-1], SOFTMAX[self.softmax]

        def feed_forward(x: jax.Array, hidden: int, name: str) -> jax.Array:
            inner = nn.gelu(linear(dim, hidden, f"{name}1")(x), approximate=False)
            return split_rows(x + linear(hidden, dim, f"{name}2")(split_rows(inner)))

        logits = split_rows(linear(dim, self.tokens, "groups", bias=False)(f))
        groups = nn.softmax(logits).swapaxes(-1, -2)
        maps = {"groups": groups}
        z = split_rows(groups @ f / groups.sum(axis=-1, keepdims=True))
        if self.self_attention:
            z = z + Attention(axis, name="self")(z, z)[0]
            z = feed_forward(z, self.hidden[0], "refine")
        if self.cross_attention:
            mix, maps["cross"] = Attention(axis, name="cross")(z, f)
            z = feed_forward(z + mix, self.hidden[1], "select")
        z = dropped(z, self.dropout, rngs)
        return split_rows(linear(dim, self.token_dim, "out")(z)), maps


class PooledWord(nn.Module):
    """One word of the pooled map: the ablation."""

    token_dim: int
    hidden_dim: int = 512
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, feature_map: jax.Array, rngs: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """float32[batch, pixels, channels] -> float32[batch, 1, token_dim], and no maps."""
        pooled = dropped(feature_map.mean(axis=1), self.dropout, rngs)
        return Phi(self.token_dim, 0.0, self.hidden_dim, name="phi")(pooled)[:, None], {}


def dropped(x: jax.Array, share: float, rngs: jax.Array | None) -> jax.Array:
    """Dropout of float32[batch, ...] by a key per row; None = not in training."""
    if rngs is None or not share:
        return x
    kept = each_row(lambda rng: jax.random.bernoulli(rng, 1 - share, x.shape[1:]))(rngs)
    return split_rows(jnp.where(split_rows(kept), x / (1 - share), 0))


class Isa(PseudoWord):
    """`params`: learner; of a light encoder encoder and statistics; with train_tower vision."""

    trained = True
    reads_images = True

    def __init__(
        self,
        backbone: Backbone,
        query_encoder: str = "efficientnet_b2",
        pretrained: bool = True,
        train_tower: bool = False,
        tokens: int = 6,
        mapping: str = "tokens",
        width: int = 256,
        hidden: tuple[int, int] = (256, 512),
        self_attention: bool = True,
        cross_attention: bool = True,
        softmax: str = "keys",
        dropout: float = 0.0,
        temperature: float = 0.07,
        global_weight: float = 1.0,
        local_weight: float = 1.0,
        negatives: str = "hard",
        phrase_weight: float = 0.0,
        phrases: str = "",
        top_k: int = 15,
    ):
        """query_encoder: timm's name, a directory or a file of a light encoder; "" = the backbone's
        own image tower (symmetric), which train_tower trains for queries. pretrained: False starts
        the light encoder, a name then, from random weights. global_weight, local_weight,
        phrase_weight: of GCD, LAR and the text regularisation, whose `phrases` are a phrase book.
        Raises ConfigError, and WeightsError for weights of the light encoder."""
        for name, given, known in (
            ("mapping", mapping, MAPPINGS),
            ("softmax", softmax, SOFTMAX),
            ("negatives", negatives, NEGATIVES),
        ):
            if given not in known:
                raise ConfigError(unknown(name, given, known))
        if tokens < 1 or width < 0 or len(hidden) != 2 or min(hidden) < 1:
            raise ConfigError(
                f"tokens={tokens}, width={width}, hidden={hidden}: expected 1 or more, 0 or more, "
                "and two sizes"
            )
        check_share("dropout", dropout)
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature}: expected more than 0, such as 0.07")
        weights = {"global": global_weight, "local": local_weight, "phrase": phrase_weight}
        for name, weight in weights.items():
            check_weight(f"{name}_weight", weight)
        if not any(weights.values()):
            raise ConfigError("global_weight, local_weight, phrase_weight: all 0, nothing to learn")
        if local_weight and backbone.family != "blip":
            raise ConfigError(
                f"local_weight={local_weight}: LAR needs the matching encoder of a BLIP, and "
                f"backbone {backbone.weights_id} is a {backbone.family.upper()}. Set "
                "--config.composer.local_weight=0, or --config.backbone to a BLIP."
            )
        if not query_encoder and isinstance(backbone.config.vision, ResNetConfig):
            raise ConfigError(
                f"query_encoder='': backbone {backbone.weights_id} is a ResNet, whose tower gives "
                "no tokens. Give a light encoder, or a ViT."
            )
        if train_tower and query_encoder:
            raise ConfigError(
                f"train_tower=True trains the backbone's own tower, and query_encoder="
                f"{query_encoder!r} is another. Set one of them alone."
            )
        super().__init__(backbone, words=tokens if mapping == "tokens" else 1)
        self.encoder, self.initial = _light(query_encoder, pretrained)
        self.train_tower = train_tower
        self.learner: nn.Module = PooledWord(backbone.token_dim, dropout=float(dropout))
        if mapping == "tokens":
            self.learner = TokenLearner(
                tokens,
                backbone.token_dim,
                width,
                tuple(hidden),
                self_attention,
                cross_attention,
                softmax,
                float(dropout),
            )
        self.scale, self.weights, self.negatives = 1 / float(temperature), weights, negatives
        self.reads_tokens = bool(local_weight)
        self.phrases = None
        if phrase_weight:
            if not phrases:
                raise ConfigError(
                    f"phrase_weight={phrase_weight} needs phrases: set --config.composer.phrases "
                    "to a phrase book, such as launch/phrases.py writes"
                )
            self.phrases = Phrases.read(phrases, backbone, top_k, words=self.words_per_image)
        self.training_ids = backbone.tokenizer([self.prompt("")])

    @classmethod
    def for_others(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Without the weights that the light encoder began with, and the regularisation."""
        found = {"query_encoder": "efficientnet_b2", "pretrained": True} | dict(settings)
        name = found["query_encoder"]
        if name and found["pretrained"]:
            encoders.untrained(name)  # raises for a directory or file: only a name says what it is
        losses = [found.get(f"{loss}_weight", 1.0) for loss in ("global", "local")]
        found |= {"pretrained": False, "phrases": "", "phrase_weight": 0.0}
        return found | ({} if any(losses) else {"global_weight": 1.0})

    def contents(self) -> dict[str, str]:
        return {"query_encoder": self.encoder.weights_id} if self.encoder else {}

    def freeze(self, backbone_params: Params, shapes_only: bool = False) -> Params:
        frozen = super().freeze(backbone_params, shapes_only)
        if self.phrases is None:
            return frozen
        tables = self.phrases.freeze(self.backbone, backbone_params, 1 << 16, shapes_only)
        return frozen | {"phrases": tables}

    def init(self, rng: jax.Array) -> Params:
        rng, of_encoder = jax.random.split(rng)
        size = self.backbone.config.vision.image_size
        params = {}
        if self.encoder is not None:
            images = jnp.zeros((1, size, size, 3))
            made = self.encoder.model.init(of_encoder, images)
            params = {"encoder": made["params"], "statistics": made["batch_stats"]}
            channels = self.encoder.dim
        else:
            channels = self.backbone.config.vision.hidden_size
            if self.train_tower:
                params = {"vision": subtree.chosen(self.backbone.init(of_encoder), VISION)}
        params["learner"] = self.learner.init(rng, jnp.zeros((1, 4, channels)))["params"]
        return params

    def start(self, rng: jax.Array, frozen: Params) -> Params:
        """With the light encoder's own weights, or the backbone's tower."""
        params = self.init(rng)
        if self.initial is not None:
            params |= {
                "encoder": self.initial["params"],
                "statistics": self.initial["batch_stats"],
            }
        if self.train_tower:
            params["vision"] = subtree.chosen(frozen["backbone"], VISION)
        return params

    def settled(self, params: Params, metrics: Params) -> tuple[Params, Params]:
        metrics = dict(metrics)
        statistics = metrics.pop("statistics", None)
        return (params if statistics is None else params | {"statistics": statistics}), metrics

    def feature_map(self, params: Params, frozen: Params, images: jax.Array) -> jax.Array:
        """uint8[batch, height, width, 3] -> float32[batch, pixels, channels], row by row."""
        if self.encoder is None:
            tower = frozen["backbone"]
            if self.train_tower:
                tower = subtree.put(tower, params["vision"])
            # of a ViT whose first token is the class
            tokens = self.backbone.visual_tokens(tower, images)
            return tokens[:, tokens.shape[1] - self._pixels(images) :].astype(jnp.float32)
        return _flat(self.encoder.feature_map(_variables(params), images))

    def _pixels(self, images: jax.Array) -> int:
        patch = self.backbone.config.vision.patch_size
        return (images.shape[1] // patch) * (images.shape[2] // patch)

    def sentence(
        self, params: Params, feature_map: jax.Array, rngs: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """float32[batch, pixels, channels] -> U, float32[batch, tokens, token_dim], and its maps of
        attention, float32[batch, tokens, pixels] each. rngs: a key per row, for dropout."""
        return self.learner.apply({"params": params["learner"]}, split_rows(feature_map), rngs)

    def invert(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        images = query["reference_images"]
        return self.sentence(params, self.feature_map(params, frozen, images))[0]

    def attention(self, params: Params, frozen: Params, images: jax.Array) -> dict[str, jax.Array]:
        """What the tokens of each image attend to: float32[batch, tokens, height, width] by the
        groups of (1) and by the cross-attention of (4), for mapping="tokens"."""
        flat = self.feature_map(params, frozen, images)
        high = round((flat.shape[1] * images.shape[1] / images.shape[2]) ** 0.5)
        maps = self.sentence(params, flat)[1]
        return {name: x.reshape(*x.shape[:2], high, -1) for name, x in maps.items()}

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: reference_images uint8[batch, height, width, 3], augmented; of the same without,
        target_features float32[batch, dim] and target_tokens float32[batch, tokens, width], or
        target_images."""
        backbone, rows = frozen["backbone"], {}
        images = batch["reference_images"]
        if self.encoder is None:
            feature_map = self.feature_map(params, frozen, images)
        else:
            made, statistics = self.encoder.train_feature_map(_variables(params), images)
            feature_map = _flat(made)
            # of the batch, or of this part of it: as rows, which parts are made of
            rows["statistics"] = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (len(images), *x.shape)), statistics
            )
        rows["words"], _ = self.sentence(params, feature_map, rngs)
        image = jax.lax.stop_gradient(self._large(backbone, batch))
        rows["image"] = normalise(image["features"])
        if self.weights["local"]:
            rows["tokens"] = image["tokens"]
        rows["text"] = normalise(
            self.text_features(backbone, self._ids(len(images)), rows["words"])
        )
        if self.phrases is not None:
            top = self.phrases.associate(frozen["phrases"], image["features"])
            row = self.phrases.draw_concept_first(frozen["phrases"], top, rngs)
            rows["phrase"] = phrase_loss(self, self.phrases, frozen, row, rows["words"])
        return rows

    def _large(self, backbone: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """v and F^v."""
        if "target_features" in batch:
            return {"features": batch["target_features"], "tokens": batch.get("target_tokens")}
        images = batch["target_images"]
        if not self.weights["local"]:
            return {"features": self.backbone.encode_image(backbone, images), "tokens": None}
        tokens = self.backbone.visual_tokens(backbone, images)
        return {"features": self.backbone.project_image(backbone, tokens), "tokens": tokens}

    def _ids(self, rows: int) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(self.training_ids), (rows, self.training_ids.shape[1]))

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: dict[str, jax.Array],
        rng: jax.Array,
        microbatches: int = 1,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        rng, drawn = jax.random.split(rng)
        rows = self.rows(params, frozen, batch, rng, microbatches)
        scores = rows["text"] @ rows["image"].T
        metrics = {"in_batch_recall": pair_recall(scores)}
        terms = {"global": info_nce(rows["image"], rows["text"], self.scale)}
        if self.weights["local"]:
            # of equal scores, any other row
            logits = self.scale * scores if self.negatives == "hard" else jnp.zeros_like(scores)
            terms["local"], metrics["matching_accuracy"] = matching_loss(
                functools.partial(self._match, frozen["backbone"]),
                rows["words"],
                rows["tokens"],
                logits,
                drawn,
                microbatches,
            )
        if "phrase" in rows:
            terms["phrase"] = rows["phrase"].mean()
        if "statistics" in rows:
            metrics["statistics"] = jax.tree.map(
                lambda x: jax.lax.stop_gradient(x.mean(axis=0)), rows["statistics"]
            )
        total = sum(self.weights[name] * term for name, term in terms.items())
        return total, metrics | terms

    def _match(self, backbone: Params, words: jax.Array, tokens: jax.Array) -> jax.Array:
        ids = self._ids(len(words))
        embeddings = self.embed_words(backbone, ids, words)
        return self.backbone.match(backbone, ids, tokens, embeddings)


def _variables(params: Params) -> Params:
    return {"params": params["encoder"], "batch_stats": params["statistics"]}


def _flat(feature_map: jax.Array) -> jax.Array:
    """float[batch, height, width, channels] -> float32[batch, pixels, channels]."""
    batch, *_, channels = feature_map.shape
    return feature_map.reshape(batch, -1, channels).astype(jnp.float32)


def _light(name: str, pretrained: bool) -> tuple[ImageEncoder | None, Params | None]:
    """The light encoder, and its weights where they are not random."""
    if not name:
        return None, None
    if pretrained:
        return _loaded(name)
    return encoders.untrained(name), None


_loaded: Callable[[str], tuple[ImageEncoder, Params]] = functools.lru_cache(maxsize=2)(
    encoders.load_encoder
)  # an experiment builds its composer more than once
