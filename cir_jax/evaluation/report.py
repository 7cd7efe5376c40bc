"""Tables for people and JSON for programs; both carry the protocol beside the numbers."""

import dataclasses
import importlib.metadata
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from cir_jax.evaluation import published, submissions
from cir_jax.evaluation.metrics import Estimate
from cir_jax.evaluation.published import Row
from cir_jax.evaluation.result import UNIMODAL, Result
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.buckets import place

LISTED = 6  # groups of a gallery that are counted one by one
PACKAGES = ("cir_jax", "jax", "jaxlib", "flax", "numpy", "pillow")


def format_table(results: Sequence[Result], papers: Sequence[Row] = ()) -> str:
    """Aligned text of one benchmark: rows = methods, columns = headline metrics, value +- se.

    papers: published rows of the same benchmark and protocol; they stand apart, below ours, and say
        so where they are of another split.
    Raises ValueError when the results are of different benchmarks, splits or protocols.
    """
    first = results[0]
    kinds = {(result.benchmark, result.split, result.protocol.id) for result in results}
    if len(kinds) != 1:
        raise ValueError(f"one table per benchmark, split and protocol, got {sorted(kinds)}")
    if other := [row for row in papers if row.benchmark != first.benchmark]:
        raise ValueError(f"a published row of {other[0].benchmark}")
    header = ["method", *first.headline, "setting"]
    ours = [
        [r.method, *(_cell(r, name) for name in first.headline), r.setting_id or "-"]
        for r in results
    ]
    theirs = [
        [
            label(row, first),
            *(f"{row.metrics[n]:.2f}" if n in row.metrics else "-" for n in first.headline),
            "",
        ]
        for row in papers
    ]
    columns = zip(header, *ours, *theirs, strict=True)
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        head, *rest = cells
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        return "  ".join([head.ljust(widths[0]), *numbers]).rstrip()

    rule = line(["-" * width for width in widths])
    out = [
        f"{first.benchmark} {first.split}: {counted(first.counts)}; percent +- standard error over "
        "queries",
        f"protocol {first.protocol.id}; weights {first.weights_id}",
        *(["PARTIAL DATA: these numbers are not comparable"] if first.partial else []),
        "",
        line(header),
        rule,
        *map(line, ours),
        *([rule, "published:", *map(line, theirs)] if theirs else []),
        *gap_lines(composition_gaps(results)),
    ]
    if not any(result.metrics for result in results):
        server = first.protocol.name in submissions.SERVERS
        out.append(
            "no public ground truth"
            + (": send the submission files to the test server" if server else ", no test server")
        )
    return "\n".join(out)


@dataclasses.dataclass(frozen=True)
class Gap:
    """How much better a method is than the better single modality `over` of the same backbone."""

    benchmark: str
    split: str
    method: str
    metric: str
    value: float
    over: str


def composition_gaps(results: Sequence[Result]) -> list[Gap]:
    """CIRCUS's Composition Gap (arXiv 2605.14787) of each method: its R@10 minus the better of
    image-only and text-only; of the first headline metric where R@10 is not measured.

    results: of one benchmark. Nothing where a modality was not run or labels are not public.
    """
    alone = {r.method: r for r in results if r.method in UNIMODAL and r.metrics}
    if len(alone) < len(UNIMODAL):
        return []
    first = next(iter(alone.values()))
    metric = "R@10" if "R@10" in first.metrics else first.headline[0]
    values = {method: r.metrics[metric].value for method, r in alone.items()}
    over = max(values, key=values.__getitem__)
    return [
        Gap(r.benchmark, r.split, r.method, metric, r.metrics[metric].value - values[over], over)
        for r in results
        if r.method not in UNIMODAL and metric in r.metrics
    ]


def gap_lines(gaps: Sequence[Gap]) -> list[str]:
    """A line that says them; none where there are none."""
    if not gaps:
        return []
    values = ", ".join(f"{gap.method} {gap.value:+.2f}" for gap in gaps)
    return [f"composition gap, {gaps[0].metric} minus that of {gaps[0].over}: {values}"]


