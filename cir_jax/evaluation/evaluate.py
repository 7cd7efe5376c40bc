"""One evaluation for all methods and benchmarks, and the baselines beside every method."""

import dataclasses
import functools
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cir_jax import composers
from cir_jax.composers import conditions
from cir_jax.composers.base import Composer, Params
from cir_jax.evaluation import captions, protocols
from cir_jax.evaluation.asked import Asked
from cir_jax.evaluation.protocols import Graded, Outcome
from cir_jax.evaluation.queries import Benchmark, CaptionBenchmark, pad_rows
from cir_jax.evaluation.result import Result
from cir_jax.input.images import ImageTransform
from cir_jax.models.backbone import Backbone
from cir_jax.retrieval import features, ranking
from cir_jax.retrieval.editing import Edited
from cir_jax.weights import oti_tokens

TOP = 50
"""Retrieved images kept per query: what the test servers of CIRR and CIRCO want."""

BASELINES = ("image_only", "text_only", "image_text")


@functools.lru_cache(maxsize=4)
def baselines(backbone: Backbone) -> Mapping[str, Composer]:
    """The three baselines, always printed beside a method: a benchmark that one modality alone
    solves says nothing about composition. A backbone without text features has one.

    The same objects for one backbone: their compiled programs serve all benchmarks."""
    names = BASELINES if backbone.joint else ("image_only",)
    return types.MappingProxyType({name: composers.build(name, backbone) for name in names})


def evaluate(
    composer: Composer,
    params: Params,
    frozen: Params,
    benchmark: Benchmark | CaptionBenchmark,
    *,
    mesh: Mesh,
    batch_size: int = 256,
    seed: int = 0,
    cache_dir: Path | None = None,
    method: str = "",
    image_features: np.ndarray | None = None,
    asked: Asked | None = None,
) -> Result:
    """Runs a method on a benchmark.

    batch_size: global, rounded up to what the mesh needs. seed: of methods that draw noise.
    cache_dir: where image features are stored, None = nowhere.
    image_features: float32[gallery, dim] un-normalised features of the gallery images from
        `frozen["backbone"]`, if the caller has them.
    asked: of every query, beside what the benchmark says; None = nothing.
    Raises DataError for unreadable images, WeightsError for features that are not finite.
    """
    method = method or type(composer).__name__
    asked = asked or Asked()
    composer, seed = asked.of(composer, seed)
    options = dict(mesh=mesh, batch_size=batch_size, cache_dir=cache_dir)
    if isinstance(benchmark, CaptionBenchmark):
        return captions.evaluate(
            composer, params, frozen, benchmark, method=method, seed=seed, asked=asked, **options
        )
    began = time.perf_counter()
    raw = image_features
    if raw is None and features.uses_backbone_gallery(composer):
        raw = features.image_features(
            composer.backbone, frozen["backbone"], benchmark.gallery, **options
        )
    gallery = features.gallery_features(
        composer, params, frozen, benchmark.gallery, raw=raw, **options
    )
    encoded = time.perf_counter()
    queries = _queries(composer, params, frozen, benchmark, raw, seed, options, asked)
    ranked, subset = _rank(composer, params, benchmark, queries, gallery)
    ended = time.perf_counter()
    outcome = None
    if benchmark.labelled:
        single = benchmark.target_table().shape[1]
        outcome = Outcome(
            ranked.target_ranks[:, :single],
            np.full(len(queries), -1) if subset is None else subset.target_ranks[:, 0],
            tuple(query.category for query in benchmark.queries),
            tuple(query.aspects for query in benchmark.queries),
            _graded(benchmark, ranked, subset) if benchmark.protocol.soft else None,
        )
    protocol = benchmark.protocol
    return Result(
        **Result.what(composer, benchmark, seed, asked),
        method=method,
        metrics=protocols.measure(protocol, outcome) if outcome else {},
        headline=protocol.headline,
        seconds=ended - began,
        queries_per_second=len(queries) / (ended - encoded),
        top=ranked.top,
        scores=ranked.scores,
        subset_top=np.zeros((len(queries), 0), np.int32) if subset is None else subset.top,
        outcome=outcome,
        composed=None if raw is None else _as_long(queries, raw),
    )


