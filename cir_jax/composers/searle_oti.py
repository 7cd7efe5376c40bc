"""SEARLE-OTI: the reference image as a word, found by optimisation (arXiv 2303.15247, section 3.1).

    v* = argmin_v  w_cos (1 - cos(T(template of v), I)) + w_gpt (1 - cos(T(phrase of v), T(phrase)))

I: image feature; T: text feature; template: "a photo of $" and the like; phrase: a sentence about
one of the image's concepts, with the concept replaced by v (`composers.phrases`). One token per
image; AdamW; both texts are drawn anew in every iteration; the answer is the moving average of v.

The released code (miccunifi/SEARLE), where the numbers are not its own:
* It runs the towers in fp16 with loss scaling, which skips the iterations that overflow, and takes
  the concepts from fp16 features. Here towers compute in `config.dtype`, the rest in float32.
* Its loss is the mean over a batch of 32 images, fewer in the last one. Here every image is alone,
  with the gradient that it has among 32 (MEAN_OVER): all that changes is Adam's epsilon, and the
  result does not depend on the batch. Each image draws its texts from a key of its own.
* Its concepts are the first top_k distinct names of the 250 nearest, less the discarded ones. Here
  as well, but if none is left, where it stops with an error, the nearest usable one is taken; and a
  concept of whose phrases one is cut off before its `$`, an error there, is discarded, too.
The weights divided by their sum, the moving average that starts at the random words, and the one
occurrence of a concept that is replaced are the release's, not the paper's.

What makes it fast, and changes nothing: all iterations are one compiled scan; texts run at their
own length instead of 77, and only from the pseudo-word on (models.clip_suffix); only the token gets
a gradient; the features of the unchanged phrases are taken from a table when there are at most
`cached_phrases`, else computed in the iteration without a gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cir_jax.composers.base import Params, Query
from cir_jax.composers.losses import cosine_loss
from cir_jax.composers.phrases import Phrases, Tables
from cir_jax.composers.pseudo_word import PseudoWord
from cir_jax.composers.suffixes import Suffixes
from cir_jax.errors import ConfigError, DataError, unknown
from cir_jax.input import phrases as books
from cir_jax.models.backbone import Backbone
from cir_jax.sharding.constraints import whole
from cir_jax.weights import oti_tokens

INITIAL_STD = 0.02
MEAN_OVER = 32
"""Images whose mean loss the released code minimises: all that Adam's epsilon sees of it."""

COMPARED = 50
"""Last iterations whose mean loss says which start of an image was the best one."""

IMAGE_LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "cosine": cosine_loss,
    # of un-normalised features: between unit ones it would be the cosine loss again
    "l2": lambda text, image: jnp.mean(jnp.square(text - image), axis=-1),
}
REGULARISERS = ("phrases", "concept", "random", "none")
SCHEDULES = ("constant", "cosine")

TextFeatures = Callable[[jax.Array], jax.Array]
"""Words [batch, token_dim] -> float32[batch, dim]: features of a text for each, with it put in."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Numbers of the optimisation. The weights are divided by their sum, as in the release.

    mean_over: divides the loss, see MEAN_OVER. decay_over: iterations after which the learning rate
    is 0, on a cosine; 0 = it stays what it is.
    """

    learning_rate: float = 2e-2
    weight_decay: float = 0.01
    ema: float = 0.99
    weight_cos: float = 1.0
    weight_gpt: float = 0.5
    image_loss: str = "cosine"
    mean_over: int = MEAN_OVER
    decay_over: int = 0

    @property
    def shares(self) -> tuple[float, float]:
        """Of the two losses in what is minimised."""
        total = self.mean_over * (self.weight_cos + self.weight_gpt)
        return self.weight_cos / total, self.weight_gpt / total

    @property
    def optimizer(self) -> optax.GradientTransformation:
        rate = self.learning_rate
        if self.decay_over:
            rate = optax.cosine_decay_schedule(rate, self.decay_over)
        return optax.adamw(rate, weight_decay=self.weight_decay)


