"""Captions with their keywords masked, as LinCIR trains on them (arXiv 2312.01998, section 3.2),
and text triplets, cleaned alike.

The rules are the released code's, its oddities included, and are told where they stand. Keywords
come from spaCy, or from a dictionary of parts of speech where the vocabulary is closed (the
embedded world needs no spaCy).
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import grain
import numpy as np

from cir_jax.errors import ConfigError, DataError
from cir_jax.input.text import Tokenizer

SPACY_MODEL = "en_core_web_sm"
PLACEHOLDER = "$"
KEYWORD_TAGS = ("NOUN", "PROPN", "ADJ", "DET")

Tagger = Callable[[str], Iterable[tuple[str, str]]]
"""Text -> (word, part of speech) of each of its words, in the names of Universal Dependencies."""


def tagger(name: str) -> Tagger:
    """ "spacy", or the path of a dictionary in JSON: {"NOUN": ["star", ...], "ADJ": [...], ...}.

    Raises ConfigError when spaCy or its model is not installed, DataError for a dictionary that
    is missing or has no keywords in it.
    """
    return SpacyTagger.load() if name == "spacy" else DictionaryTagger.read(name)


@dataclasses.dataclass(frozen=True)
class SpacyTagger:
    """spaCy's tagger; loaded again, not copied, in worker processes."""

    model: str = SPACY_MODEL

    @classmethod
    def load(cls) -> "SpacyTagger":
        made = cls()
        _spacy(made.model)
        return made

    def __call__(self, text: str) -> list[tuple[str, str]]:
        return [(token.text, token.pos_) for token in _spacy(self.model)(text)]


@functools.cache
def _spacy(model: str) -> Callable[[str], Iterable]:
    try:
        import spacy

        # the parser and entities are not used, and take half of the time
        return spacy.load(model, exclude=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"keywords='spacy': {error}. Install it, `pip install cir_jax[keywords]` and "
            f"`python -m spacy download {model}`, or give a dictionary of parts of speech."
        ) from error


@dataclasses.dataclass(frozen=True)
class DictionaryTagger:
    """Words by their part of speech; a word that is not there is no keyword."""

    tags: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> "DictionaryTagger":
        """From a JSON file, also relative to the repository."""
        from cir_jax.storage.places import places

        found = next((place for place in places(path) if place.is_file()), Path(path))
        try:
            groups = json.loads(found.read_text(encoding="utf-8"))
            tags = {word: tag for tag, words in groups.items() for word in words}
        except OSError as error:
            raise DataError(
                f"{found}: no dictionary of parts of speech ({error.strerror}). Give 'spacy', or "
                'the path of a JSON file {"NOUN": ["star", ...], "ADJ": [...]}.'
            ) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(
                f"{found}: not a dictionary of parts of speech ({error}); expected "
                '{"NOUN": ["star", ...], "ADJ": [...]}.'
            ) from error
        if not set(tags.values()) & set(KEYWORD_TAGS):
            raise DataError(
                f"{found}: holds no keywords: none of its parts of speech is one of "
                f"{', '.join(KEYWORD_TAGS)}."
            )
        return cls(tags)

    def __call__(self, text: str) -> list[tuple[str, str]]:
        return [(word, self.tags.get(word, "X")) for word in text.split()]


def clean(caption: str, tokenizer: Tokenizer) -> str:
    """The caption as LinCIR reads it: lower case, without `$`, no longer than the text tower."""
    text = caption.replace("<PERSON>", "person").lower().replace(PLACEHOLDER, "").strip()
    return tokenizer.shorten(text)


def keywords(caption: str, tag: Tagger) -> list[str]:
    """Maximal runs of keyword tags, each joined by single spaces."""
    runs: list[list[str]] = [[]]
    for word, part in tag(caption):
        if part in KEYWORD_TAGS:
            runs[-1].append(word)
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if run]


def mask(caption: str, words: Sequence[str], rng: np.random.Generator) -> str:
    """The caption with each keyword replaced by " $ ".

    Replaced as a substring and everywhere, so inside longer words too. A keyword that is no
    substring (it is joined by other spaces than the caption's) makes a random word the last to be
    replaced; so does a caption without keywords. Words are what single spaces part, as in the
    release: the one word of an empty caption is "", so that it becomes " $ "; between double spaces
    there is an empty word, whose replacement puts " $ " around every letter.
    """
    masked = caption
    for word in words:
        if word not in caption:
            break
        masked = masked.replace(word, f" {PLACEHOLDER} ")
    else:
        if words:
            return masked
    parts = caption.split(" ")
    return masked.replace(parts[rng.integers(len(parts))], f" {PLACEHOLDER} ")


@dataclasses.dataclass(frozen=True)
class MaskedCaptions(grain.transforms.RandomMap):
    """A record's caption, a random one where it has several: token_ids and masked_token_ids."""

    tokenizer: Tokenizer
    tag: Tagger

    def random_map(
        self, element: dict[str, Sequence[bytes]], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        captions = element["captions"]
        caption = captions[rng.integers(len(captions))].decode()
        caption = clean(caption, self.tokenizer)
        masked = mask(caption, keywords(caption, self.tag), rng)
        ids, masked_ids = self.tokenizer([caption, masked], length=self.tokenizer.context_length)
        if self.tokenizer.id_of(PLACEHOLDER) not in masked_ids:  # truncated, or glued to a letter
            masked = f"a photo of {PLACEHOLDER}"
            masked_ids = self.tokenizer([masked], length=self.tokenizer.context_length)[0]
        return {"token_ids": ids, "masked_token_ids": masked_ids}


@dataclasses.dataclass(frozen=True)
class TextTriplets(grain.transforms.RandomMap):
    """Two captions and the text between them, as RTD trains on them: reference_token_ids and
    target_token_ids of the captions, cleaned; token_ids of the query, its text as it is.

    template: of the query, {} where the text comes.
    """

    tokenizer: Tokenizer
    template: str

    def random_map(
        self, element: dict[str, bytes], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        del rng
        captions = [element[f"{name}_caption"].decode() for name in ("reference", "target")]
        query = self.template.replace("{}", self.tokenizer.plain(element["text"].decode()))
        texts = [*(clean(caption, self.tokenizer) for caption in captions), query]
        ids = self.tokenizer(texts, length=self.tokenizer.context_length)
        return dict(zip(("reference_token_ids", "target_token_ids", "token_ids"), ids, strict=True))