def evaluate_with_baselines(
    composer: Composer,
    params: Params,
    frozen: Params,
    benchmark: Benchmark | CaptionBenchmark,
    *,
    mesh: Mesh,
    batch_size: int = 256,
    seed: int = 0,
    cache_dir: Path | None = None,
    method: str = "",
    alone: bool = False,
    asked: Asked | None = None,
) -> list[Result]:
    """The baselines, then the method. Image features are computed once for all of them.

    alone: without the baselines. A method that trains the backbone itself (no `frozen["backbone"]`)
    has none anyway, nor have caption retrieval and inversion, where one modality is all there is.
    asked: as `evaluate`'s, of the method; the baselines answer the queries as they are.
    """
    options = dict(mesh=mesh, batch_size=batch_size, cache_dir=cache_dir)
    raw, methods = None, {}
    composed = isinstance(benchmark, Benchmark) and benchmark.protocol.text != "inversion"
    if composed and "backbone" in frozen:
        backbone = composer.backbone
        raw = features.image_features(backbone, frozen["backbone"], benchmark.gallery, **options)
        methods = {name: (baseline, {}) for name, baseline in baselines(backbone).items()}
    if alone:
        methods = {}
    methods.pop(method, None)  # the method is a baseline itself
    methods[method] = (composer, params)
    options |= dict(seed=seed, image_features=raw)
    return [
        evaluate(
            one,
            own,
            frozen,
            benchmark,
            method=name,
            asked=asked if one is composer else None,
            **options,
        )
        for name, (one, own) in methods.items()
    ]


def _queries(
    composer: Composer,
    params: Params,
    frozen: Params,
    benchmark: Benchmark,
    raw: np.ndarray | None,
    seed: int,
    options: dict,
    asked: Asked,
) -> np.ndarray:
    """What `compose` gives, [queries, dim]; of several texts of a query, `joined`."""
    backbone, gallery = composer.backbone, benchmark.gallery
    index, texts = [], []
    for position, query in enumerate(benchmark.queries):
        joined = benchmark.protocol.join(query.texts, benchmark.what(position))
        index += [position] * len(joined)
        prompt = benchmark.protocol.prompt
        if asked.use == "image":
            joined = [""] * len(joined)
        texts += [prompt(composer.prompt, text, query.concept) for text in joined]
    rows = np.asarray([benchmark.queries[position].reference for position in index])
    own = benchmark.references is not None
    images = benchmark.references if own else gallery
    transform = backbone.image_transform
    if benchmark.protocol.text == "objects":
        # the released code gives objects cut out to the encoder squashed, not cropped
        transform = dataclasses.replace(transform, pad="none", resize=transform.crop, squash=True)
    references: dict[str, Any] = {}
    if asked.conditions.mask is not None:

        def masked(row: int) -> tuple[np.ndarray, np.ndarray]:
            number = int(rows[row])
            what = benchmark.what(index[row])
            image = features.open_image(images[number], "image", what)
            return conditions.masked(composer, image, asked.conditions.mask)

        references["reference_images"] = masked
    else:
        references = read_references(
            composer,
            frozen,
            images,
            rows,
            texts,
            [f"{seed}/{position}" for position in index],
            raw=None if own else raw,
            transform=transform,
            **options,
        )
    if composer.word_rows is not None:
        names = {int(row): oti_tokens.name_of(images, int(row)) for row in np.unique(rows)}
        references["word_row"] = composer.word_rows([names[int(row)] for row in rows])
    composed = features.query_features(
        composer,
        params,
        frozen,
        tokenise(composer, texts),
        np.asarray(index, np.int32),
        **references,
        has_reference=asked.use != "text",
        fields=conditions.fields(composer, asked.conditions, len(index)),
        mesh=options["mesh"],
        batch_size=options["batch_size"],
        seed=seed,
        description=f"{benchmark.name} queries",
    )
    if len(index) == len(benchmark.queries):
        return composed
    # texts of a query follow one another: the place of each among its own
    place = np.arange(len(index)) - np.searchsorted(index, index)
    grouped = np.zeros((len(benchmark.queries), place.max() + 1, composed.shape[1]), np.float32)
    grouped[index, place] = composed
    return composer.joined(grouped)


