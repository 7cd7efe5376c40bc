"""RTD: the text encoder of a pseudo-word method is tuned on text triplets (arXiv 2406.09188).

    v = X(T(r) + s u n),  u ~ Unif(0, 1), n ~ N(0, I)           the reference caption as an image
    L = NT-Xent([T(t); T(r)], [T'("a photo of $ that c"); T'("a photo of $")], $ = v)

of triplets of a reference caption r, a modification text c and a target caption t; T is the frozen
text encoder (the anchor), T' the learned one, which starts as T, and X the network of words of
Pic2Word, SEARLE or LinCIR, frozen, too. A query is X's, encoded by T'; gallery and reference images
are encoded as before. No image is read in training.

The pairs ("a photo of $", r) are the hard negatives of the paper's "refined batch"; it prints
(T_r, T_r), the released code (jaeseokbyun/RTD) has these. Its NT-Xent is over the 4 x batch rows of
both sides, those of the same side among the negatives, and the mean of them. `noise_type` says what
u n is: the above ("scaled"), or of Tables D.1 and D.2 n alone ("gaussian") or Unif(-1, 1)
("uniform"), there with s = 1. Where the numbers are not the release's:
* Negatives are all rows of the global batch; the release's are those of one device
  (`negatives=128`: of so many consecutive triplets).
* It trains each device's own copy, without exchange of gradients, and saves the first one's. Here
  the devices learn one encoder, and 512 triplets are a batch of 512.
* Its anchor and X are in fp16, the learned encoder in fp32; here towers compute in `config.dtype`.
* A `!` in a text is its padding, id 0; here the token that CLIP gives it.
* Its result is the checkpoint of the best R@1 on CIRR val; here the last step, or with
  `--config.checkpoint.best="cirr R@1"` the best of the checkpoints.
* Its prompt is "a photo of $ that ..." around every X; here X's own, in training and queries alike
  (`word.link="that"` makes it Pic2Word's, too).

`tuned` is what is learned of T': "full" as released; of Table 8 all fully connected layers ("fcs",
45.8 % of L/14's text encoder), or those of three layers (11.5 %): "front", "middle", "last" ones,
or the first, a middle and the last ("interleaved"). Of an even number of layers the paper does not
say which are in the middle; here, counted from 1, those around the first behind the half (of 12:
6 to 8, and for "interleaved" the 7th; the other reading is 5 to 7, and the 6th).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.composers import build, for_others
from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.composers.losses import nt_xent, pair_recall
from cir_jax.composers.phi import LearnedWord, check_weight
from cir_jax.composers.pseudo_word import text_noise
from cir_jax.errors import ConfigError, WeightsError, unknown
from cir_jax.models import subtree
from cir_jax.models.backbone import Backbone
from cir_jax.sharding.constraints import split_rows
from cir_jax.weights import clip, convert, official, torch_files

PART = "CLIPTextModelWithProjection"
"""Key of the text encoder, named as transformers does, in the authors' file."""

WITH_WORD = ".word"
"""What is put before the suffix of that file's name for X's own file, where both are written."""

NOISES = ("scaled", "gaussian", "uniform")
TUNED = ("full", "fcs", "front", "middle", "last", "interleaved")


def tuned_pattern(tuned: str, layers: int) -> str:
    """Paths of the learned parameters in the tree of a backbone with so many text layers.

    Raises ConfigError for another `tuned`, or too few layers.
    """
    if tuned not in TUNED:
        raise ConfigError(unknown("tuned of rtd:", tuned, TUNED))
    if tuned == "full":  # texts are encoded without BLIP's attention to images
        return r"(text|text_projection)/(?!.*cross_attention).*"
    if tuned == "fcs":
        return r"text/layers_\d+/fc[12]/.*"
    if layers < 3:
        raise ConfigError(f"tuned={tuned!r} is three layers; this text encoder has {layers}")
    middle = layers // 2
    numbers = {
        "front": (0, 1, 2),
        "middle": (middle - 1, middle, middle + 1),
        "last": (layers - 3, layers - 2, layers - 1),
        "interleaved": (0, middle, layers - 1),
    }[tuned]
    return rf"text/layers_({'|'.join(map(str, numbers))})/fc[12]/.*"


