"""Caption retrieval: text -> image and image -> text, which judges a pretrained backbone."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cir_jax.composers.base import Composer, Params
from cir_jax.evaluation import metrics
from cir_jax.evaluation.benchmarks import CaptionBenchmark, pad_rows
from cir_jax.evaluation.result import Result
from cir_jax.retrieval import features, ranking

KINDS = ("detailed", "partial")


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
) -> Result:
    """`t2i R@k/kind` and `i2t R@k/kind`: text to image and back, detailed and partial captions.

    composer: one whose `compose` reads text alone (ClipPretraining, TextOnly). Every caption is a
    text query; an image finds its text when any of its captions of the kind is in the top k.
    Partial captions fit several images, which limits their recall whatever the backbone.
    """
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
    first = np.concatenate([[True], owner[1:] != owner[:-1]])
    length = None if composer.pools_text else composer.backbone.context_length
    queries = features.query_features(
        composer,
        params,
        frozen,
        composer.backbone.tokenizer(texts, length),
        np.arange(len(texts), dtype=np.int32),
        reference_features=np.zeros((len(texts), composer.backbone.dim), np.float32),
        description=f"{benchmark.name} captions",
        seed=seed,
        **options,
    )
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
    ended = time.perf_counter()
    return Result(
        method=method or type(composer).__name__,
        benchmark=benchmark.name,
        split=benchmark.split,
        protocol=benchmark.protocol,
        metrics=found,
        headline=tuple(name for name in found if name.endswith("/detailed")),
        counts=benchmark.counts,
        weights_id=composer.backbone.weights_id,
        seed=seed,
        seconds=ended - began,
        queries_per_second=len(texts) / (ended - encoded),
        top=tops["detailed"].top,
        scores=tops["detailed"].scores,
        subset_top=np.zeros((len(gallery), 0), np.int32),
        outcome=None,
    )
