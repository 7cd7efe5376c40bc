"""PALAVRA: a set of images of one thing becomes the word `*` (arXiv 2204.01694), used for CIR.

Training, over sets of `set_size` images of one class of objects, with a caption of each:

    f(images) = word         DeepSet: three equivariant layers, mean over the set, two layers
    T(t) = t + W t + b       un-normalised text features -> where the images of such texts lie
    L_map    = || norm(T(t)) - norm(i) ||^2 / dim                 trains T
    L_cycle  = NT-Xent(text(prompt of the label), text(prompt of the word)), temperature 0.25
    L_object = 512 || norm(first token of the label) - norm(word) ||^2 / token_dim

f reads images, and texts in the place of images: captions whose object word is replaced by a random
word of its class, mapped by T. T learns beside f, which reads it as it is at that step. At query
time the word of the set (for CIR: one image) is refined by 30 steps of Adam, so that text("*")
comes nearer to the image than to the coarse concept:

    NT-Xent({image, C}, {text("*"), C}),  C = norm(T(norm(text(coarse word))))

From the released code (NVlabs/PALAVRA), and what is done otherwise here:
* An epoch is one set of each class, as there, and a batch there has a class once. Here batches are
  always full: one may reach into the next epoch, and has several sets of a class where there are
  fewer classes than rows. Sets of one class are no negatives of each other.
* There an epoch is a pass over images, then one over texts; here each step does both, and its loss
  is their mean: half as many steps of f, as many of T.
* The prompt is drawn per step, there per epoch.
* T has an Adam of its own there, of a constant rate. Here one Adam trains both: the same, as it is
  blind to the scale of a loss, but for a schedule, which T follows, too.
* There every fifth image is held out; here training reads all of the stage's split.
* The code makes label prompts by cutting off the template's last character, which is odd where `*`
  is not at the end; here the label stands where the word does.
* Not said anywhere, so chosen here: an image's classes are those that its first caption names, its
  text is any of its captions that name the class; the label of a set of texts is the word in them;
  a query of CIR is "a photo of {coarse} * that {modification text}", as the code puts
  "{coarse class} *" in the place of the subject. SEARLE's paper has numbers of PALAVRA on CIR,
  without saying which coarse concept it used; `coarse` is the released default.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from cir_jax.composers.base import Params, Query, normalise
from cir_jax.composers.losses import nt_xent
from cir_jax.composers.phi import check_share, check_weight, linear
from cir_jax.composers.pseudo_word import PseudoWord
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.input.objects import Objects
from cir_jax.input.phrases import TEMPLATES
from cir_jax.models.backbone import Backbone
from cir_jax.sharding.constraints import each_row, split_rows, whole
from cir_jax.weights import convert, official

TEMPERATURE = 0.25
LAYERS = 3


class DeepSet(nn.Module):
    """f: an image set to a word, whatever the order and number of its images."""

    token_dim: int
    hidden_dim: int = 4096
    dropout: float = 0.25

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """float32[..., set, dim] of unit norm -> float32[..., token_dim]."""
        x = images
        for i in range(LAYERS):
            own = linear(x.shape[-1], self.hidden_dim, f"gamma_{i}")
            shared = linear(x.shape[-1], self.hidden_dim, f"lambda_{i}", bias=False)
            x = split_rows(nn.elu(own(x) - shared(x.mean(axis=-2, keepdims=True))))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean(axis=-2))
        x = split_rows(nn.elu(linear(self.hidden_dim, self.hidden_dim, "fc")(x)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return linear(self.hidden_dim, self.token_dim, "out")(x)


class TextToVisual(nn.Module):
    """T."""

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """float32[..., dim] -> float32[..., dim]."""
        return text + linear(text.shape[-1], text.shape[-1], "linear")(text)


MAP_NAMES, SET_NAMES = convert.Names(), convert.Names()
MAP_NAMES.linear("layers.0", "linear")
for _i in range(LAYERS):
    SET_NAMES.linear(f"phi.{2 * _i}.Gamma", f"gamma_{_i}")
    SET_NAMES.linear(f"phi.{2 * _i}.Lambda", f"lambda_{_i}", bias=False)
SET_NAMES.linear("ro.1", "fc")
SET_NAMES.linear("ro.4", "out")


@dataclasses.dataclass(frozen=True)
class Refinement:
    """Adam at query time; 0 steps = none."""

    steps: int = 30
    learning_rate: float = 0.01


class Palavra(PseudoWord):
    """`params`: {"map": T, "set": f}."""

    trained = True
    placeholder = "*"
    inference_settings = ("image_weight", "coarse", "refine_steps", "refine_learning_rate")
    official_format = "a directory with deep_set_model_first_save_* and txt_vis_model_first_save_*"

    def __init__(
        self,
        backbone: Backbone,
        objects: str = "",
        templates: tuple[str, ...] = TEMPLATES,
        hidden_dim: int = 4096,
        dropout: float = 0.25,
        weight_object: float = 512.0,
        coarse: str = "item",
        refine_steps: int = 30,
        refine_learning_rate: float = 0.01,
    ):
        """objects: file of `Objects`, for training only.

        templates: with one {} each; the 24 that SEARLE took from PALAVRA, in SEARLE's wording.
        """
        check_share("dropout", dropout)
        check_weight("weight_object", weight_object)
        check_weight("refine_learning_rate", refine_learning_rate)
        if refine_steps < 0 or hidden_dim < 1:
            raise ConfigError(
                f"refine_steps={refine_steps}, hidden_dim={hidden_dim}: expected 0 or more, 1 or "
                "more"
            )
        if wrong := [text for text in templates if text.count("{}") != 1]:
            raise ConfigError(f"templates: {wrong[0]!r} must contain {{}} exactly once")
        self.coarse = coarse
        super().__init__(backbone)
        self.weight_object = float(weight_object)
        self.refinement = Refinement(refine_steps, float(refine_learning_rate))
        self.set_encoder = DeepSet(backbone.token_dim, hidden_dim, float(dropout))
        self.map = TextToVisual()
        tokenizer = backbone.tokenizer
        self.coarse_ids, self.word_ids = tokenizer([coarse]), tokenizer([self.placeholder])
        texts = [text.format(f" {self.placeholder} ") for text in templates]
        self.prompt_ids = tokenizer(texts)
        self.objects = Objects.read(objects) if objects else None
        if self.objects:
            words = self.objects.words
            prompts = [text.format(f" {word} ") for text in templates for word in words]
            ids = tokenizer(prompts)
            self.label_ids = ids.reshape(len(templates), len(words), -1)
            start = 0 if tokenizer.bos_id is None else 1
            self.first_tokens = tokenizer(words)[:, start]

    def prompt(self, text: str) -> str:
        named = f"a photo of {self.coarse} {self.placeholder}"
        return f"{named} that {self.backbone.tokenizer.plain(text)}" if text else named

    def init(self, rng: jax.Array) -> Params:
        one, other = jax.random.split(rng)
        features = jnp.zeros((1, self.backbone.dim))
        return {
            "map": self.map.init(one, features)["params"],
            "set": self.set_encoder.init(other, features)["params"],
        }

    @classmethod
    def for_others(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        return dict(settings) | {"objects": ""}

    def contents(self) -> dict[str, str]:
        return {} if self.objects is None else {"objects": self.objects.identity}

    def freeze(self, backbone_params: Params, shapes_only: bool = False) -> Params:
        frozen = super().freeze(backbone_params, shapes_only)
        if self.objects is None:
            return frozen
        return frozen | {"labels": self.label_ids, "first_tokens": self.first_tokens}

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: dict[str, jax.Array],
        rng: jax.Array,
        microbatches: int = 1,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        rng, draw = jax.random.split(rng)
        rows = len(next(iter(batch.values())))
        template = jax.random.randint(draw, (), 0, len(self.prompt_ids))
        batch = batch | {"template": jnp.broadcast_to(template, (rows,))}
        return super().loss(params, frozen, batch, rng, microbatches)

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """reference_features float32[batch, set, dim] or reference_images, of one class of objects

        token_ids           int32[batch, set, length], a caption of each image that names the class
        label               int32[batch], the class's number in `objects.words`
        augmented_token_ids int32[batch, set, length], the captions with another word of the class
        augmented           int32[batch], this word's number in `objects.words`
        """
        if self.objects is None:
            raise ConfigError(
                "PALAVRA is trained on classes of objects: set composer.objects of the stage to "
                "their file."
            )
        backbone, size = frozen["backbone"], batch["token_ids"].shape[1]
        ids = jnp.concatenate([batch["token_ids"], batch["augmented_token_ids"]], axis=1)
        text = self.backbone.encode_text(backbone, ids.reshape(-1, ids.shape[-1]))
        text = text.reshape(*ids.shape[:2], -1)
        images = batch.get("reference_features")
        if images is None:
            pixels = batch["reference_images"]
            images = self.backbone.encode_image(backbone, pixels.reshape(-1, *pixels.shape[2:]))
            images = images.reshape(*pixels.shape[:2], -1)
        # f reads T as it is, and does not train it
        fixed = {"map": jax.lax.stop_gradient(params["map"]), "set": params["set"]}
        keys, of_set = jax.vmap(jax.random.split)(rngs), functools.partial(self.set_rows, fixed)
        sets, template = self.visual(fixed, text[:, size:]), batch["template"]
        return {
            "map": self.map_error(params, text[:, :size], images).mean(axis=-1),
            "label": batch["label"],
            "image": of_set(frozen, normalise(images), batch["label"], template, keys[:, 0]),
            "text": of_set(frozen, sets, batch["augmented"], template, keys[:, 1]),
        }

    def map_error(self, params: Params, text: jax.Array, image: jax.Array) -> jax.Array:
        """float32[...] from un-normalised float32[..., dim] of texts and of their images."""
        return jnp.square(self.visual(params, text) - normalise(image)).mean(axis=-1)

    def set_rows(
        self,
        params: Params,
        frozen: Params,
        sets: jax.Array,
        label: jax.Array,
        template: jax.Array,
        rngs: jax.Array | None,
    ) -> Params:
        """Of one modality: unit float32[batch, set, dim]; label and template are int32[batch].

        label, word: float32[batch, dim], texts with the class's name and with the word; object:
        float32[batch], the word's distance from the class's first token. rngs: None = no dropout.
        """
        backbone = frozen["backbone"]
        words = self._words(params, sets, rngs)
        first = self.backbone.embed_tokens(backbone, frozen["first_tokens"][label][:, None])
        error = jnp.square(normalise(first[:, 0].astype(jnp.float32)) - normalise(words))
        prompts = jnp.asarray(self.prompt_ids)[template]
        return {
            "label": self.backbone.encode_text(backbone, frozen["labels"][template, label]),
            "word": self.text_features(backbone, prompts, words),
            "object": error.mean(axis=-1),
        }

    def set_loss(self, row: Params, label: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss and its terms of what `set_rows` gives; label: int32[batch], the classes."""
        cycle = nt_xent(row["label"], row["word"], TEMPERATURE, label)
        found = row["object"].mean()
        return cycle + self.weight_object * found, {"cycle": cycle, "object": found}

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        metrics: dict[str, Any] = {"map": rows["map"].mean()}
        total = metrics["map"]
        for name in ("image", "text"):
            loss, terms = self.set_loss(rows[name], rows["label"])
            metrics |= {f"{term}_{name}": value for term, value in terms.items()}
            total += loss / 2
        return total, metrics

    def invert(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        image = normalise(self.reference_features(frozen, query))
        words = self._words(params, image[:, None])
        return self.refine(params, frozen, image, words)

    def refine(
        self, params: Params, frozen: Params, image: jax.Array, words: jax.Array
    ) -> jax.Array:
        """Words after the steps at query time; each row alone, whatever the batch.

        image: float32[batch, dim], mean of each set's unit features; words: [batch, token_dim].
        """
        frozen = {"backbone": whole(frozen["backbone"])}  # once, not in each step
        coarse = self.coarse_features(params, frozen)
        optimizer = optax.adam(self.refinement.learning_rate)

        def loss(words: jax.Array) -> jax.Array:
            # the sum: rows do not see each other's gradients
            return self.refinement_loss(frozen, image, coarse, words).sum()

        def step(carry: Any, _: None) -> tuple[Any, None]:
            words, state = carry
            updates, state = optimizer.update(jax.grad(loss)(words), state)
            return (optax.apply_updates(words, updates), state), None

        start = (words, optimizer.init(words))
        return jax.lax.scan(step, start, None, self.refinement.steps)[0][0]

    def coarse_features(self, params: Params, frozen: Params) -> jax.Array:
        """C, float32[1, dim]. Here T reads a unit feature, as in the release; not in training."""
        coarse = self.backbone.encode_text(frozen["backbone"], jnp.asarray(self.coarse_ids))
        return self.visual(params, normalise(coarse))

    def refinement_loss(
        self, frozen: Params, image: jax.Array, coarse: jax.Array, words: jax.Array
    ) -> jax.Array:
        """float32[batch]: NT-Xent of two rows for each word alone; arguments as of `refine`."""
        ids = jnp.broadcast_to(self.word_ids, (len(words), self.word_ids.shape[1]))
        text = self.text_features(frozen["backbone"], ids, words)
        pairs = (jnp.stack([x, jnp.broadcast_to(coarse, x.shape)], 1) for x in (image, text))
        return jax.vmap(lambda a, b: nt_xent(a, b, TEMPERATURE))(*pairs)

    def _words(self, params: Params, images: jax.Array, rngs: jax.Array | None = None) -> jax.Array:
        """Unit float32[batch, set, dim] -> float32[batch, token_dim]; rngs: a key per row."""
        variables, apply = {"params": params["set"]}, self.set_encoder.apply
        images = split_rows(images)
        if rngs is None:
            return split_rows(apply(variables, images))
        train = each_row(lambda x, rng: apply(variables, x, True, rngs={"dropout": rng}))
        return split_rows(train(images, rngs))

    def visual(self, params: Params, text: jax.Array) -> jax.Array:
        """norm(T(text)) of float32[..., dim]; un-normalised in training."""
        mapped = self.map.apply({"params": params["map"]}, split_rows(text))
        return split_rows(normalise(mapped))

    def read_official(self, path: Path, frozen: Params) -> Params:
        del frozen
        return {
            part: convert.to_ours(official.read(file), names, what=str(file), dtype=np.float32)
            for part, (file, names) in {
                "map": (_only(path, "txt_vis_model"), MAP_NAMES),
                "set": (_only(path, "deep_set_model"), SET_NAMES),
            }.items()
        }

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        del frozen
        for name, part, names in (
            ("txt_vis_model", "map", MAP_NAMES),
            ("deep_set_model", "set", SET_NAMES),
        ):
            tensors = convert.to_source(params[part], names)
            official.write(path / f"{name}_first_save_cir_jax", tensors)


def _only(directory: Path, name: str) -> Path:
    found = sorted(directory.glob(f"{name}*")) if directory.is_dir() else []
    if len(found) != 1:
        there = ", ".join(file.name for file in found) or "none"
        raise WeightsError(f"{directory}: expected a directory with one file {name}*; has {there}.")
    return found[0]
