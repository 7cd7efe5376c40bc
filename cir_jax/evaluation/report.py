"""Tables for people and JSON for programs; both carry the protocol beside the numbers."""

import importlib.metadata
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from cir_jax.evaluation.metrics import Estimate
from cir_jax.evaluation.result import Result
from cir_jax.retrieval.cache import write_atomically

Paper = Mapping[tuple[str, str], float]
"""(method, metric) -> the published number, percent."""

PACKAGES = ("cir_jax", "jax", "jaxlib", "flax", "numpy", "pillow")


def format_table(results: Sequence[Result], paper: Paper | None = None) -> str:
    """Aligned text of one benchmark: rows = methods, columns = headline metrics, value +- se.

    paper: published numbers, each in a column of its own beside ours ("-" where there is none).
    Raises ValueError when the results are of different benchmarks, splits or protocols.
    """
    first = results[0]
    kinds = {(result.benchmark, result.split, result.protocol.id) for result in results}
    if len(kinds) != 1:
        raise ValueError(f"one table per benchmark, split and protocol, got {sorted(kinds)}")
    paper = paper or {}
    published = {metric for _, metric in paper} & set(first.headline)
    header, names = ["method"], []
    for name in first.headline:
        header += [name, "paper"] if name in published else [name]
        names += [(name, False), (name, True)] if name in published else [(name, False)]
    rows = [
        [result.method, *(_cell(result, paper, name, theirs) for name, theirs in names)]
        for result in results
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        head, *rest = cells
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        return "  ".join([head.ljust(widths[0]), *numbers]).rstrip()

    counts = ", ".join(f"{count} {what}" for what, count in first.counts.items())
    out = [
        f"{first.benchmark} {first.split}: {counts} images; percent +- standard error over queries",
        f"protocol {first.protocol.id}; weights {first.weights_id}",
        "",
        line(header),
        line(["-" * width for width in widths]),
        *map(line, rows),
    ]
    if not any(result.metrics for result in results):
        out.append("no public ground truth: send the submission files to the test server")
    return "\n".join(out)


def print_table(
    results: Sequence[Result], paper: Paper | None = None, file: TextIO | None = None
) -> None:
    """Prints `format_table`; on process 0 only."""
    if jax.process_index() == 0:
        print(format_table(results, paper), file=file or sys.stdout, flush=True)


def write_results(path: Path, results: Sequence[Result], command: Sequence[str] = ()) -> None:
    """Writes `results.json`, whole or not at all; on process 0 only.

    Two equal runs give equal `metrics`: timings stand apart. NaN (a standard error of one query)
    becomes null. command: how to make it again.
    """
    if jax.process_index() != 0:
        return
    text = json.dumps(to_dict(results, command), indent=2, allow_nan=False) + "\n"
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def to_dict(results: Sequence[Result], command: Sequence[str] = ()) -> dict[str, Any]:
    """What `write_results` writes; keys in a fixed order."""
    return {
        "command": list(command),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": sys.version.split()[0]},
        "devices": {
            "platform": jax.devices()[0].platform,
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "results": [_result(result) for result in results],
    }


def _result(result: Result) -> dict[str, Any]:
    return {
        "benchmark": result.benchmark,
        "split": result.split,
        "method": result.method,
        "protocol": result.protocol.id,
        "weights_id": result.weights_id,
        "seed": result.seed,
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


def _cell(result: Result, paper: Paper, name: str, theirs: bool) -> str:
    if theirs:
        number = paper.get((result.method, name))
        return "-" if number is None else f"{number:.2f}"
    if name not in result.metrics:
        return "-"
    x = result.metrics[name]
    return f"{x.value:.2f}" if math.isnan(x.se) else f"{x.value:.2f} +-{x.se:.2f}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # run from a checkout without installing it
        return getattr(sys.modules.get(package), "__version__", "unknown")
