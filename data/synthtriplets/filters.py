"""The five CLIP filters of SynthTriplets18M (CompoDiff, arXiv 2303.11916, section 4.4).

Cosines of unit CLIP features, I of images, T of captions, 0 of the reference and 1 of the target:

    image_image        cos(I0, I1)                      the images are not too different
    image_caption      min(cos(I0, T0), cos(I1, T1))    each fits its caption
    directional        cos(I1 - I0, T1 - T0)            images change as the captions do
    keyword_image      min over the keywords of         triplets of keywords: what was exchanged
                       cos(I, keyword)                  is in the image it belongs to
    instruction_image  cos(I1, instruction)             triplets of the LLM

The paper prints the third as 1 - sim(images) sim(captions), and says that it follows IP2P, which
computes what stands here. A deletion has no second keyword. A pair falls at the first filter, in
this order, whose threshold it is below; what is missing (NaN) is not asked.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cir_jax.errors import ConfigError, unknown

THRESHOLDS = {
    "image_image": 0.70,
    "image_caption": 0.20,
    "directional": 0.20,
    "keyword_image": 0.20,
    "instruction_image": 0.20,
}
"""The paper's, for CLIP ViT-L/14."""

BEST = 4
"""Pairs kept of the samples of one triplet, those of the greatest directional similarity (IP2P)."""

_BINS = 200


def read_thresholds(values: Sequence[str]) -> dict[str, float]:
    """The flag --thresholds: FILTER=COSINE items; others are the paper's. Raises ConfigError."""
    chosen = dict(THRESHOLDS)
    for value in values:
        name, _, number = value.partition("=")
        if name not in chosen:
            raise ConfigError(unknown("filter in --thresholds:", name, THRESHOLDS))
        try:
            chosen[name] = float(number)
        except ValueError:
            chosen[name] = np.nan
        if not -1 <= chosen[name] <= 1:
            raise ConfigError(f"--thresholds: {value}: expected a cosine, such as {name}=0.2.")
    return chosen


@dataclasses.dataclass(frozen=True)
class Features:
    """Of `pairs` pairs, all float32[pairs, dim] of unit norm; rows of NaN where there is none."""

    reference: np.ndarray
    target: np.ndarray
    reference_caption: np.ndarray
    target_caption: np.ndarray
    instruction: np.ndarray
    source_keyword: np.ndarray
    target_keyword: np.ndarray


def similarities(features: Features) -> dict[str, np.ndarray]:
    """Filter -> float32[pairs]; NaN where the filter is not for the pair.

    A pair without keywords is one of the LLM.
    """
    f = features

    def cos(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return (a * b).sum(axis=1) / np.maximum(norms, 1e-12)

    keywords = np.fmin(cos(f.reference, f.source_keyword), cos(f.target, f.target_keyword))
    instruction = cos(f.target, f.instruction)
    return {
        "image_image": cos(f.reference, f.target),
        "image_caption": np.minimum(
            cos(f.reference, f.reference_caption), cos(f.target, f.target_caption)
        ),
        "directional": cos(f.target - f.reference, f.target_caption - f.reference_caption),
        "keyword_image": keywords,
        "instruction_image": np.where(np.isnan(keywords), instruction, np.nan),
    }


def falls(
    found: Mapping[str, np.ndarray], thresholds: Mapping[str, float], groups: np.ndarray, best: int
) -> list[str]:
    """Of each pair the first filter that it falls at, "best" for one too many of its triplet, ""
    for what is kept. groups: int[pairs], the triplet of each pair."""
    verdict = np.full(len(groups), "", object)
    for name in reversed(THRESHOLDS):
        verdict[found[name] < thresholds[name]] = name
    for group in np.unique(groups):
        passed = np.flatnonzero((groups == group) & (verdict == ""))
        order = np.argsort(-found["directional"][passed], kind="stable")
        verdict[passed[order[best:]]] = "best"
    return list(verdict)


def count(
    found: Mapping[str, np.ndarray], verdict: Sequence[str], thresholds: Mapping[str, float]
) -> dict[str, Any]:
    """Statistics of some pairs, as JSON holds them; `add` joins them.

    kept, best (one too many of a triplet), and of each filter how many pairs it was asked about,
    how many were below its threshold, how many fell there (not before), and a histogram.
    """
    filters = {}
    for name in THRESHOLDS:
        asked = found[name][~np.isnan(found[name])]
        filters[name] = {
            "pairs": len(asked),
            "below": int((asked < thresholds[name]).sum()),
            "fell": verdict.count(name),
            "histogram": np.histogram(asked, _BINS, (-1, 1))[0].tolist(),
        }
    counts = {"pairs": len(verdict), "kept": verdict.count(""), "best": verdict.count("best")}
    return counts | {"filters": filters}


def add(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The sum of two `count`s."""

    def total(a: Any, b: Any) -> Any:
        if isinstance(a, Mapping):
            return {key: total(a[key], b[key]) for key in a}
        return [x + y for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b

    return total(first, second)


def quantiles(histogram: Sequence[int]) -> list[float]:
    """Similarities that 10, 50 and 90 % of the pairs are below, to a bin of 0.01; [] of nothing."""
    sums = np.cumsum(histogram)
    if not sums[-1]:
        return []
    edges = np.linspace(-1, 1, _BINS + 1)[1:]
    return [round(float(edges[np.searchsorted(sums, q * sums[-1])]), 2) for q in (0.1, 0.5, 0.9)]


def describe(counts: Mapping[str, Any]) -> str:
    """One line of what fell where."""
    fell = ", ".join(f"{c['fell']:,} {name}" for name, c in counts["filters"].items())
    return (
        f"{counts['kept']:,} of {counts['pairs']:,} pairs kept; fell: {fell}, "
        f"{counts['best']:,} too many of a triplet"
    )
