"""Whether annotations are worth something: words, agreement, what was missed."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cir_jax.errors import DataError

PREFIX = "Unlike the provided image, I want a photo of {concept} that"
"""What a relative caption goes on from (Appendix B.1)."""

SHORT = 3
"""Words; CIRCO's captions have 10.4 on average."""

_WORD = re.compile(r"[^\W\d_]+")
_SMALL = frozenset(
    "a an the of on in at to with and or is are it its that this there has have from by for as no "
    "not one two three some other more than photo image picture".split()
)
_POINTING = re.compile(
    r"\b(?:reference|provided|first|original|other|this) (?:image|photo|picture)\b"
)


def remarks(concept: str, caption: str, text_rank: int | None = None) -> list[str]:
    """What an annotator should look at again, in sentences; [] = nothing.

    text_rank: place of the target, from 1, in the search by the caption alone; None = far behind.
    """
    said = []
    small, words = caption.casefold().strip(), _WORD.findall(caption.casefold())
    if small.startswith(("unlike the provided image", "i want a photo")):
        said.append("The prefix stands before the caption already: begin behind “that”.")
    if len(words) < SHORT:
        said.append(f"{len(words)} words say little: what has the target that others have not?")
    again = [word for word in dict.fromkeys(words) if word in _content(concept)]
    if again:
        said.append(
            f"“{again[0]}” is in the shared concept: the reference image says it, the caption "
            "should not."
        )
    if _POINTING.search(small):
        said.append("The caption speaks of the image; it goes on from “a photo of ... that”.")
    if small.endswith("."):
        said.append("No full stop: the caption is the end of a sentence that others begin.")
    if text_rank == 1:
        said.append(
            "The caption alone finds the target first: the reference image is not needed. Say what "
            "changes rather than what is seen."
        )
    return said


def _content(text: str) -> set[str]:
    """Its words that mean something, also in the other number."""
    words = {word for word in _WORD.findall(text.casefold()) if word not in _SMALL}
    return words | {f"{word}s" for word in words} | {word.removesuffix("s") for word in words}


class Estimate(NamedTuple):
    """total: right answers that there are, by the estimate; found: share of them that is
    annotated, at most 1."""

    total: float
    found: float


def estimate(annotated: int, by_methods: int, recall: float) -> Estimate:
    """How many right answers were missed (Appendix B.2).

    Methods find the share `recall` of the targets that were chosen without them; so what they
    found of all right answers is taken for the same share of those that there are.

    annotated: right answers in all; by_methods: those of them that methods found; recall: of the
    targets within what methods find, 0 to 1.
    Raises DataError where these cannot be so.
    """
    if not 0 <= by_methods <= annotated:
        raise DataError(f"{by_methods} of {annotated} right answers were found by methods?")
    if not 0 < recall <= 1:
        raise DataError(f"recall={recall}: methods must find some of the targets.")
    total = max(by_methods / recall, float(annotated))
    return Estimate(total, annotated / total if total else 1.0)


def kappa(said: Sequence[Mapping[bytes, bool]]) -> float | None:
    """Cohen's kappa of annotators over what both of a pair judged, mean over the pairs; None where
    no pair has judged the same, or all is one answer."""
    found = []
    for one, other in itertools.combinations(said, 2):
        both = sorted(set(one) & set(other))
        if not both:
            continue
        same = sum(one[x] == other[x] for x in both) / len(both)
        yes = [sum(x[photo] for photo in both) / len(both) for x in (one, other)]
        chance = yes[0] * yes[1] + (1 - yes[0]) * (1 - yes[1])
        if chance < 1:
            found.append((same - chance) / (1 - chance))
    return sum(found) / len(found) if found else None