class Term(NamedTuple):
    """loss: float32[batch]. gradient: float32[batch, token_dim], of its share, by the words."""

    loss: jax.Array
    gradient: jax.Array


class State(NamedTuple):
    """words, average: float32[batch, token_dim]; optimizer: Adam's moments and counts."""

    words: jax.Array
    average: jax.Array
    optimizer: Any


class Losses(NamedTuple):
    """Per image, float32[batch]; total is the weighted mean of the other two."""

    total: jax.Array
    cosine: jax.Array
    phrase: jax.Array


def start(recipe: Recipe, words: jax.Array) -> State:
    """The state before the first iteration; the average starts as the initial words."""
    return State(words, words, recipe.optimizer.init(words))


def image_term(recipe: Recipe, words: jax.Array, template: TextFeatures, images: jax.Array) -> Term:
    """images: float32[batch, dim], un-normalised."""
    loss = IMAGE_LOSSES[recipe.image_loss]
    return _term(lambda words: loss(template(words), images), words, recipe.shares[0])


def phrase_term(recipe: Recipe, words: jax.Array, phrase: TextFeatures, target: jax.Array) -> Term:
    """target: float32[batch, dim], features of the unchanged phrases."""
    return _term(lambda words: cosine_loss(phrase(words), target), words, recipe.shares[1])


def _term(loss: Callable[[jax.Array], jax.Array], words: jax.Array, share: float) -> Term:
    """loss: of each word alone, so that one pass back is the gradients of all."""
    found, pull = jax.vjp(loss, words)
    return Term(found, *pull(jnp.full_like(found, share)))


def update(
    recipe: Recipe, state: State, image: Term, phrase: Term
) -> tuple[State, Losses, jax.Array]:
    """The new state, the losses before it, their gradient float32[batch, token_dim]."""
    total = recipe.weight_cos * image.loss + recipe.weight_gpt * phrase.loss
    total = total / (recipe.weight_cos + recipe.weight_gpt)
    gradient = image.gradient + phrase.gradient
    updates, optimizer = recipe.optimizer.update(gradient, state.optimizer, state.words)
    words = state.words + updates
    average = recipe.ema * state.average + (1 - recipe.ema) * words
    return State(words, average, optimizer), Losses(total, image.loss, phrase.loss), gradient


@dataclasses.dataclass(frozen=True, eq=False)
class StoredWords:
    """Words of a folder. words: float32[n, token_dim]; row: name of an image -> its row."""

    directory: str
    words: np.ndarray
    row: Mapping[str, int]

    @classmethod
    def read(cls, directory: str, token_dim: int) -> "StoredWords":
        """Raises WeightsError."""
        found = oti_tokens.read(directory, token_dim)
        words = np.stack(list(found.values())) if found else np.zeros((0, token_dim), np.float32)
        return cls(directory, words, {name: row for row, name in enumerate(found)})

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """int32[n]. Raises DataError for images without a word."""
        if missing := sorted({name for name in names if name not in self.row}):
            raise DataError(
                f"{self.directory}: {len(missing)} of the benchmark's reference images have no "
                f"word there, such as {', '.join(map(repr, missing[:3]))}. It holds words of "
                f"{len(self.row)} images; give the folder made of this benchmark's split."
            )
        return np.asarray([self.row[name] for name in names], np.int32)


