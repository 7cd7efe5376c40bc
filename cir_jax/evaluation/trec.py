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
    valid, count = metrics.ground_truths(ranks)
    return (valid & (ranks < k)).sum(axis=1) / count


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """Likewise `metrics.ndcg`."""
    return metrics.ndcg(ranks, k) / 100


def average_precision(ranks: np.ndarray, k: int) -> np.ndarray:
    """Likewise `map_cut_k`, divided by all ground truths."""
    _, count = metrics.ground_truths(ranks)
    return metrics.average_precision(ranks, k) / 100 * np.minimum(k, count) / count


def scores(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Means over the queries, under mteb's names: ndcg_at_10, recall_at_5, map_at_100, ..."""
    measures = {"ndcg": ndcg, "recall": recall, "map": average_precision}
    return {
        f"{name}_at_{k}": float(measure(ranks, k).mean())
        for name, measure in measures.items()
        for k in ks
    }
