"""trec_eval's measures, which mteb and M-BEIR report, from the ranks that we have.

They take all ground truths of a query, weigh them alike, and are shares of 1; ours of
`metrics` are percent. Where a query has one ground truth, recall here is R@K there. Where it has
several, they differ: R@K asks for the single target that the query was made of, recall for all;
and trec_eval's average precision at k divides by all G ground truths, CIRCO's by min(k, G), so

    trec_eval's = CIRCO's * min(k, G) / G

A perfect ranking has 1 of CIRCO's, and k / G < 1 of trec_eval's where k < G.
"""

from collections.abc import Sequence

import numpy as np

from cir_jax.evaluation import metrics


def recall(ranks: np.ndarray, k: int) -> np.ndarray:
    """int[queries, targets] ranks from 0, padded with -1 -> float64[queries]: share found in k."""
    valid, count = _valid(ranks)
    return (valid & (ranks < k)).sum(axis=1) / count


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """Likewise: the sum of 1 / log2(rank + 2) over ground truths in the top k, over the same of a
    perfect ranking, which has min(k, G) of them."""
    valid, count = _valid(ranks)
    gains = np.where(valid & (ranks < k), 1 / np.log2(np.maximum(ranks, 0) + 2.0), 0.0)
    perfect = np.cumsum(1 / np.log2(np.arange(k) + 2.0))
    return gains.sum(axis=1) / perfect[np.minimum(k, count) - 1]


def average_precision(ranks: np.ndarray, k: int) -> np.ndarray:
    """Likewise `map_cut_k`, divided by all ground truths."""
    _, count = _valid(ranks)
    return metrics.average_precision(ranks, k) / 100 * np.minimum(k, count) / count


def scores(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Means over the queries, under mteb's names: ndcg_at_10, recall_at_5, map_at_100, ..."""
    measures = {"ndcg": ndcg, "recall": recall, "map": average_precision}
    return {
        f"{name}_at_{k}": float(measure(ranks, k).mean())
        for name, measure in measures.items()
        for k in ks
    }


def _valid(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    valid = ranks >= 0
    count = valid.sum(axis=1)
    if not count.all():
        raise ValueError(f"query {int(np.argmin(count))} has no ground truth")
    return valid, count
