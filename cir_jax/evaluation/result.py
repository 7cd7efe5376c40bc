"""What an evaluation gives: numbers with their protocol, and what happened to each query."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cir_jax.composers.base import Composer
from cir_jax.evaluation import protocols
from cir_jax.evaluation import setting as settings
from cir_jax.evaluation.asked import Asked
from cir_jax.evaluation.metrics import Estimate, best_rank
from cir_jax.evaluation.protocols import Outcome, Protocol
from cir_jax.evaluation.queries import Benchmark, CaptionBenchmark

UNIMODAL = ("image_only", "text_only")
"""The baselines of one modality."""


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One method on one split of one benchmark.

    metrics: name -> Estimate in percent; `headline` names those of the paper's table. Empty where
        the ground truth is not public: then `top` is what the test server wants.
    top: int32[queries, k] gallery positions, best first, -1 = fewer than k images were ranked.
    scores: float32[queries, k].
    subset_top: int32[queries, candidates] the ranked candidates (CIRR), or of width 0.
    outcome: ranks of all ground truths; None without public ground truth.
    setting: all that was chosen and moves the numbers; see `evaluation.setting`.
    data: name and version of the data. partial: they are incomplete, the numbers not comparable.
    composed: float32[queries, dim] the queries of methods that compose features of the backbone, as
        long as the gallery's are in the mean: what a decoder can show. Else None.
    seconds: gallery features, queries and ranking together, compilation included.
    queries_per_second: of composing and ranking alone, compilation included.
    """

    method: str
    benchmark: str
    split: str
    protocol: Protocol
    metrics: dict[str, Estimate]
    headline: tuple[str, ...]
    counts: dict[str, int]
    weights_id: str
    seed: int
    seconds: float
    queries_per_second: float
    top: np.ndarray
    scores: np.ndarray
    subset_top: np.ndarray
    outcome: Outcome | None
    setting: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: str = ""
    partial: bool = False
    composed: np.ndarray | None = None

    @staticmethod
    def what(
        composer: Composer,
        benchmark: Benchmark | CaptionBenchmark,
        seed: int,
        asked: Asked | None = None,
    ) -> dict[str, Any]:
        """The fields that say what was measured on what, as keyword arguments."""
        return {
            "benchmark": benchmark.name,
            "split": benchmark.split,
            "protocol": benchmark.protocol,
            "counts": benchmark.counts,
            "weights_id": composer.backbone.weights_id,
            "seed": seed,
            "setting": settings.of(composer, benchmark, seed, asked),
            "data": benchmark.data,
            "partial": benchmark.partial,
        }

    @property
    def setting_id(self) -> str:
        """The short id that stands beside the numbers; "" where the setting is not known."""
        return settings.short_id(self.setting) if self.setting else ""

    @property
    def best_rank(self) -> np.ndarray:
        """int32[queries]: 0-based rank of the best ground truth."""
        if self.outcome is None:
            raise ValueError(f"{self.benchmark} {self.split} has no public ground truth")
        return best_rank(self.outcome.target_ranks)


def combine(results: Sequence[Result]) -> Result:
    """The splits of one benchmark (seeds of the embedded world) as one: all queries count the same.

    The lists of retrieved images stay with the single results, whose galleries differ.
    """
    first = results[0]
    same = {(result.method, result.benchmark, result.protocol) for result in results}
    outcomes = [result.outcome for result in results if result.outcome is not None]
    if len(same) != 1 or len(outcomes) != len(results):
        raise ValueError(f"cannot combine results of different kinds: {sorted(map(str, same))}")
    outcome = protocols.concatenate(outcomes)
    queries = sum(result.counts["queries"] for result in results)
    busy = sum(result.counts["queries"] / result.queries_per_second for result in results)
    nothing = np.zeros((queries, 0), np.int32)
    return dataclasses.replace(
        first,
        split="+".join(result.split for result in results),
        metrics=protocols.measure(first.protocol, outcome),
        counts={"queries": queries, "gallery": sum(r.counts["gallery"] for r in results)},
        partial=any(result.partial for result in results),
        seconds=sum(result.seconds for result in results),
        queries_per_second=queries / busy,
        top=nothing,
        scores=nothing.astype(np.float32),
        subset_top=nothing,
        outcome=outcome,
        composed=None,
    )