class Rtd(Composer):
    """`params` are {"word": those of X, "text": the learned parameters of the text encoder}."""

    trained = True

    def __init__(
        self,
        backbone: Backbone,
        word: Mapping[str, Any],
        tuned: str = "full",
        noise: float = 0.5,
        noise_type: str = "scaled",
        temperature: float = 0.07,
        hard_negatives: bool = True,
        negatives: int = 0,
    ):
        """word: X's name and settings. tuned, noise_type: see above. noise: the factor s.

        hard_negatives: the pairs of "a photo of $" and the reference caption. negatives: rows of
        the batch that are compared with each other; 0 = all.
        Raises ConfigError, for an X without a network that makes words of features, too.
        """
        super().__init__(backbone)
        if "name" not in word:
            raise ConfigError("composer.word of rtd: expected the name of a pseudo-word method")
        settings = dict(word)
        self.word = build(settings.pop("name"), backbone, **settings)
        if not isinstance(self.word, LearnedWord):
            raise ConfigError(
                f"composer.word.name={word['name']!r}: RTD is put around a method whose network "
                "makes a pseudo-word of features: pic2word, searle or lincir."
            )
        self.word.every = True  # as released, around all three
        check_weight("noise", noise)
        if noise_type not in NOISES:
            raise ConfigError(unknown("noise_type of rtd:", noise_type, NOISES))
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature}: expected more than 0")
        if negatives < 0:
            raise ConfigError(f"negatives={negatives}: expected a number of rows, or 0 = all")
        self.pattern = tuned_pattern(tuned, backbone.config.text.num_hidden_layers)
        self.noise, self.noise_type = float(noise), noise_type
        self.temperature = float(temperature)
        self.hard_negatives, self.negatives = hard_negatives, negatives
        self.template = self.word.template
        self.named_ids = backbone.tokenizer([self.word.prompt("")])
        if backbone.family == "clip":
            file = "a file {epoch, " + PART + "}, such as text_encoder_best.pt"
            self.official_format = (
                f"{file}, and before it, after a comma, that of the words: "
                f"{type(self.word).official_format}"
            )

    @classmethod
    def for_others(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return dict(settings) | {"word": for_others(settings["word"])}

    def prompt(self, text: str) -> str:
        return self.word.prompt(text)

    def init(self, rng: jax.Array) -> Params:
        """For its shapes: what is trained begins as X's network and the backbone's text encoder."""
        text = subtree.chosen(self.backbone.init(rng), self.pattern)
        return {"word": self.word.init(rng), "text": text}

    def take_over(self, given: Params, frozen: Params) -> Params:
        """X's parameters, or {"word"}: those and the anchor's. A tree of RTD's own stays."""
        if "text" in given and "word" in given:
            return given
        if set(given) == {"text"}:
            raise WeightsError(
                "a text encoder of RTD without the network of words it was tuned for: give both, "
                "--config.init_from=official:WORD_FILE,TEXT_ENCODER_FILE."
            )
        word = given.get("word", given)
        return {"word": word, "text": subtree.chosen(frozen["backbone"], self.pattern)}

    def encoders(self, params: Params, frozen: Params) -> Params:
        """With the learned text encoder, T'; images are encoded as before."""
        return subtree.put(frozen["backbone"], params["text"])

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """batch: int32[batch, length] reference_token_ids and target_token_ids of captions, and
        token_ids of "a photo of $ that {modification text}"."""
        anchor, rows = frozen["backbone"], len(batch["token_ids"])
        # side by side in a row, so that they stay on its device
        captions = jnp.stack([batch["target_token_ids"], batch["reference_token_ids"]], axis=1)
        captions = split_rows(captions.reshape(2 * rows, -1))
        features = jax.lax.stop_gradient(self.backbone.encode_text(anchor, captions))
        target, reference = jnp.moveaxis(features.reshape(rows, 2, -1), 1, 0)
        noisy = reference + self.noise * jax.vmap(self.draw)(rngs)
        query = {"reference_features": noisy}
        words = jax.lax.stop_gradient(self.word.invert(params["word"], frozen, query, rngs))
        learned = self.encoders(params, frozen)
        found = {
            "target": target,
            "composed": self.word.text_features(learned, batch["token_ids"], words),
        }
        if self.hard_negatives:
            named = jnp.broadcast_to(self.named_ids, (rows, self.named_ids.shape[1]))
            found["reference"] = reference
            found["named"] = self.word.text_features(learned, named, words)
        return found

    def draw(self, rng: jax.Array) -> jax.Array:
        """Noise of one row, float32[dim], before its factor."""
        share, normal = jax.random.split(rng)
        if self.noise_type == "gaussian":
            return jax.random.normal(normal, (self.backbone.dim,))
        if self.noise_type == "uniform":
            return jax.random.uniform(share, (self.backbone.dim,), minval=-1.0)
        return text_noise(share, normal, self.backbone.dim)

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Raises ConfigError when the batch is no multiple of `negatives`."""
        count = len(rows["target"])
        together = self.negatives or count
        if count % together:
            raise ConfigError(
                f"negatives={together}: the batch of {count} rows is no multiple of it. Change "
                "composer.negatives or the stage's batch_size."
            )

        def loss(rows: Params) -> jax.Array:
            anchor, learned = [rows["target"]], [rows["composed"]]
            if self.hard_negatives:
                anchor, learned = [*anchor, rows["reference"]], [*learned, rows["named"]]
            return nt_xent(jnp.concatenate(anchor), jnp.concatenate(learned), self.temperature)

        groups = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), rows)
        composed, target = normalise(rows["composed"]), normalise(rows["target"])
        return jax.vmap(loss)(groups).mean(), {"in_batch_recall": pair_recall(composed @ target.T)}

    def read(
        self,
        params: Params,
        frozen: Params,
        query: Query,
        rng: jax.Array,
        texts: Sequence[jax.Array],
    ) -> list[jax.Array]:
        """As X's, on the learned encoder."""
        learned = {"backbone": self.encoders(params, frozen)}
        return self.word.read(params["word"], learned, query, rng, texts)

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        learned = {"backbone": self.encoders(params, frozen)}
        return self.word.compose(params["word"], learned, query, rng)

    def read_official(self, path: Path, frozen: Params) -> Params:
        """{"text"} of RTD's file, {"word"} of X's: whichever `path` is."""
        if PART not in torch_files.read_parts(path):
            return {"word": self.word.read_official(path, frozen)}
        tensors = official.read(path, PART)
        names = self._names()
        ignore = (r"text_model\.embeddings\.position_ids",)
        tree = convert.to_ours(tensors, names, ignore=ignore, what=str(path), dtype=np.float32)
        convert.check_shapes(tree, subtree.chosen(frozen["backbone"], TEXT), str(path))
        tuned = subtree.chosen(tree, self.pattern)
        convert.check_same(
            subtree.without(tree, tuned),
            frozen["backbone"],
            str(path),
            "It is not among what this composer learns: set --config.composer.tuned=full, or "
            "--config.backbone to the one it was tuned from.",
        )
        return {"text": tuned}

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        """The whole text encoder, and X's file beside it: NAME.pt and NAME.word.pt."""
        learned = subtree.chosen(self.encoders(params, frozen), TEXT)
        beside = path.with_name(f"{path.stem}{WITH_WORD}{path.suffix}")
        self.word.write_official(beside, params["word"], frozen)
        official.write(path, {"epoch": 0, PART: convert.to_source(learned, self._names())})

    def _names(self) -> convert.Names:
        """Of transformers' CLIPTextModelWithProjection."""
        kept = ("text_model.", "text_projection.")
        every = clip.hf_names(self.backbone.config)
        return convert.Names({name: x for name, x in every.items() if name.startswith(kept)})


TEXT = r"(text|text_projection)/.*"
"""The text encoder's part of a CLIP's parameters."""