def label(row: Row, first: Result) -> str:
    """What a published row is called beside our results; one of another split says so."""
    elsewhere = "" if row.split == first.split else f"; paper, {row.split.rstrip('1')}"
    return f"{row.method} ({row.source}; {row.backbone}{elsewhere})"


def counted(counts: Mapping[str, int]) -> str:
    """Numbers of queries and gallery images, in words."""
    groups = [f"{name.partition(' ')[2]} {n}" for name, n in counts.items() if " " in name]
    listed = ", ".join(groups) if len(groups) <= LISTED else f"in {len(groups)} groups"
    per_group = f" ({listed})" if groups else ""
    return f"{counts['queries']} queries, {counts['gallery']} gallery images{per_group}"


def published_rows(results: Sequence[Result]) -> list[Row]:
    """What the papers print of these methods on this benchmark and split, under this protocol.

    Below them what they print of the split whose labels only a server has: of CIRCO and CIRR most
    print nothing else. Nothing for partial data: no published number is comparable with theirs.
    """
    first, methods = results[0], [result.method for result in results]
    hidden = submissions.HIDDEN.get(first.benchmark.partition(":")[0], first.split)
    return [
        row
        for split in dict.fromkeys((first.split, hidden))
        for row in published.rows(first.benchmark, split, methods, first.weights_id)
    ]


def print_table(
    results: Sequence[Result], papers: Sequence[Row] = (), file: TextIO | None = None
) -> None:
    """Prints `format_table`; on process 0 only."""
    if jax.process_index() == 0:
        print(format_table(results, papers), file=file or sys.stdout, flush=True)


def write_results(
    path: Path,
    results: Sequence[Result],
    command: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes `results.json`, whole or not at all; on process 0 only.

    Two equal runs give equal `metrics`: timings stand apart. NaN (a standard error of one query)
    becomes null. command: how to make it again. settings: of the composer.
    """
    if jax.process_index() != 0:
        return
    content = to_dict(results, command, settings)
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(place(path), lambda file: file.write(text.encode()))


def to_dict(
    results: Sequence[Result],
    command: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `write_results` writes; keys in a fixed order."""
    return {
        "command": list(command),
        "composer": dict(settings or {}),
        "versions": {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]},
        "devices": {
            "platform": jax.devices()[0].platform,
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "results": [_result(result) for result in results],
        "composition_gaps": [
            dataclasses.asdict(gap)
            for same in _by_benchmark(results)
            for gap in composition_gaps(same)
        ],
        "published": [
            dataclasses.asdict(row)
            for same in _by_benchmark(results)
            for row in published_rows(same)
        ],
    }


def _by_benchmark(results: Sequence[Result]) -> list[list[Result]]:
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault((result.benchmark, result.split, result.weights_id), []).append(result)
    return list(groups.values())


def _result(result: Result) -> dict[str, Any]:
    return {
        "benchmark": result.benchmark,
        "split": result.split,
        "method": result.method,
        "protocol": result.protocol.id,
        "partial": result.partial,
        "data": result.data,
        "weights_id": result.weights_id,
        "seed": result.seed,
        "setting_id": result.setting_id,
        "setting": dict(result.setting),
        "counts": dict(sorted(result.counts.items())),
        "headline": list(result.headline),
        "metrics": {name: _estimate(value) for name, value in result.metrics.items()},
        "timing": {
            "seconds": round(result.seconds, 3),
            "queries_per_second": round(result.queries_per_second, 2),
        },
    }


def _estimate(x: Estimate) -> dict[str, Any]:
    return {"value": x.value, "se": None if math.isnan(x.se) else x.se, "n": x.n}


def _cell(result: Result, name: str) -> str:
    if name not in result.metrics:
        return "-"
    x = result.metrics[name]
    return f"{x.value:.2f}" if math.isnan(x.se) else f"{x.value:.2f} +-{x.se:.2f}"


def version(package: str) -> str:
    """Of an installed package, or of one that runs from a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # run from a checkout without installing it
        return getattr(sys.modules.get(package), "__version__", "unknown")
