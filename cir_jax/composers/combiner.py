"""Combiner: a network fuses image and text features (CLIP4Cir, arXiv 2308.11485).

    x = [drop(relu(W_t t)); drop(relu(W_i i))]           u = drop(relu(W_c x))
    s = sigmoid(w_b drop(relu(W_a x)))                   c = W_o u + s t + (1 - s) i, of unit norm
    L = cross-entropy over the batch of scale c . target

t: un-normalised feature of the raw modification text; i: that of the reference image; targets are
of unit norm. It is trained on image triplets, with CLIP frozen: stage 2 of CLIP4Cir. CLIP tuned by
its stage 1 is a backbone like others (`--config.backbone=tuned_clip_best.pt`).

As in the released code (ABaldrati/CLIP4Cir): text comes first in x, the loss has one direction
(query to target), the scale is the constant 100, and 2560 and 5120 are the widths on every
backbone. Where the numbers are not the release's:
* It trains in fp16 with loss scaling, on features in fp16; here the towers compute in
  `config.dtype`, the network and the loss in float32.
* Its epochs leave out what does not fill a batch; durations here count examples.
* Of FashionIQ's two captions it draws "A and b", "B and a", "A" or "B" for each triplet anew:
  `example="joined_triplets"` of a stage; by default the `text` of a record is read.
* It is validated with "A and b" of FashionIQ's captions, in this order alone, which is
  `fashioniq:capitalised`; the benchmark's own protocol averages both orders.
* It keeps the checkpoint of the best mean recall on val; here the last one, or the best by one
  metric (`config.checkpoint.best`).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.composers.losses import pair_cross_entropy, pair_recall
from cir_jax.composers.phi import check_share, linear
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone
from cir_jax.sharding.constraints import each_row, split_rows
from cir_jax.weights import convert, official, torch_files

PART = "Combiner"
"""Key of the state dict in a training file; GeneCIS stores the state dict alone."""


class Fusion(nn.Module):
    """The combining network."""

    projection_dim: int = 2560
    hidden_dim: int = 5120
    dropout: float = 0.5

    @nn.compact
    def __call__(self, text: jax.Array, image: jax.Array, train: bool = False) -> jax.Array:
        """float32[..., dim] un-normalised features, twice -> float32[..., dim], not normalised."""

        def hidden(x: jax.Array, width: int, name: str) -> jax.Array:
            x = nn.relu(split_rows(linear(x.shape[-1], width, name)(x)))
            return split_rows(nn.Dropout(self.dropout, deterministic=not train)(x))

        both = jnp.concatenate(
            [
                hidden(text, self.projection_dim, "text_projection"),
                hidden(image, self.projection_dim, "image_projection"),
            ],
            axis=-1,
        )
        fused = hidden(both, self.hidden_dim, "combiner")
        share = hidden(both, self.hidden_dim, "share_hidden")
        share = nn.sigmoid(linear(self.hidden_dim, 1, "share")(share))
        added = split_rows(linear(self.hidden_dim, text.shape[-1], "output")(fused))
        return added + share * text + (1 - share) * image


NAMES = convert.Names()
for _theirs, _ours in (
    ("text_projection_layer", "text_projection"),
    ("image_projection_layer", "image_projection"),
    ("combiner_layer", "combiner"),
    ("output_layer", "output"),
    ("dynamic_scalar.0", "share_hidden"),
    ("dynamic_scalar.3", "share"),
):
    NAMES.linear(_theirs, _ours)


class Combiner(Composer):
    """`params` are those of `Fusion`."""

    trained = True
    official_format = "a file {epoch, Combiner}, such as combiner.pt, or that state dict alone"

    def __init__(
        self,
        backbone: Backbone,
        projection_dim: int = 2560,
        hidden_dim: int = 5120,
        dropout: float = 0.5,
        scale: float = 100.0,
    ):
        """scale: of the logits, in training. Raises ConfigError."""
        super().__init__(backbone)
        check_share("dropout", dropout)
        if projection_dim < 1 or hidden_dim < 1:
            raise ConfigError(
                f"projection_dim={projection_dim}, hidden_dim={hidden_dim}: expected 1 or more"
            )
        if not scale > 0:
            raise ConfigError(f"scale={scale}: expected more than 0, such as the released 100")
        self.network = Fusion(projection_dim, hidden_dim, float(dropout))
        self.scale = float(scale)

    def init(self, rng: jax.Array) -> Params:
        one = jnp.zeros((1, self.backbone.dim))
        return self.network.init(rng, one, one)["params"]

    def fuse(
        self, params: Params, frozen: Params, query: Query, rngs: jax.Array | None = None
    ) -> jax.Array:
        """Query features float32[batch, dim] of unit norm. rngs: a key per row, for dropout."""
        image = split_rows(self.reference_features(frozen, query))
        text = split_rows(self.backbone.encode_text(frozen["backbone"], query["token_ids"]))
        variables, apply = {"params": params}, self.network.apply
        if rngs is None:
            return normalise(apply(variables, text, image))
        train = each_row(lambda t, i, rng: apply(variables, t, i, True, rngs={"dropout": rng}))
        return normalise(split_rows(train(text, image, rngs)))

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: token_ids int32[batch, length]; reference_features and target_features
        float32[batch, dim], or reference_images and target_images."""
        target = normalise(self.target_features(frozen, batch))
        return {"query": self.fuse(params, frozen, batch, rngs), "target": target}

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = self.scale * rows["query"] @ rows["target"].T
        return pair_cross_entropy(logits), {"in_batch_recall": pair_recall(logits)}

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        return self.fuse(params, frozen, query)

    def read_official(self, path: Path, frozen: Params) -> Params:
        del frozen
        alone = list(torch_files.read_parts(path)) == [""]
        tensors = official.read(path, "" if alone else PART)
        return convert.to_ours(tensors, NAMES, what=str(path), dtype=np.float32)

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        del frozen
        official.write(path, {"epoch": 0, PART: convert.to_source(params, NAMES)})
