"""Runs beside each other, query by query: paired differences, wins and losses.

The same queries were asked of all runs, so the difference of two numbers is the mean of the
differences per query, whose spread is far below that of either number. Intervals are percentile
bootstraps over queries (within each category where the number is a mean over categories). They say
what other queries would have given, nothing about other training runs.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.errors import DataError
from cir_jax.evaluation import benchmarks, per_query
from cir_jax.evaluation.contact_sheet import SHOWN, comparison_sheet
from cir_jax.evaluation.queries import Benchmark

SAMPLES = 10_000
LEVEL = 95
"""Percent of the interval."""

_BLOCK = 1 << 22
"""Resampled queries held at once."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run did on one benchmark.

    label: what the tables call it. facts: its entry in results.json. records: by query id, in the
    order of the file.
    """

    label: str
    facts: Mapping[str, Any]
    records: Mapping[int, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a run to the first one, in one metric; percent.

    low, high: the interval. wins, losses: queries on which it is better, worse; the rest tie.
    """

    metric: str
    first: float
    second: float
    value: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int


def load(folders: Sequence[Path]) -> dict[tuple[str, str], list[Run]]:
    """(benchmark, split) -> the runs that were evaluated on it, in the order of the folders.

    Raises DataError for fewer than two folders, folders without results, benchmarks that no two
    of them share, and runs of one benchmark under another protocol, on other data or queries.
    """
    if len(folders) < 2:
        raise DataError("give two folders with results, or more: launch/compare.py RUN RUN.")
    labels = _labels(folders)
    found: dict[tuple[str, str], list[Run]] = {}
    for folder, label in zip(folders, labels, strict=True):
        grouped: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
        for record in per_query.read(folder / per_query.FILE):
            key = (record["benchmark"], record["split"], record["method"])
            grouped.setdefault(key, {})[record["id"]] = record
        facts = _facts(folder / "results.json")
        for key, records in grouped.items():
            if key not in facts:
                raise DataError(
                    f"{folder}: queries.jsonl has {' '.join(key)}, results.json has not; they are "
                    "of two evaluations. Evaluate again."
                )
            if not next(iter(records.values()))["ranks"]:
                continue  # no public ground truth
            found.setdefault(key[:2], []).append(Run(label, facts[key], records))
    shared = {key: runs for key, runs in found.items() if len(runs) > 1}
    if not shared:
        had = "; ".join(f"{' '.join(key)}: {runs[0].label}" for key, runs in found.items())
        raise DataError(
            f"no benchmark and split with public labels is in two of these runs ({had or 'none'})."
        )
    for key, runs in shared.items():
        for other in runs[1:]:
            _check(key, runs[0], other)
    return shared


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.expanduser().absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise DataError(f"a folder is given twice: {', '.join(map(str, folders))}.")


def _facts(path: Path) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    try:
        results = json.loads(path.read_bytes())["results"]
        return {(r["benchmark"], r["split"], r["method"]): r for r in results}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not readable as results ({type(error).__name__}: {error}). Evaluate again."
        ) from error


def _check(key: tuple[str, str], first: Run, other: Run) -> None:
    what = f"{' '.join(key)}: {first.label} and {other.label}"
    for field in ("protocol", "data", "counts"):
        ours, theirs = first.facts.get(field), other.facts.get(field)
        if ours != theirs:
            raise DataError(f"{what} differ in {field}: {ours} and {theirs}. Evaluate one again.")
    if list(first.records) != list(other.records):
        odd = set(first.records) ^ set(other.records)
        example = f", such as query {min(odd)}" if odd else " in their order"
        raise DataError(f"{what} have other queries{example}. Evaluate one again.")


def differences(
    first: Run, second: Run, *, samples: int = SAMPLES, seed: int = 0
) -> list[Difference]:
    """All metrics of both, second minus first; a function of the runs and the seed."""
    rows = [(first.records[i], second.records[i]) for i in first.records]
    metrics = list(rows[0][0]["metrics"])
    if any(set(r["metrics"]) != set(metrics) for pair in rows for r in pair):
        raise DataError(f"{first.label} and {second.label}: their queries have other metrics.")
    # [queries, metrics] each
    one, two = (
        np.asarray([[pair[k]["metrics"][name] for name in metrics] for pair in rows])
        for k in (0, 1)
    )
    groups = _groups(first, [pair[0]["category"] for pair in rows])
    delta = two - one
    low, high = np.percentile(
        resampled(delta, groups, samples, seed), [(100 - LEVEL) / 2, (100 + LEVEL) / 2], axis=0
    )
    means = [np.mean([x[g].mean(axis=0) for g in groups], axis=0) for x in (one, two, delta)]
    return [
        Difference(
            name,
            *(float(mean[j]) for mean in means),
            float(low[j]),
            float(high[j]),
            wins=int((delta[:, j] > 0).sum()),
            losses=int((delta[:, j] < 0).sum()),
            ties=int((delta[:, j] == 0).sum()),
        )
        for j, name in enumerate(metrics)
    ]