class SearleOti(PseudoWord):
    """`invert` optimises; nothing is trained.

    phrases: phrase book (`input.phrases`); names: file of the concepts, "" = all of the book.
    top_k: concepts of an image. iterations, learning_rate, weight_decay, ema, weight_*: METHODS
    2.3. schedule of the learning rate: "constant", as released, or "cosine", to 0.
    starts: an image is optimised from so many random words, because some end in poor local minima;
    kept is the one of the lowest loss, the mean of the last COMPARED iterations (released: 1).
    image_loss, regulariser: the paper's Table 4; "concept" = "a photo of {concept}" without the
    rest of the phrase, "random" = the same of any concept, "none".
    cached_phrases: see above and `Phrases.freeze`.
    words: folder of words of the reference images (`weights.oti_tokens`, such as the released
    code's), found by the names of the images; then nothing is optimised, and no phrases are needed.
    """

    speed_settings = ("cached_phrases",)

    @classmethod
    def for_others(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        if settings.get("words"):
            raise ConfigError(
                f"composer.words={settings['words']!r}: words of a benchmark's images answer "
                "nobody's own queries. Leave them out."
            )
        return dict(settings)

    def __init__(
        self,
        backbone: Backbone,
        phrases: str = "data/shapes/phrases.json",
        names: str = "",
        top_k: int = 15,
        iterations: int = 350,
        learning_rate: float = 2e-2,
        weight_decay: float = 0.01,
        ema: float = 0.99,
        weight_cos: float = 1.0,
        weight_gpt: float = 0.5,
        image_loss: str = "cosine",
        regulariser: str = "phrases",
        schedule: str = "constant",
        starts: int = 1,
        cached_phrases: int = 1 << 16,
        words: str = "",
    ):
        super().__init__(backbone)
        if image_loss not in IMAGE_LOSSES:
            raise ConfigError(unknown("image_loss of searle_oti:", image_loss, IMAGE_LOSSES))
        if regulariser not in REGULARISERS:
            raise ConfigError(unknown("regulariser of searle_oti:", regulariser, REGULARISERS))
        if schedule not in SCHEDULES:
            raise ConfigError(unknown("schedule of searle_oti:", schedule, SCHEDULES))
        for name, number in (("iterations", iterations), ("starts", starts)):
            if number < 1:
                raise ConfigError(f"searle_oti: {name}={number}; it must be 1 or more.")
        if not 0 <= ema < 1:
            raise ConfigError(f"searle_oti: ema={ema}; it must be in [0, 1).")
        if min(weight_cos, weight_gpt) < 0 or weight_cos + weight_gpt == 0:
            raise ConfigError(
                f"searle_oti: weight_cos={weight_cos}, weight_gpt={weight_gpt}; neither may be "
                "negative, nor both 0."
            )
        self.iterations, self.starts, self.regulariser = iterations, starts, regulariser
        self.cached_phrases = cached_phrases
        weights = (1.0, 0.0) if regulariser == "none" else (weight_cos, weight_gpt)
        self.recipe = Recipe(
            learning_rate,
            weight_decay,
            ema,
            *weights,
            image_loss,
            decay_over=iterations if schedule == "cosine" else 0,
        )
        self.stored = StoredWords.read(words, backbone.token_dim) if words else None
        if self.stored:
            self.word_rows = self.stored.rows
            return
        suffix = regulariser not in ("concept", "random")
        self.phrases = Phrases.read(phrases, backbone, top_k, suffix=suffix, names=names)

    def write_files(self, directory: Path) -> dict[str, str]:
        book = self.phrases.book
        books.write(directory / "phrases.json", book)
        if not book.rows:  # else a concept that is listed twice counts twice
            return {"phrases": "phrases.json", "names": ""}
        text = "".join(f"{name}\n" for name in book.rows)
        (directory / "names.txt").write_text(text, encoding="utf-8")
        return {"phrases": "phrases.json", "names": "names.txt"}

    def freeze(self, backbone_params: Params, shapes_only: bool = False) -> Params:
        frozen = super().freeze(backbone_params, shapes_only)
        if self.stored:
            return frozen | {"words": self.stored.words}
        cached = 0 if self.regulariser == "none" else self.cached_phrases
        tables = self.phrases.freeze(self.backbone, backbone_params, cached, shapes_only)
        return frozen | {"phrases": tables}

    def invert(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        if self.stored:
            if "word_row" not in query:
                raise ConfigError(
                    f"searle_oti: words={self.stored.directory}: only reference images of a "
                    "benchmark have names to find their words by. Set words='' to invert images."
                )
            return frozen["words"][query["word_row"]]
        features = self.reference_features(frozen, query)
        index = query.get("query_index")
        if index is None:
            index = jnp.arange(len(features), dtype=jnp.int32)
        rngs = jax.vmap(lambda i: jax.random.fold_in(rng, i))(index)
        top = self.phrases.associate(frozen["phrases"], features)
        state, found = self.optimise(frozen, self.initial_words(rngs), features, top, rngs)
        last = found.total[-COMPARED:].mean(axis=0).reshape(-1, self.starts)
        best = jnp.where(jnp.isnan(last), jnp.inf, last).argmin(axis=1)
        return state.average[jnp.arange(len(last)) * self.starts + best]

    def optimise(
        self,
        frozen: Params,
        words: jax.Array,
        features: jax.Array,
        top: jax.Array,
        rngs: jax.Array,
    ) -> tuple[State, Losses]:
        """The state after all iterations, and the losses before each, of all starts.

        words: float32[batch * starts, token_dim] to begin with; losses: float32[iterations, batch *
        starts]. features: float32[batch, dim], un-normalised. top: int32[batch, top_k] concepts.
        rngs: one key per image; the result depends on nothing else of the batch.
        """
        repeat, tables = self._of_each_start, frozen["phrases"]
        features = repeat(features)
        backbone = whole(frozen["backbone"])  # once, not in each iteration
        templates, phrases = (
            Suffixes(self, backbone, texts) for texts in (self.phrases.templates, tables.replaced)
        )

        def iteration(state: State, number: jax.Array) -> tuple[State, Losses]:
            which, rows = self.draw(tables, top, rngs, number)
            template = functools.partial(templates.features, repeat(which))
            image = image_term(self.recipe, state.words, template, features)
            phrase = self._phrase_term(frozen, phrases, state.words, rows)
            return update(self.recipe, state, image, phrase)[:2]

        state = start(self.recipe, words)
        return jax.lax.scan(iteration, state, jnp.arange(self.iterations))

    def _of_each_start(self, rows: jax.Array) -> jax.Array:
        """[batch, ...] -> [batch * starts, ...]: all starts of an image see the same texts."""
        return jnp.repeat(rows, self.starts, axis=0)

    def initial_words(self, rngs: jax.Array) -> jax.Array:
        """float32[images * starts, token_dim] ~ N(0, INITIAL_STD**2); rngs: one key per image."""
        shape = (self.starts, self.backbone.token_dim)
        words = INITIAL_STD * jax.vmap(lambda key: jax.random.normal(key, shape))(rngs)
        return words.reshape(-1, shape[1])

    def draw(
        self, tables: Tables, top: jax.Array, rngs: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Template and phrase of each image in iteration `number`: int32[batch] each."""
        keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, number)))(rngs)
        count = len(self.phrases.templates.ids)
        template = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(keys[:, 0])
        draw = self.phrases.draw_any if self.regulariser == "random" else self.phrases.draw
        return template, draw(tables, top, keys[:, 1])

    def _phrase_term(
        self, frozen: Params, phrases: Suffixes, words: jax.Array, rows: jax.Array
    ) -> Term:
        """words: of each start. rows: of `draw`."""
        if self.regulariser == "none":
            return Term(jnp.zeros(len(words)), jnp.zeros_like(words))
        repeat, tables = self._of_each_start, frozen["phrases"]

        def run(original: int, suffix: int) -> Term:
            target = repeat(self.phrases.targets(tables, phrases, rows, original))
            phrase = functools.partial(phrases.features, repeat(rows), length=suffix)
            return phrase_term(self.recipe, words, phrase, target)

        # with the gradient, so that nothing is kept for it outside of the branch that runs
        return self.phrases.at_usual_length(run, tables, rows)
