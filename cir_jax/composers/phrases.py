"""The phrase regulariser of SEARLE (arXiv 2303.15247, section 3.1) for pseudo-word methods.

    L_gpt = 1 - cos(text(phrase with the pseudo-word), text(phrase)),

phrase: one about a concept that the image resembles, the concept replaced by the pseudo-word. It
keeps pseudo-words where the text encoder expects words. Association, drawing and loss run in the
compiled program, from `Tables` that lie in `frozen["phrases"]`. A method uses it so:

    def __init__(...):    self.phrases = Phrases.read(path, backbone, top_k, every=True)
    def freeze(...):      phrases = self.phrases.freeze(backbone, p, cached, shapes_only)
                          return super().freeze(p, shapes_only) | {"phrases": phrases}
    def encode(...):      top = self.phrases.associate(frozen["phrases"], features)
                          row = self.phrases.draw_concept_first(frozen["phrases"], top, rngs)
                          loss = phrase_loss(self, self.phrases, frozen, row, words)

Memory: Open Images' 20,931 concepts with 256 phrases each are 5.4 million rows, 10.7 MB per token
of their length and table: 0.9 GB for both at length 40, on each device. The tables are as wide as
their longest phrase; LONG_TAIL says how the few long ones are kept from slowing down the others.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.composers.base import normalise
from cir_jax.composers.losses import cosine_loss
from cir_jax.composers.phrase_features import concept_features, phrase_features
from cir_jax.composers.pseudo_word import PseudoWord
from cir_jax.composers.suffixes import Array, Split, Suffixes, lengths_of
from cir_jax.errors import ConfigError, DataError
from cir_jax.input import phrases as files
from cir_jax.input.text import BUCKET, Tokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.progress import Progress
from cir_jax.storage.places import places

LONG_TAIL = 1e-4
"""The share of phrases longer than `Phrases.usual`: small, as one of them slows down its batch."""


@flax.struct.dataclass
class Tables:
    """Phrases and concepts as the compiled program reads them.

    replaced: the phrases with the placeholder, cut in front of it; ids are uint16 (int32 of large
        vocabularies). original: the phrases themselves, cut at the same place.
    first, count: int32[concepts], a concept's rows; count 0 = discarded (`PhraseBook.discarded`).
    row: int32[rows], concept of each row of `names`; only where concepts are repeated.
    Of `Phrases.freeze`:
    concepts: float32[concepts, dim], unit features: mean over the templates (METHODS 2.1).
    features: float32[phrases, dim], un-normalised, of a book of at most `cached` phrases.
    """

    original: Split
    replaced: Split
    first: Array
    count: Array
    row: Array | None = None
    concepts: Array | None = None
    features: Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Phrases:
    """Tokenised phrases on the host. top_k: concepts of an image.

    templates: with the placeholder in them. ids: int[phrases, length], whole. usual: lengths of
    originals and suffixes that all but LONG_TAIL of the phrases fit into. cut: concepts left out
    because a phrase is too long.
    """

    book: files.PhraseBook
    top_k: int
    templates: Split
    ids: np.ndarray
    tables: Tables
    usual: tuple[int, int]
    source: str
    cut: int

    @classmethod
    def read(
        cls,
        path: str | Path,
        backbone: Backbone,
        top_k: int,
        *,
        every: bool = False,
        suffix: bool = True,
        names: str | Path = "",
        words: int = 1,
    ) -> "Phrases":
        """From a phrase book (`input.phrases.read`).

        every: as SEARLE's phi, not OTI: each occurrence of the concept in a phrase becomes a
            placeholder, not the first alone; a concept is as near as often as `names` lists it, not
            once. suffix: False = phrases are "a photo of {concept}".
        names: file of the concepts to associate images with; "" = all of the book. words:
        placeholders that take the concept's place (`PseudoWord.words_per_image`).
        Raises DataError, ConfigError when top_k is not in 1..concepts.
        """
        path, names = _resolve(path), _resolve(names) if names else None
        stamps = [
            path.stat().st_mtime_ns if path.is_file() else 0 for path in (path, names) if path
        ]
        return _read(path, names, tuple(stamps), backbone, top_k, every, suffix, words)

    @classmethod
    def tokenise(
        cls,
        book: files.PhraseBook,
        backbone: Backbone,
        top_k: int,
        *,
        every: bool = False,
        words: int = 1,
        source: str = "phrases",
    ) -> "Phrases":
        """See `read`."""
        repeated = book.rows if every else ()
        most = len(repeated or book.concepts)
        if not 1 <= top_k <= most:
            raise ConfigError(
                f"top_k={top_k}: {source} has {most} concepts, so it must be in 1..{most}."
            )
        tokenizer, causal = backbone.tokenizer, backbone.family == "clip"
        placeholder = tokenizer.id_of(files.PLACEHOLDER)
        eos = None if backbone.reads_padding else tokenizer.eos_id
        pairs = [
            (phrase, name)
            for name, phrases in book.concepts.items()
            if name not in book.discarded
            for phrase in phrases
        ]
        original = _ids(tokenizer, [phrase for phrase, _ in pairs])
        replaced = _ids(
            tokenizer,
            [files.with_placeholder(phrase, name, every, words) for phrase, name in pairs],
        )
        # truncation may have cut the placeholder off: nothing would be trained there
        lost = ~(replaced == placeholder).any(axis=1)
        cut = {pairs[row][1] for row in np.flatnonzero(lost)}
        keep = np.asarray([name not in cut for _, name in pairs], bool)
        if not keep.any():
            raise DataError(
                f"{source}: no concept is left, as each has a phrase that does not contain it. "
                "Phrases must repeat their concept letter by letter."
            )
        number = {name: i for i, name in enumerate(book.concepts)}
        owners = [number[name] for _, name in pairs]
        count = np.bincount(np.asarray(owners)[keep], minlength=len(number)).astype(np.int32)
        original = original[keep]
        ids = original[:, : lengths_of(original, eos).max()]
        split = Split.of(replaced[keep], placeholder, eos, causal)
        whole = split.like(original, eos)
        lengths = np.stack([whole.lengths, split.lengths], axis=1)
        longest = lengths.max(axis=0)
        usual = np.quantile(lengths, 1 - LONG_TAIL, axis=0, method="higher").astype(int)
        if (longest - usual < BUCKET).all():
            usual = longest  # not worth a branch of its own
        texts = [text.format(files.placeholders(words)) for text in book.templates]
        templates = Split.of(tokenizer(texts), placeholder, eos, causal)
        templates = templates.replace(ids=templates.ids[:, : templates.lengths.max()])
        tables = Tables(
            original=whole.replace(ids=whole.ids[:, : longest[0]]),
            replaced=split.replace(ids=split.ids[:, : longest[1]]),
            first=(np.cumsum(count) - count).astype(np.int32),
            count=count,
            row=np.asarray([number[n] for n in repeated], np.int32) if repeated else None,
        )
        made = cls(book, top_k, templates, ids, tables, tuple(map(int, usual)), source, len(cut))
        if made.dropped and jax.process_index() == 0:
            print(made.report(), flush=True)
        return made

    @property
    def names(self) -> list[str]:
        """Concepts in the order of their index."""
        return list(self.book.concepts)

    @property
    def dropped(self) -> int:
        """Concepts without usable phrases."""
        return int((self.tables.count == 0).sum())

    def report(self) -> str:
        """One line: how many concepts and phrases there are, and how many were discarded."""
        return (
            f"{self.source}: {len(self.names)} concepts, {len(self.ids)} phrases; "
            f"{len(self.book.discarded)} concepts discarded, as one of their phrases does not "
            f"contain them, {self.cut} as it is too long."
        )

    def freeze(
        self, backbone: Backbone, params: Any, cached: int = 0, shapes_only: bool = False
    ) -> Tables:
        """The tables for `frozen["phrases"]`; features in them are computed once and stored.

        params: of the backbone. cached: features of so many phrases are kept, 4 * dim bytes each on
        each device, twice that on the host at first; those of larger books are computed when they
        are drawn. Either way in the backbone's dtype, those of concepts always in float32.
        shapes_only: features are 0 (`Composer.freeze`).
        """
        ids = self.ids

        def made(rows: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
            return np.zeros((rows, backbone.dim), np.float32) if shapes_only else compute()

        concepts = made(len(self.names), lambda: concept_features(self.book, backbone, params))
        features = None
        if len(ids) <= cached:
            features = made(len(ids), lambda: phrase_features(ids, backbone, params))
        return self.tables.replace(concepts=concepts, features=features)

    def targets(
        self, tables: Tables, suffixes: Suffixes, rows: jax.Array, length: int
    ) -> jax.Array:
        """float32[batch, dim]: features of phrases, without a gradient.

        suffixes: of `tables.replaced`. rows: int32[batch]; length: one that they fit into.
        """
        if tables.features is not None:
            return tables.features[rows]
        return jax.lax.stop_gradient(suffixes.without_words(tables.original, rows, length))

    def associate(self, tables: Tables, features: jax.Array) -> jax.Array:
        """The top_k concepts nearest to each image, best first: int32[batch, top_k].

        Of a table with rows, a repeated concept is there as often as its rows are among the top_k.
        features: float32[batch, dim], un-normalised image features. Discarded concepts count, too:
        the released code leaves them out after the cut. Where that leaves none, it stops with an
        error (OTI) or draws forever (phi); here the nearest concept with phrases is the last one.
        In float32 on every device, in training, too: less would choose other concepts.
        """
        images = normalise(features.astype(jnp.float32))
        scores = jnp.matmul(images, tables.concepts.T, precision="highest")
        row = tables.row
        of_rows = scores if row is None else scores[:, row]
        top = jax.lax.top_k(of_rows, self.top_k)[1].astype(jnp.int32)
        top = top if row is None else jnp.take(row, top)
        usable = tables.count > 0
        nearest = jnp.where(usable[None], scores, -jnp.inf).argmax(axis=-1).astype(jnp.int32)
        last = jnp.where(usable[top].any(axis=-1), top[:, -1], nearest)
        return top.at[:, -1].set(last)

    def draw(self, tables: Tables, top: jax.Array, rngs: jax.Array) -> jax.Array:
        """int32[batch]: a phrase of each image, uniform over all phrases of its concepts (OTI).

        top: of `associate`, so with phrases. rngs: one key per image.
        """

        def one(concepts: jax.Array, rng: jax.Array) -> jax.Array:
            ends = jnp.cumsum(tables.count[concepts])
            drawn = jax.random.randint(rng, (), 0, ends[-1])
            slot = jnp.searchsorted(ends, drawn, side="right")
            before = ends - tables.count[concepts]
            return tables.first[concepts[slot]] + drawn - before[slot]

        return jax.vmap(one)(top, rngs)

    def draw_concept_first(self, tables: Tables, top: jax.Array, rngs: jax.Array) -> jax.Array:
        """int32[batch]: uniform over an image's concepts, then over the concept's phrases (phi).

        top, rngs: as `draw`.
        """

        def one(concepts: jax.Array, rng: jax.Array) -> jax.Array:
            which, what = jax.random.split(rng)
            count = tables.count[concepts]
            ends = jnp.cumsum(count > 0)
            slot = jax.random.randint(which, (), 0, ends[-1])
            slot = jnp.searchsorted(ends, slot, side="right")
            return tables.first[concepts[slot]] + jax.random.randint(what, (), 0, count[slot])

        return jax.vmap(one)(top, rngs)

    def draw_any(self, tables: Tables, top: jax.Array, rngs: jax.Array) -> jax.Array:
        """int32[batch]: a phrase of any concept, whatever the image shows (SEARLE's ablation)."""
        total = len(tables.original.ids)
        return jax.vmap(lambda rng: jax.random.randint(rng, (), 0, total))(rngs)

    def at_usual_length(
        self, run: Callable[[int, int], Any], tables: Tables, rows: jax.Array
    ) -> Any:
        """run(length of originals, length of suffixes), lengths that all of the rows fit into.

        What it returns must not depend on them.
        """
        longest = tables.original.ids.shape[1], tables.replaced.ids.shape[1]
        if self.usual == longest:
            return run(*longest)
        fits = tables.replaced.lengths[rows] <= self.usual[1]
        if tables.features is None:  # else the originals are not read
            fits &= tables.original.lengths[rows] <= self.usual[0]
        # one condition for the whole batch: only one branch runs
        return jax.lax.cond(fits.all(), lambda: run(*self.usual), lambda: run(*longest))


def phrase_loss(
    composer: PseudoWord, phrases: Phrases, frozen: Any, rows: jax.Array, words: jax.Array
) -> jax.Array:
    """float32[batch]: 1 - cosine of each drawn phrase with and without its pseudo-word.

    frozen: with "backbone" and "phrases". rows: int32[batch] from a draw. words:
    [batch, token_dim]. No gradient flows into the original phrases.
    """
    tables = frozen["phrases"]
    suffixes = Suffixes(composer, frozen["backbone"], tables.replaced)

    def run(original: int, suffix: int) -> jax.Array:
        target = phrases.targets(tables, suffixes, rows, original)
        return cosine_loss(suffixes.features(rows, words, suffix), target)

    return phrases.at_usual_length(run, tables, rows)


@functools.lru_cache(maxsize=2)  # a dry run and the run build the same composer; minutes at scale
def _read(
    path: Path,
    names: Path | None,
    stamps: tuple[int, ...],
    backbone: Backbone,
    top_k: int,
    every: bool,
    suffix: bool,
    words: int,
) -> Phrases:
    """See `Phrases.read`. stamps: times of the files, so that a changed one is read again."""
    del stamps
    book = files.read(path)
    if names:
        book = book.only(files.read_names(names), str(names))
    book = book if suffix else book.without_suffix()
    return Phrases.tokenise(book, backbone, top_k, every=every, words=words, source=str(path))


def _resolve(path: str | Path) -> Path:
    """A path as given, or relative to the repository (the embedded world's phrases)."""
    given, ours = places(path)
    return ours if ours.is_file() and not given.is_file() else given


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """int32[texts, context_length]; in parts, so that strings and ids of few are held at once."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    out = np.empty((len(texts), tokenizer.context_length), dtype)
    size = 1 << 14
    starts = range(0, len(texts), size)
    for start in Progress(
        starts, desc="tokenising phrases", delay=5, disable=jax.process_index() != 0
    ):
        out[start : start + size] = tokenizer(texts[start : start + size], tokenizer.context_length)
    return out
