"""Caption retrieval: text -> image and image -> text, which judges a pretrained backbone."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cir_jax.composers import conditions
from cir_jax.composers.base import Composer, Params
from cir_jax.errors import ConfigError
from cir_jax.evaluation import metrics
from cir_jax.evaluation.asked import Asked
from cir_jax.evaluation.metrics import Estimate
from cir_jax.evaluation.queries import CaptionBenchmark, pad_rows
from cir_jax.evaluation.result import Result
from cir_jax.retrieval import features, ranking

KINDS = ("detailed", "partial")

TRUTHS = {"original": "COCO 5k", "cxc": "CxC", "eccv": "ECCV"}
"""Ground truth of `CaptionBenchmark` -> what its metrics are called."""

FOLDS = 5
"""Of COCO 1k."""


def evaluate(
    composer: Composer,
    params: Params,
    frozen: Params,
    benchmark: CaptionBenchmark,
    *,
    mesh: Mesh,
    batch_size: int = 256,
    seed: int = 0,
    cache_dir: Path | None = None,
    method: str = "",
    asked: Asked | None = None,
) -> Result:
    """Text to image (t2i) and back (i2t); every caption is a text query.

    Embedded world: `t2i R@k/kind` and `i2t R@k/kind` for detailed and partial captions; an image
    finds its text when any of its captions of the kind is in the top k. Partial captions fit
    several images, which limits their recall whatever the backbone.
    COCO: see `coco_metrics`.
    composer: one whose `compose` reads text alone, or does without a reference: its features are
    zeros, and `has_reference` is False (CompoDiff, arXiv 2303.11916, table 5).
    asked: of every caption, already `Asked.of` the composer; an image is in none of these queries.
    Raises ConfigError for one whose score is no dot product: images do not look for texts by it.
    """
    if type(composer).score is not Composer.score:
        raise ConfigError(
            f"{benchmark.name} is searched in both directions, and the score of "
            f"{type(composer).__name__} has one, from queries to images. Leave it out of "
            "--config.evaluation.benchmarks."
        )
    if asked is not None:
        conditions.check_query(asked.conditions, None)
    composer = (asked or Asked()).conditions.vary(composer, text_alone=True)
    began = time.perf_counter()
    options: dict[str, Any] = dict(mesh=mesh, batch_size=batch_size)
    gallery = features.gallery_features(
        composer, params, frozen, benchmark.gallery, cache_dir=cache_dir, **options
    )
    encoded = time.perf_counter()
    texts = [composer.prompt(text) for captions in benchmark.captions for text in captions]
    owner = np.repeat(
        np.arange(len(benchmark.captions), dtype=np.int32), list(map(len, benchmark.captions))
    )
    length = None if composer.pools_text else composer.backbone.context_length
    queries = features.query_features(
        composer,
        params,
        frozen,
        composer.backbone.tokenizer(texts, length),
        np.arange(len(texts), dtype=np.int32),
        reference_features=np.zeros((len(texts), composer.backbone.dim), np.float32),
        has_reference=False,
        fields=conditions.fields(composer, asked.conditions, len(texts)) if asked else None,
        description=f"{benchmark.name} captions",
        seed=seed,
        **options,
    )
    measured = coco_metrics if benchmark.truths else _kinds
    found, headline, ranked = measured(benchmark, queries, gallery, owner)
    ended = time.perf_counter()
    return Result(
        **Result.what(composer, benchmark, seed, asked),
        method=method or type(composer).__name__,
        metrics=found,
        headline=headline,
        seconds=ended - began,
        queries_per_second=len(texts) / (ended - encoded),
        top=ranked.top,
        scores=ranked.scores,
        subset_top=np.zeros((len(gallery), 0), np.int32),
        outcome=None,
    )


Measured = tuple[dict[str, Estimate], tuple[str, ...], ranking.Ranking]
"""All metrics, the names of the headline, the ranking of images for the texts."""


def _kinds(
    benchmark: CaptionBenchmark, queries: np.ndarray, gallery: np.ndarray, owner: np.ndarray
) -> Measured:
    first = np.concatenate([[True], owner[1:] != owner[:-1]])
    found, tops = {}, {}
    for kind, chosen in zip(KINDS, (first, ~first), strict=True):
        mine = owner[chosen]
        ranked = ranking.rank(queries[chosen], gallery, k=10, targets=mine[:, None])
        own = pad_rows([np.flatnonzero(mine == image) for image in range(len(gallery))])
        back = ranking.rank(gallery, queries[chosen], k=1, targets=own)
        tops[kind] = ranked
        for direction, ranks in (
            ("t2i", ranked.target_ranks[:, 0]),
            ("i2t", metrics.best_rank(back.target_ranks)),
        ):
            for k in benchmark.protocol.recall:
                found[f"{direction} R@{k}/{kind}"] = metrics.estimate(metrics.recall(ranks, k))
    headline = tuple(name for name in found if name.endswith("/detailed"))
    return found, headline, tops["detailed"]


def coco_metrics(
    benchmark: CaptionBenchmark, texts: np.ndarray, images: np.ndarray, owner: np.ndarray
) -> Measured:
    """COCO 5k and 1k, CxC: R@K, 1 where any right answer is in the top K. ECCV Caption: mAP@R,
    R-Precision and R@1. All rank everything, but COCO 1k, the mean of five folds.

    texts float32[captions, dim], images float32[images, dim]; owner int32[captions]: their image.
    ECCV Caption's package (arXiv 2204.03359), as CompoDiff's table 5 uses it.
    """
    found: dict[str, Estimate] = {}
    sides = {"i2t": (images, texts), "t2i": (texts, images)}
    ks = benchmark.protocol.recall
    for direction, (queries, gallery) in sides.items():
        for truth, name in TRUTHS.items():
            if truth not in benchmark.truths:
                continue  # not prepared: `benchmark.absent` says so
            right = benchmark.truths[truth][direction]
            chosen = queries[right.queries]
            ranks = ranking.rank(chosen, gallery, k=1, targets=pad_rows(right.targets)).target_ranks
            best = metrics.best_rank(ranks)
            if truth != "eccv":
                values = {f"R@{k}": metrics.recall(best, k) for k in ks}
            else:
                values = {"mAP@R": metrics.map_at_r(ranks), "R-P": metrics.r_precision(ranks)}
                values["R@1"] = metrics.recall(best, 1)
            found |= {f"{direction} {name} {k}": metrics.estimate(v) for k, v in values.items()}
    headline = tuple(found)
    folds = [_fold(benchmark, texts, images, owner, number) for number in range(FOLDS)]
    for direction in sides:
        for k in ks:
            name = f"{direction} COCO 1k R@{k}"
            recalls = [metrics.estimate(metrics.recall(fold[direction], k)) for fold in folds]
            found[name] = metrics.mean_of_groups(recalls)
    return found, headline, ranking.rank(texts, images, k=10)


def _fold(
    benchmark: CaptionBenchmark,
    texts: np.ndarray,
    images: np.ndarray,
    owner: np.ndarray,
    number: int,
) -> dict[str, np.ndarray]:
    """Best ranks within a fifth of the captions, in their official order, and their images."""
    assert benchmark.order is not None
    official = np.argsort(benchmark.order)  # official number -> position here
    size = len(official) // FOLDS
    mine = np.sort(official[number * size : (number + 1) * size])
    here, local = np.unique(owner[mine], return_inverse=True)
    own = pad_rows([np.flatnonzero(local == image) for image in range(len(here))])
    t2i = ranking.rank(texts[mine], images[here], k=1, targets=local[:, None].astype(np.int32))
    i2t = ranking.rank(images[here], texts[mine], k=1, targets=own)
    return {
        "t2i": metrics.best_rank(t2i.target_ranks),
        "i2t": metrics.best_rank(i2t.target_ranks),
    }
