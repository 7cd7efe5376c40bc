"""Pic2Word: an image feature becomes the word `*` of a prompt (arXiv 2302.03084).

    L = InfoNCE(image, text("a photo of *", * = Im2Text(image))),  with CLIP's own frozen scale

over the global batch, both directions averaged; images alone, no texts. A query is
"a photo of * , {modification text}".

As in the released code (google-research/composed_image_retrieval) the image feature goes into the
network un-normalised. The release inserts the word before the end token of "a photo of", and drops
out before ReLU: that changes nothing. Where the numbers are not the release's:
* Each of its W devices has the whole loss, of features gathered from all, but the gradient of its
  own rows alone; the mean over devices is then 1/W of the gradient. Adam divides that factor out
  again except for its epsilon, so the release takes the steps of eps = W x 1e-6 on the full
  gradient: shorter ones where gradients are of that size. Here the gradient is that of the loss, so
  that nothing depends on the devices. The stage's `optimizer.eps` of W x 1e-6 is the release on W
  devices, exactly (unless `clip_norm` is set); the presets *_code have that of 8.
* It computes in fp16 with loss scaling, the network too; here the towers in `config.dtype`, the
  network and the loss in float32.
* Its epochs leave out what does not fill a batch; durations here count examples.
* On FashionIQ it joins the two captions in one order only, "{second} and {first}"; here the
  benchmark's protocol averages both orders, as papers that re-evaluate Pic2Word do. The release's
  is `fashioniq:reversed`.

Defaults are the released ones: two hidden layers (`n_layer`), 512 wide on every backbone, dropout
0.1.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cir_jax.composers.base import Params, normalise
from cir_jax.composers.losses import info_nce, pair_recall
from cir_jax.composers.phi import LearnedWord, check_share, linear
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.models.backbone import Backbone
from cir_jax.sharding.constraints import split_rows
from cir_jax.weights import convert, official, open_clip


class Im2Text(nn.Module):
    """The mapping network."""

    token_dim: int
    hidden_dim: int = 512
    dropout: float = 0.1
    n_layer: int = 2

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        """float32[..., dim] un-normalised features -> float32[..., token_dim] words."""
        x = features
        for i in range(self.n_layer):
            x = split_rows(linear(x.shape[-1], self.hidden_dim, f"fc{i + 1}")(x))
            x = nn.relu(nn.Dropout(self.dropout, deterministic=not train)(x))
        return linear(self.hidden_dim, self.token_dim, "out")(x)


def names(n_layer: int) -> convert.Names:
    """Name table of the released network with so many hidden layers."""
    table = convert.Names()
    for i in range(n_layer):
        table.linear(f"layers.{i}.0", f"fc{i + 1}")
    table.linear("fc_out", "out")
    return table


class Pic2Word(LearnedWord):
    """`params` are the network's."""

    placeholder = "*"
    inference_settings = ("image_weight", "link")
    official_format = "a file {epoch, name, state_dict, state_dict_img2text}"

    def __init__(
        self,
        backbone: Backbone,
        hidden_dim: int = 512,
        dropout: float = 0.1,
        scale: float = 0.0,
        link: str = ",",
        n_layer: int = 2,
    ):
        """scale: of the logits; 0 = exp(logit_scale) of the backbone. n_layer: hidden layers.

        link: between `*` and the text of a query; "that" makes it SEARLE's prompt, with which later
        papers evaluate Pic2Word.
        """
        check_share("dropout", dropout)
        if hidden_dim < 1 or n_layer < 1 or scale < 0:
            raise ConfigError(
                f"hidden_dim={hidden_dim}, n_layer={n_layer}, scale={scale}: expected 1 or more, "
                "1 or more, 0 or more"
            )
        if not scale and backbone.family == "blip":
            raise ConfigError(
                f"scale=0: backbone {backbone.weights_id} has no scale of its own. Give one, such "
                "as --config.composer.scale=100."
            )
        network = Im2Text(backbone.token_dim, hidden_dim, float(dropout), n_layer)
        super().__init__(backbone, network)
        self.names = names(n_layer)
        self.scale, self.template = float(scale), f"a photo of * {link} {{}}"
        if backbone.family != "clip":
            self.official_format = ""  # the file holds a CLIP
        self.training_ids = backbone.tokenizer([self.prompt("")])

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: reference_images uint8[batch, height, width, 3], or reference_features."""
        image = jax.lax.stop_gradient(self.reference_features(frozen, batch))
        words = self.words(params, image, rngs)
        ids = jnp.broadcast_to(
            jnp.asarray(self.training_ids), (len(words), self.training_ids.shape[1])
        )
        text = self.text_features(frozen["backbone"], ids, words)
        scale = self.scale or jnp.exp(frozen["backbone"]["logit_scale"])
        return {"image": scale * normalise(image), "text": normalise(text)}

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        recall = pair_recall(rows["text"] @ rows["image"].T)
        return info_nce(rows["image"], rows["text"], 1.0), {"in_batch_recall": recall}

    def read_official(self, path: Path, frozen: Params) -> Params:
        """The file holds the whole CLIP beside the network: it must be the backbone's."""
        tensors = official.read(path, "state_dict_img2text", ("state_dict", "optimizer"))
        layers = sum(name.endswith(".0.weight") for name in tensors)
        if layers != self.network.n_layer:
            raise WeightsError(
                f"{path}: a network of {layers} hidden layers, this one has "
                f"{self.network.n_layer}. Set --config.composer.n_layer={layers}."
            )
        self._check_clip(path, frozen)
        return convert.to_ours(tensors, self.names, what=str(path), dtype=np.float32)

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        """With the CLIP and the prefix of DataParallel, which the released code wants."""
        parts = {
            "state_dict": convert.to_source(
                frozen["backbone"], open_clip.names(self.backbone.config)
            ),
            "state_dict_img2text": convert.to_source(params, self.names),
        }
        prefixed = {
            key: {f"module.{name}": tensor for name, tensor in tensors.items()}
            for key, tensors in parts.items()
        }
        official.write(path, {"epoch": 0, "name": "cir_jax", **prefixed})

    def _check_clip(self, path: Path, frozen: Params) -> None:
        table = open_clip.names(self.backbone.config)
        theirs = official.read(path, "state_dict", ("state_dict_img2text", "optimizer"))
        what = f"{path}, state_dict"
        tree = convert.to_ours(theirs, table, ignore=open_clip.IGNORE, what=what, dtype=np.float32)
        convert.check_shapes(tree, frozen["backbone"], what)
        remedy = (
            f"It is {self.backbone.weights_id}: set --config.backbone to the CLIP that this "
            "checkpoint was trained on."
        )
        convert.check_same(tree, frozen["backbone"], what, remedy)
