"""TAT, text-anchored tuning: the image encoder moves towards the text encoder (arXiv 2405.00571).

    L = CE(s v wT) + CE(s w vT)                               the sum of both directions, s = 1/0.07

over the unit features of image-text pairs. LoRA (rank 16, alpha 16, dropout 0.1 on its input) on
the queries and values of the image encoder is all that is trained: texts are the anchor. It is a
way to make a CLIP or BLIP for others: a query is Slerp's, of the tuned features, and the gallery is
encoded anew. `--config.export_to=DIR` writes the tuned backbone, for `--config.backbone=DIR` of
Slerp, Combiner and all others (section 3.3, tables 6 and 7).

The paper's text alone, as no code of this part was released. It leaves open, and here is:
* which projections LoRA adapts: queries and values, as less than 0.5 % of all parameters says
  (0.39 % of B/32, 0.37 % of L/14; all four projections would be 0.78 and 0.74 %).
* "tau = 1 / 0.07" beside a division by tau: the scale of the logits is 1 / 0.07.
* whether features are gathered from all devices: the loss is over the global batch.

`tuned`: "image" is TAT; its ablations are "text" (the image encoder is the anchor, LoRA is on the
text encoder) and "both" (no anchor).
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.composers.losses import info_nce, pair_recall
from cir_jax.composers.phi import check_share
from cir_jax.composers.slerp import Slerp, asked_alpha, slerp
from cir_jax.errors import ConfigError, WeightsError, unknown
from cir_jax.models import lora
from cir_jax.models.backbone import Backbone
from cir_jax.sharding.constraints import each_row, split_rows
from cir_jax.weights import backbones, peft

Encode = Callable[[Params, jax.Array], jax.Array]

TUNED = {"image": "vision", "text": "text", "both": "(vision|text)"}
ADAPTER = "adapter"
"""Folder of the adapter, in PEFT's format, within that of the tuned backbone."""


class Tat(Composer):
    """`params` are the adapter (`models.lora`)."""

    trained = True
    tunes_backbone = True
    conditions = ("alpha",)
    inference_settings = ("alpha",)
    official_format = "a directory of PEFT with the adapter, or one that holds it as adapter/"

    def __init__(
        self,
        backbone: Backbone,
        alpha: float = 0.8,
        tuned: str = "image",
        rank: int = 16,
        lora_alpha: float = 16.0,
        dropout: float = 0.1,
        scale: float = 1 / 0.07,
    ):
        """alpha: Slerp's, weight of the text. tuned: "image", "text" or "both".

        lora_alpha / rank scales what the adapter adds. scale: of the logits. Raises ConfigError.
        """
        super().__init__(backbone)
        self.alpha = Slerp(backbone, alpha).alpha
        check_share("dropout", dropout)
        if tuned not in TUNED:
            raise ConfigError(unknown("tuned of tat:", tuned, TUNED))
        if not scale > 0 or not lora_alpha > 0:
            raise ConfigError(f"scale={scale}, lora_alpha={lora_alpha}: expected more than 0")
        if not backbone.joint:
            raise ConfigError(
                f"tat: image and text features of {backbone.weights_id} lie in two spaces."
            )
        pattern = rf"{TUNED[tuned]}/.*/attention/(query|value)/kernel"
        self.lora = lora.LoraConfig(pattern, rank, float(lora_alpha), float(dropout))
        self.tuned, self.scale = tuned, float(scale)
        jax.eval_shape(self.init, jax.random.key(0))  # raises for a backbone without such layers

    def init(self, rng: jax.Array) -> Params:
        shapes = jax.eval_shape(self.backbone.init, rng)
        return lora.init(rng, shapes, self.lora.pattern, self.lora.rank)

    def encoders(self, params: Params, frozen: Params) -> Params:
        """The tuned backbone's parameters, in the tree of the frozen one."""
        return lora.merge(frozen["backbone"], params, self.lora.scale)

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: target_images uint8[batch, height, width, 3], token_ids int32[batch, length]."""
        base, tuned = frozen["backbone"], self.encoders(params, frozen)

        def features(encode: Encode, x: jax.Array, rngs: jax.Array, moves: bool) -> jax.Array:
            if not moves:
                return normalise(encode(base, x))
            if not self.lora.dropout:
                return normalise(encode(tuned, x))

            # dropout on the adapter's input cannot be merged; each row has masks of its own
            def of_row(row: jax.Array, rng: jax.Array) -> jax.Array:
                with lora.attached(params, self.lora.scale, dropout=self.lora.dropout, rng=rng):
                    return encode(base, row[None])[0]

            return normalise(split_rows(each_row(of_row)(x, rngs)))

        image, text = jnp.moveaxis(jax.vmap(jax.random.split)(rngs), 1, 0)
        seen, read = self.backbone.encode_image, self.backbone.encode_text
        return {
            "image": features(seen, batch["target_images"], image, self.tuned != "text"),
            "text": features(read, batch["token_ids"], text, self.tuned != "image"),
        }

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = 2 * info_nce(rows["image"], rows["text"], self.scale)  # the sum, not the mean
        return loss, {"in_batch_recall": pair_recall(rows["text"] @ rows["image"].T)}

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        """query: with reference_images; stored features are those of the backbone before."""
        tuned = self.encoders(params, frozen)
        image = normalise(self.backbone.encode_image(tuned, query["reference_images"]))
        text = normalise(self.backbone.encode_text(tuned, query["token_ids"]))
        return slerp(image, text, asked_alpha(query, self.alpha))

    def read_official(self, path: Path, frozen: Params) -> Params:
        del frozen
        inside = path / ADAPTER
        adapter, config = peft.load_adapter(inside if inside.is_dir() else path, self.backbone)
        ours = (self.lora.rank, self.lora.alpha)
        if (config.rank, config.alpha) != ours:
            raise WeightsError(
                f"{path}: an adapter of rank {config.rank}, alpha {config.alpha}; this one has "
                f"{ours[0]}, {ours[1]}. Set --config.composer.rank={config.rank} and "
                f"--config.composer.lora_alpha={config.alpha}."
            )
        flat = {}
        for kernel, (a, b) in lora.pairs(adapter).items():
            # where PyTorch has queries and values in one matrix, each has rows of zeros
            first = np.argsort(~np.any(b, axis=1), kind="stable")
            if np.any(b[first[config.rank :]]):
                raise WeightsError(
                    f"{path}: {kernel} has an adapter of rank {len(b)}, not {config.rank}. Only "
                    "adapters of queries and values with ranks of their own are read here."
                )
            kept = np.sort(first[: config.rank])
            flat |= {f"{kernel}/a": a[:, kept], f"{kernel}/b": b[kept]}
        return unflatten_dict(flat, sep="/")

    def exports_by_torch(self, path: Path) -> bool:
        return False

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        """The tuned backbone as a Hugging Face directory, and the adapter in it."""
        backbones.save(path, self.backbone, self.encoders(params, frozen), np.float32)
        peft.save_adapter(path / ADAPTER, params, self.lora, self.backbone)
