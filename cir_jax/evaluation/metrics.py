"""Retrieval metrics. They know only ranks: no scores, no features, no dataset.

A rank is 0-based and exact: the number of gallery images that come before the target, where equal
scores are ordered by gallery index, lowest first. Values are percent, as in the papers' tables.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

PAD = -1
"""Fills rows of ground-truth ranks that have fewer entries than the longest."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over queries, in percent.

    se: standard error over queries, s / sqrt(n) with the sample deviation s; NaN for one query.
    It says nothing about the variation between training runs.
    """

    value: float
    se: float
    n: int


def recall(ranks: np.ndarray, k: int) -> np.ndarray:
    """int[queries] ranks of the single target -> float64[queries], 100 where it is in the top k."""
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or (ranks < 0).any():
        raise ValueError("recall wants one rank >= 0 per query")
    return 100.0 * (ranks < k)


def ground_truths(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int[queries, targets] ranks padded with PAD -> where there is one, bool of the same shape,
    and how many each query has, int[queries]. Raises ValueError for a query without any."""
    valid = ranks >= 0
    count = valid.sum(axis=1)
    if (count == 0).any():
        raise ValueError(f"query {int(np.argmin(count))} has no ground truth")
    return valid, count


def average_precision(ranks: np.ndarray, k: int) -> np.ndarray:
    """int[queries, targets] ranks of all ground truths, padded with PAD -> AP@k, float64[queries].

    AP@k = (1 / min(k, G)) sum over the G ground truths with rank r < k of (hits up to r) / (r + 1):
    the definition of CIRCO (arXiv 2303.15247, section 5.1). Raises ValueError for G = 0.
    """
    ranks = np.asarray(ranks, np.int64)
    valid, count = ground_truths(ranks)
    # the i-th ground truth by rank is the i-th hit, so the ranking itself is not needed
    order = np.sort(np.where(valid, ranks, np.iinfo(np.int64).max - 1), axis=1)
    hits = np.arange(1, ranks.shape[1] + 1)[None, :]
    gains = np.where(order < k, hits / (order + 1.0), 0.0)
    return 100.0 * gains.sum(axis=1) / np.minimum(k, count)


def map_at_r(ranks: np.ndarray) -> np.ndarray:
    """int[queries, targets] padded with PAD -> mAP@R, float64[queries].

    AP@R with R = G, the number of the query's ground truths (ECCV Caption, arXiv 2204.03359).
    """
    count = (np.asarray(ranks) >= 0).sum(axis=1)
    out = np.empty(len(ranks))
    for size in np.unique(count):
        rows = count == size
        out[rows] = average_precision(np.asarray(ranks)[rows], int(size))
    return out


def r_precision(ranks: np.ndarray) -> np.ndarray:
    """int[queries, targets] padded with PAD -> share of the top R that is right, R = G; percent."""
    ranks = np.asarray(ranks)
    valid, count = ground_truths(ranks)
    return 100.0 * (valid & (ranks < count[:, None])).sum(axis=1) / count


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """int[queries, targets] padded with PAD -> nDCG@k of equally good targets, float64[queries].

    Sum of 1 / log2(rank + 2) over the targets in the top k, by that of min(k, G) targets in front:
    trec_eval's, which M-BEIR's copies in mteb are scored by. Raises ValueError for G = 0.
    """
    ranks = np.asarray(ranks)
    valid, count = ground_truths(ranks)
    gains = np.where(valid & (ranks < k), 1.0 / np.log2(np.maximum(ranks, 0) + 2.0), 0.0)
    ideal = np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))
    return 100.0 * gains.sum(axis=1) / ideal[np.minimum(count, k) - 1]


def trapezoid_precision(ranks: np.ndarray) -> np.ndarray:
    """int[queries, targets] padded with PAD -> area under the precision-recall curve, percent.

    Between two hits precision is taken as the mean of that before and at the later one, over the
    whole ranking: the mAP of the Oxford buildings, and of i-CIR's released code, whose 1e-5 in the
    denominator is kept. Raises ValueError for queries without ground truth.
    """
    ranks = np.asarray(ranks, np.int64)
    valid, count = ground_truths(ranks)
    order = np.sort(np.where(valid, ranks, np.iinfo(np.int64).max - 1), axis=1)
    hits = np.arange(ranks.shape[1])[None, :]
    before = np.where(order == 0, 1.0, hits / np.maximum(order, 1))
    areas = np.where(hits < count[:, None], (before + (hits + 1) / (order + 1.0)) / 2, 0.0)
    return 100.0 * areas.sum(axis=1) / (count + 1e-5)


def soft_score(ranks: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
    """The best weight of the graded answers in the top k, at least 0: float64[queries], percent.

    ranks: int[queries, answers], PAD = not ranked; weights: float[queries, answers]. CIRR grades
    1, 0.5, 0.2 and -1. From the released code of ARTEMIS (arXiv 2203.08101).
    """
    found = (ranks >= 0) & (ranks < k)
    return 100.0 * np.where(found, weights, 0.0).max(axis=1, initial=0.0)


def best_rank(ranks: np.ndarray) -> np.ndarray:
    """int[queries, targets] padded with PAD -> int[queries]: the best ground truth, PAD if none."""
    ranks = np.asarray(ranks)
    big = np.iinfo(ranks.dtype).max
    best = np.where(ranks >= 0, ranks, big).min(axis=1, initial=big)
    return np.where(best == big, PAD, best)


def estimate(values: np.ndarray) -> Estimate:
    """Mean and standard error of one value per query."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("no queries to average over")
    n = len(values)
    se = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(values.mean()), se, n)


def mean_rank(ranks: np.ndarray) -> Estimate:
    """Mean of the ranks counted from 1 (Pic2Word's table of COCO objects)."""
    return estimate(np.asarray(ranks) + 1)


def median_rank(ranks: np.ndarray) -> Estimate:
    """Median of the ranks, rounded down, counted from 1; without a standard error."""
    return Estimate(float(np.floor(np.median(ranks)) + 1), math.nan, len(ranks))


def mean_of_groups(groups: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent groups (FashionIQ's categories, GeneCIS's tasks)."""
    count = len(groups)
    variance = sum(group.se**2 for group in groups)
    return Estimate(
        sum(group.value for group in groups) / count,
        math.sqrt(variance) / count,
        sum(group.n for group in groups),
    )