def _groups(run: Run, categories: Sequence[str]) -> list[np.ndarray]:
    """Positions of the queries of each category, or of all, whose means are averaged."""
    name = run.facts["benchmark"].removesuffix(" (partial)")
    if not benchmarks.find(name).protocol.by_category:
        return [np.arange(len(categories))]
    named = np.asarray(categories)
    return [np.flatnonzero(named == one) for one in sorted(set(categories))]


def resampled(
    values: np.ndarray, groups: Sequence[np.ndarray], samples: int, seed: int
) -> np.ndarray:
    """float64[queries, metrics] -> float64[samples, metrics]: the mean over groups of the means of
    as many queries, drawn with replacement within each group."""
    rng = np.random.default_rng(seed)
    total = np.zeros((samples, values.shape[1]))
    for group in groups:
        count = len(group)
        step = max(1, _BLOCK // count)
        for start in range(0, samples, step):
            rows = min(step, samples - start)
            drawn = rng.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
            times = np.bincount(drawn.reshape(-1), minlength=rows * count).reshape(rows, count)
            total[start : start + rows] += times @ values[group] / count
    return total / len(groups)


def format_table(key: tuple[str, str], first: Run, second: Run, rows: Sequence[Difference]) -> str:
    """Aligned text: one line per metric."""
    header = ["metric", first.label, second.label, "difference", f"{LEVEL} % interval"]
    lines = [[*header, "wins", "losses", "ties"]]
    for row in rows:
        lines.append(
            [
                row.metric,
                f"{row.first:.2f}",
                f"{row.second:.2f}",
                f"{row.value:+.2f}",
                f"{row.low:+.2f} .. {row.high:+.2f}",
                *map(str, (row.wins, row.losses, row.ties)),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        head, *rest = cells
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        return "  ".join([head.ljust(widths[0]), *numbers])

    counts = len(first.records)
    both = (second.facts, first.facts)
    weights = " and ".join(dict.fromkeys(facts["weights_id"] for facts in both))
    settings = " and ".join(dict.fromkeys(facts["setting_id"] for facts in both))
    return "\n".join(
        [
            f"{' '.join(key)}: {second.label} ({second.facts['method']}) minus {first.label} "
            f"({first.facts['method']}), {counts} queries, percent",
            f"protocol {first.facts['protocol']}; weights {weights}; setting {settings}",
            "",
            line(lines[0]),
            line(["-" * width for width in widths]),
            *map(line, lines[1:]),
        ]
    )


def apart(first: Run, second: Run, count: int) -> list[int]:
    """Ids of the queries on which they differ most in AP: those that the second wins first (most to
    least), then those that it loses (least to most); as many of each where there are."""
    delta = {i: second.records[i]["AP"] - first.records[i]["AP"] for i in first.records}
    won = sorted((i for i in delta if delta[i] > 0), key=lambda i: -delta[i])
    lost = sorted((i for i in delta if delta[i] < 0), key=lambda i: delta[i])
    few = min(len(lost), count // 2)
    many = min(len(won), count - few)
    few = min(len(lost), count - many)
    return won[:many] + lost[:few][::-1]


def draw(benchmark: Benchmark, first: Run, second: Run, path: Path, count: int) -> bool:
    """Writes the contact sheet of the queries where they differ most; False = there are none.

    Raises DataError where the images are not those that the runs retrieved from.
    """
    chosen = apart(first, second, count)
    queries = {query.id: query for query in benchmark.queries}
    rows = []
    for i in chosen:
        own = [run.records[i] for run in (first, second)]
        tops = [list(zip(x["positions"], x["scores"], strict=True))[:SHOWN] for x in own]
        for run, top in zip((first, second), tops, strict=True):
            for (position, _), name in zip(top, run.records[i]["top"], strict=False):
                there = 0 <= position < len(benchmark.gallery) and i in queries
                if not there or benchmark.image_name(position) != name:
                    raise DataError(
                        f"query {i} of {run.label}: {name} is not at position {position} of the "
                        "prepared gallery; it was prepared anew since. Evaluate again, or leave "
                        "the pictures out with --nosheets."
                    )
        notes = [f"best rank {min(one['ranks'])}, AP {one['AP']:.1f}" for one in own]
        rows.append((queries[i], tops, notes))
    if not rows:
        return False
    title = f"{benchmark.name} {benchmark.split}  ·  {second.label} and {first.label} differ most"
    both = (first.facts, second.facts)
    weights = " and ".join(dict.fromkeys(facts["weights_id"] for facts in both))
    settings = " and ".join(dict.fromkeys(facts["setting_id"] for facts in both))
    footer = f"{first.facts['protocol']}; {weights}; setting {settings}"
    comparison_sheet(benchmark, title, footer, [first.label, second.label], rows, path)
    return True
