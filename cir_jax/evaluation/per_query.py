"""What happened to each query of a run: one JSON object per line of `queries.jsonl`.

    benchmark, split, method: as in results.json, which says protocol, weights and data
    id, texts, category, aspects: the query; reference, targets: names of its images
    ranks: of all targets among the ranked images, counted from 1; subset_rank: of the single target
        in its image set (CIRR), null elsewhere
    metrics: the benchmark's metrics of this query alone, percent; their mean is the run's number
        (FashionIQ, GeneCIS: the mean of the means per category)
    AP: average precision over the whole ranking, percent; of one target 100 / rank
    top, positions, scores: the best 50 images by name, by position in the gallery, and their scores
    image_only, text_only: ranks of all targets under each modality alone, null where not run

Where the labels are not public, `ranks` and `targets` are empty, `metrics` too, and AP is null.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cir_jax.errors import DataError
from cir_jax.evaluation import metrics, protocols
from cir_jax.evaluation.queries import Benchmark
from cir_jax.evaluation.result import UNIMODAL, Result
from cir_jax.evaluation.submissions import image_names
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.buckets import place

FILE = "queries.jsonl"


def write(path: Path, sections: Sequence[tuple[Benchmark, Sequence[Result]]]) -> None:
    """Writes the file, whole or not at all; on process 0 only.

    sections: per benchmark its results, those of single modalities among them, the method's last.
    """
    if jax.process_index() != 0:
        return

    def lines(file: Any) -> None:
        for benchmark, results in sections:
            for record in records(benchmark, results):
                text = json.dumps(record, allow_nan=False, ensure_ascii=False)
                file.write(f"{text}\n".encode())

    write_atomically(place(path), lines)


def records(benchmark: Benchmark, results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """One record per query of the last result, as the module says."""
    result, names = results[-1], _names(benchmark, results[-1])
    outcome = result.outcome
    values: Mapping[str, np.ndarray] = {}
    precision = None
    if outcome is not None:
        values = protocols.values(result.protocol, outcome)
        depth = int(outcome.target_ranks.max()) + 1
        precision = metrics.average_precision(outcome.target_ranks, depth)
    alone = {one.method: one.outcome for one in results if one.method in UNIMODAL}
    for i, query in enumerate(benchmark.queries):
        yield {
            "benchmark": result.benchmark,
            "split": result.split,
            "method": result.method,
            "id": query.id,
            "texts": list(query.texts),
            "category": query.category,
            "aspects": list(query.aspects),
            "reference": names(query.reference, benchmark.references is not None),
            "targets": [names(target) for target in query.targets],
            "ranks": ranks(outcome, i),
            "subset_rank": subset_rank(outcome, i),
            "metrics": {name: float(value[i]) for name, value in values.items()},
            "AP": None if precision is None else float(precision[i]),
            "top": [names(int(image)) for image in result.top[i] if image >= 0],
            "positions": [int(image) for image in result.top[i] if image >= 0],
            "scores": [
                float(f"{score:.7g}")
                for image, score in zip(result.top[i], result.scores[i], strict=True)
                if image >= 0
            ],
            **{name: ranks(alone[name], i) if name in alone else None for name in UNIMODAL},
        }


def ranks(outcome: protocols.Outcome | None, query: int) -> list[int]:
    """Of all targets of a query, counted from 1; empty without public labels."""
    if outcome is None:
        return []
    return [int(rank) + 1 for rank in outcome.target_ranks[query] if rank >= 0]


def subset_rank(outcome: protocols.Outcome | None, query: int) -> int | None:
    """Of the single target in the query's image set, counted from 1; None where there is none."""
    if outcome is None or outcome.subset_ranks[query] < 0:
        return None
    return int(outcome.subset_ranks[query]) + 1


def _names(benchmark: Benchmark, result: Result) -> Any:
    """(position, whether among the references) -> name; each image is asked once."""
    used = [result.top, *(np.asarray(query.targets, np.int32) for query in benchmark.queries)]
    if benchmark.references is None:
        used.append(np.asarray([query.reference for query in benchmark.queries], np.int32))
    found = image_names(benchmark, used)

    @functools.cache
    def of_reference(position: int) -> str:
        called = benchmark.references[position].get("name", str(position))
        return called.decode() if isinstance(called, bytes) else str(called)

    def name(position: int, reference: bool = False) -> str:
        return of_reference(position) if reference else found[position]

    return name


FIELDS = ("benchmark", "split", "method", "id", "ranks", "metrics", "AP", "top", "positions",
          "scores")  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file. Raises DataError naming the line that is no record."""
    path = place(path)
    found = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DataError(
                        f"{where}: not valid JSON ({error}); truncated? Evaluate again."
                    ) from error
                if not isinstance(record, dict) or (
                    absent := [field for field in FIELDS if field not in record]
                ):
                    what = f"has no {absent[0]!r}" if isinstance(record, dict) else "no object"
                    raise DataError(f"{where}: no record of a query ({what}). Evaluate again.")
                found.append(record)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file. `python launch/eval.py` writes it beside results.json; "
            "evaluate again with this version."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if not found:
        raise DataError(f"{path}: is empty. Evaluate again.")
    return found
