"""CLIP4Cir's first stage: CLIP itself is tuned so that image + text finds the target.

    c = norm(f_I(reference) + f_T(text))                    un-normalised features, summed
    L = cross-entropy over the batch of scale c . target

of image triplets (arXiv 2308.11485, section 4.1). Reference and target go through the same tuned
encoders, targets are of unit norm, the loss has one direction (query to target). The tuned CLIP is
a backbone for Combiner, the second stage, and for all others.

`tuned`: "both" encoders (released default), "text" alone (the CVPR 2022 workshop's setting, which
other papers quote) or "image" alone. As in the released code (ABaldrati/CLIP4Cir): scale 100,
nothing drops out, batch norms of ResNets keep their statistics. Where the numbers are not the
release's:
* It trains in fp16 with loss scaling; here the towers compute in `config.dtype`, the loss in
  float32.
* Its epochs leave out what does not fill a batch; durations here count examples.
* It keeps the checkpoints of the best mean recall on val (FashionIQ), or of three means of seven
  metrics (CIRR); here the last one, or the best by one metric (`config.checkpoint.best`).
"""

from pathlib import Path

import jax
import numpy as np

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.composers.losses import pair_cross_entropy, pair_recall
from cir_jax.errors import ConfigError, unknown
from cir_jax.models import subtree
from cir_jax.models.backbone import Backbone
from cir_jax.weights import backbones, convert, official, open_clip

PART = "CLIP"
"""Key of the state dict in the authors' file, whose names are OpenAI's."""

IMAGE, TEXT = r"(vision|visual_projection)/.*", r"(text|text_projection)/.*"
TUNED = {"both": f"{IMAGE}|{TEXT}", "text": TEXT, "image": IMAGE}


class Clip4Cir(Composer):
    """`params` are the tuned parameters, in the tree of the backbone."""

    trained = True
    tunes_backbone = True
    official_format = "a file {epoch, CLIP}, such as tuned_clip_best.pt"

    def __init__(self, backbone: Backbone, tuned: str = "both", scale: float = 100.0):
        """tuned: "both", "text" or "image". scale: of the logits, in training.

        Raises ConfigError.
        """
        super().__init__(backbone)
        if tuned not in TUNED:
            raise ConfigError(unknown("tuned of clip4cir:", tuned, TUNED))
        if backbone.family != "clip" or not backbone.joint:
            raise ConfigError(f"clip4cir tunes a CLIP, and {backbone.weights_id} is none.")
        if not scale > 0:
            raise ConfigError(f"scale={scale}: expected more than 0, such as the released 100")
        self.pattern, self.scale = TUNED[tuned], float(scale)

    def init(self, rng: jax.Array) -> Params:
        """For its shapes: `start` begins with the backbone."""
        return subtree.chosen(self.backbone.init(rng), self.pattern)

    def start(self, rng: jax.Array, frozen: Params) -> Params:
        del rng
        return subtree.chosen(frozen["backbone"], self.pattern)

    def encoders(self, params: Params, frozen: Params) -> Params:
        """The backbone's parameters with the tuned ones in it."""
        return subtree.put(frozen["backbone"], params)

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        """query: with reference_images; stored features are those of the backbone before."""
        tuned = self.encoders(params, frozen)
        image = self.backbone.encode_image(tuned, query["reference_images"])
        return normalise(image + self.backbone.encode_text(tuned, query["token_ids"]))

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: reference_images and target_images uint8[batch, height, width, 3], token_ids
        int32[batch, length]."""
        return {
            "query": self.compose(params, frozen, batch, rngs),
            "target": self.embed_gallery(params, frozen, batch["target_images"]),
        }

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = self.scale * rows["query"] @ rows["target"].T
        return pair_cross_entropy(logits), {"in_batch_recall": pair_recall(logits)}

    def read_official(self, path: Path, frozen: Params) -> Params:
        """The tuned encoders; where one of two is tuned, the other one must be the backbone's."""
        names, what = open_clip.names(self.backbone.config), str(path)
        tensors = official.read(path, PART)
        tree = convert.to_ours(tensors, names, ignore=open_clip.IGNORE, what=what, dtype=np.float32)
        convert.check_shapes(tree, frozen["backbone"], what)
        tuned = subtree.chosen(tree, self.pattern)
        rest = subtree.without(tree, tuned)
        rest.pop("logit_scale", None)  # not used, and not tuned
        convert.check_same(
            rest,
            frozen["backbone"],
            what,
            "Set --config.composer.tuned=both, or --config.backbone to the one it was tuned from.",
        )
        return tuned

    def exports_by_torch(self, path: Path) -> bool:
        return path.suffix == ".pt"

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        """The authors' file, FILE.pt; else a Hugging Face directory, for --config.backbone."""
        tuned = self.encoders(params, frozen)
        if self.exports_by_torch(path):
            state = convert.to_source(tuned, open_clip.names(self.backbone.config))
            official.write(path, {"epoch": 0, PART: state})
        else:
            backbones.save(path, self.backbone, tuned, np.float32)