def read_references(
    composer: Composer,
    frozen: Params,
    images: features.Records,
    rows: np.ndarray,
    texts: Sequence[str],
    streams: Sequence[str],
    *,
    raw: np.ndarray | None = None,
    transform: ImageTransform | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What `features.query_features` reads of the queries' reference images, as the method has it:
    `reference_features` or `reference_images`.

    rows: int[queries] in images. texts, streams: of methods that edit the reference: what to do to
    it, the name of its noise. raw: `image_features` of all images, if the caller has them.
    transform: None = the backbone's. options: mesh, batch_size, cache_dir.
    """
    backbone = composer.backbone
    transform = backbone.image_transform if transform is None else transform
    if composer.edits_reference:
        edited = Edited(composer, images, rows, texts, streams, options["cache_dir"])
        found = features.image_features(
            backbone,
            frozen["backbone"],
            edited,
            transform=transform,
            **options | {"cache_dir": None},
        )
        return {"reference_features": found}
    # a method that reads more of the reference than its pooled feature says so
    if composer.reads_images or composer.tunes_backbone or "backbone" not in frozen:

        def read(row: int) -> np.ndarray:
            return features.read_image(images, int(rows[row]), "image", transform)

        return {"reference_images": read}
    if raw is not None:
        return {"reference_features": raw[rows]}
    used, where = np.unique(rows, return_inverse=True)
    found = features.image_features(
        backbone,
        frozen["backbone"],
        features.Rows(images, used),
        transform=transform,
        **options,
    )
    return {"reference_features": found[where]}


def _as_long(queries: np.ndarray, raw: np.ndarray) -> np.ndarray | None:
    """The queries, of the mean length of the features; None where they are no such features."""
    if queries.ndim != 2 or queries.shape[1] != raw.shape[1]:
        return None
    return features.unit(queries) * np.linalg.norm(raw, axis=1).mean()


def _graded(
    benchmark: Benchmark, ranked: ranking.Ranking, subset: ranking.Ranking | None
) -> Graded:
    """Where the graded answers are: their ranks stand behind those of the ground truths."""
    graded = benchmark.graded()
    answers = pad_rows([[image for image, _ in row] for row in graded])
    weights = np.zeros(answers.shape, np.float32)
    for line, row in zip(weights, graded, strict=True):
        line[: len(row)] = [weight for _, weight in row]
    found = np.full(answers.shape, -1, np.int32)
    if subset is not None:  # [queries, answers, candidates]
        here = subset.top[:, None, :] == answers[:, :, None]
        here &= (answers >= 0)[:, :, None]
        found = np.where(here.any(axis=2), here.argmax(axis=2), -1)
    return Graded(ranked.target_ranks[:, -answers.shape[1] :], found, weights)


def tokenise(composer: Composer, texts: list[str]) -> np.ndarray:
    """int32[n, length] of one length for all texts, so that all batches are one program."""
    length = None if composer.pools_text else composer.backbone.context_length
    return composer.backbone.tokenizer(texts, length)


def _rank(
    composer: Composer,
    params: Params,
    benchmark: Benchmark,
    queries: np.ndarray,
    gallery: np.ndarray,
) -> tuple[ranking.Ranking, ranking.Ranking | None]:
    """The ranking of the protocol's gallery, and the one of the subset if the protocol has it."""
    protocol = benchmark.protocol
    targets = benchmark.target_table()
    single = targets[:, :1]
    if protocol.soft:
        answers = pad_rows([[image for image, _ in row] for row in benchmark.graded()])
        targets = np.concatenate([targets, answers], axis=1)
    scoring = ranking.scoring(composer, params)
    reference = np.asarray([query.reference for query in benchmark.queries], np.int32)
    if protocol.gallery == "candidates":
        table = benchmark.candidate_table(without_reference=protocol.remove_reference)
        return ranking.rank_candidates(queries, gallery, table, targets, **scoring), None
    groups = members = None
    if protocol.by_group:
        names = sorted({query.category for query in benchmark.queries})
        groups = np.asarray([names.index(query.category) for query in benchmark.queries], np.int32)
        members = np.asarray([[name in kinds for kinds in benchmark.categories] for name in names])
    ranked = ranking.rank(
        queries,
        gallery,
        k=TOP,
        targets=targets,
        exclude=reference if protocol.remove_reference else None,
        groups=groups,
        members=members,
        **scoring,
    )
    if not protocol.subset_recall:
        return ranked, None
    table = benchmark.candidate_table(without_reference=protocol.remove_reference)
    return ranked, ranking.rank_candidates(queries, gallery, table, single, **scoring)
