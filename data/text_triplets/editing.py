"""From a caption and its keywords to triplets: draw a template, a keyword, an alternative."""

import dataclasses
import functools
import random
import re
from collections.abc import Mapping, Sequence

from data.text_triplets.templates import kind
from data.text_triplets.vocabulary import Keyword, Vocabulary

# by letters, as no dictionary of sounds is here; "an hour" and "a unicorn" are most of what differs
_VOWEL = re.compile(
    r"[ai]|e(?!u)|o(?!ne)|u(?!ni|s[aeu]|t[ei]|r[aei])|hour|honest|honou?r|heir", re.IGNORECASE
)
_ARTICLE = re.compile(r"(?<![\w'-])(an?\s+)(\w+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Triplet:
    """reference, target: captions. kind: of templates.KINDS. source: the keyword that went; other:
    that which came in its place, "" of a deletion."""

    reference: str
    target: str
    text: str
    kind: str
    source: str
    other: str


@dataclasses.dataclass(frozen=True)
class Rules:
    """templates: by part of speech; those of "" are for the others.
    deletions: which keywords deletions may take, "any" as in the papers, or only "modifiers", whose
    caption stays a sentence ("a red star" without red).
    per_caption: triplets of a caption, at most.
    """

    templates: Mapping[str, Sequence[str]]
    deletions: str = "any"
    per_caption: int = 1


def triplets(
    caption: str,
    words: Sequence[Keyword],
    vocabulary: Vocabulary,
    rules: Rules,
    rng: random.Random,
) -> list[Triplet]:
    """Triplets of the caption, none twice; [] where no keyword can be exchanged or deleted."""
    words = [word for word in words if word.key in vocabulary]
    there = {word.word for word in words}
    others = {
        word: [other for other in vocabulary.alternatives(word.key) if other not in there]
        for word in words
    }
    made: dict[tuple[str, str], Triplet] = {}
    for _ in range(rules.per_caption):
        if triplet := _triplet(caption, others, rules, rng):
            made.setdefault((triplet.target, triplet.text), triplet)
    return list(made.values())


def _triplet(
    caption: str, others: Mapping[Keyword, Sequence[str]], rules: Rules, rng: random.Random
) -> Triplet | None:
    """All keywords are as likely, then all templates that it can be edited with."""
    possible = []
    for word, alternatives in others.items():
        deletable = rules.deletions == "any" or word.modifier
        templates = rules.templates.get(word.part, rules.templates.get("", ()))
        fit = [t for t in templates if (deletable if kind(t) == "deletion" else alternatives)]
        if fit:
            possible.append((word, fit))
    while possible:
        word, fit = possible.pop(_below(rng, len(possible)))
        template = fit[_below(rng, len(fit))]
        other = "" if kind(template) == "deletion" else others[word][_below(rng, len(others[word]))]
        target = replaced(caption, word.word, other)
        # a tagger may part words that `replaced` does not; of a caption something must be left
        if target and target != caption:
            text = with_articles(template.format(source=word.word, target=other))
            return Triplet(caption, target, text, kind(template), word.word, other)
    return None


def replaced(caption: str, word: str, other: str) -> str:
    """The caption with the word exchanged wherever it stands as a whole word; "" deletes it.

    An article before it fits what now follows. "" when nothing is left.
    """

    def exchange(found: re.Match[str]) -> str:
        before = found["article"] or ""
        return (fitting(before, other or found["next"]) if before else "") + other

    return _pattern(word, not other).sub(exchange, caption).strip()


@functools.lru_cache(1 << 16)  # most of the time of a triplet goes into the compilation
def _pattern(word: str, gone: bool) -> re.Pattern[str]:
    """The whole word with the article before it; with the space that set it apart, if it goes."""
    pattern = rf"(?<![\w'-]){re.escape(word)}(?![\w-])"
    if gone:
        pattern = rf"{pattern}\s+|\s*{pattern}"
    article = rf"(?P<article>(?<![\w'-])an?\s+)?(?:{pattern})(?=(?P<next>\w*))"
    return re.compile(article, re.IGNORECASE)


def with_articles(text: str) -> str:
    """Every "a" and "an" as the next word wants it."""
    return _ARTICLE.sub(lambda found: fitting(found[1], found[2]) + found[2], text)


def fitting(article: str, word: str) -> str:
    """ "a " or "an " (spaces and capital as they are) by the first letters of the word."""
    spaces = article[len(article.rstrip()) :]
    return article[0] + ("n" if _VOWEL.match(word) else "") + spaces


def _below(rng: random.Random, n: int) -> int:
    """Less than n. Of all of `random`, only random() gives the same numbers in every Python."""
    return int(rng.random() * n)
