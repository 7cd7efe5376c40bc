"""What of a paper is here, and REPRODUCTION.md: see `benchmarks/reproduce.py`."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks import reproduce_recipes as recipes
from cir_jax.errors import DataError
from cir_jax.evaluation import published
from cir_jax.evaluation.published import Row

if TYPE_CHECKING:
    from benchmarks.reproduce import Line, Places

ROUNDING = 0.05
"""Differences up to it are none: papers print two decimals of numbers that GPUs round otherwise."""

UNEXPLAINED = "not explained: compare the setting in results.json with the paper's"

STAMP = "made_of.json"
"""In a run's folder: what it was made of; written last."""

SERVER = "server.json"
"""Beside a submission: the numbers that the server gave."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a run gave. metrics: percent; from_server: they are the server's. differs: fields of a
    training run that are other than the row wants."""

    metrics: Mapping[str, float]
    seed: int
    weights_id: str
    setting_id: str
    partial: bool
    from_server: bool = False
    differs: tuple[str, ...] = ()


def found(line: Line, places: Places) -> list[Found]:
    """The results there are, seed by seed."""
    out = []
    for seed in line.seeds:
        output = places.run(line.recipe, line.row, seed)
        if not (output / STAMP).is_file():
            continue
        (result,) = json.loads((output / "results.json").read_text())["results"]
        metrics = {name: value["value"] for name, value in result["metrics"].items()}
        server = output / SERVER
        if not metrics and server.is_file():
            try:
                metrics = {
                    name: float(value) for name, value in json.loads(server.read_text()).items()
                }
            except (ValueError, AttributeError, TypeError) as error:
                raise DataError(
                    f'{server}: not readable ({error}); expected {{"mAP@5": 8.9, ...}}.'
                ) from error
        ids = result["weights_id"], result["setting_id"], result["partial"]
        differs = tuple(json.loads((output / STAMP).read_text())["differs"])
        out.append(Found(metrics, seed, *ids, from_server=server.is_file(), differs=differs))
    return out


def listing(paper: str, listed: Sequence[Line]) -> str:
    """What there is of a paper, for people: table by table, then what is missing."""
    out: list[str] = []
    for place, group in itertools.groupby(listed, _place):
        lines = list(group)
        out += ["", f"{place}, protocol {lines[0].protocol}: {_cells(lines)}"]
        for line in lines:
            numbers = "  ".join(f"{name} {value:.2f}" for name, value in line.row.metrics.items())
            mark = f" ({line.row.note})" if line.row.note else ""
            names = dict.fromkeys(one.partition(": ")[0] for one in line.missing)
            short = "here" if not line.missing else f"needs {'; '.join(names)}"
            out += [f"  {_named(line.row)}, {line.row.backbone}{mark}: {numbers}", f"      {short}"]
    cells = sum(len(line.row.metrics) for line in listed)
    ready = sum(len(line.row.metrics) for line in listed if not line.missing)
    wanted = collections.Counter(
        one for line in listed for one in line.missing for _ in line.row.metrics
    )
    if wanted:
        out += ["", "to get:", *(f"  {one} [{count} cells]" for one, count in wanted.items())]
    if left_out := published.read(paper).left_out:
        out += ["", "left out of the paper's tables:", *(f"  {one}" for one in left_out)]
    out += ["", f"{cells} cells in {len(listed)} rows; {ready} can be run with what is here"]
    return "\n".join(out).lstrip("\n")


def _place(line: Line) -> str:
    """Where the paper prints a row, and of which benchmark and split it is."""
    number = line.row.table
    several = "," in number or " to " in number
    table = f"Table{'s' * several} {number}: " if number else ""
    return f"{table}{line.row.benchmark} {line.row.split}"


def _cells(lines: Sequence[Line]) -> str:
    every = sum(len(line.row.metrics) for line in lines)
    missing = sum(len(line.row.metrics) for line in lines if line.missing)
    return f"{every} cells, {every - missing} can be run" if missing else f"{every} cells, all here"


def _named(row: Row) -> str:
    return f"{row.method}, {row.variant}" if row.variant else row.method


def what(row: Row) -> str:
    """What messages call a row."""
    return f"{row.benchmark} {row.split}, {_named(row)}, {row.backbone}"


def document(paper: str, listed: Sequence[Line], places: Places, failed: Mapping[str, str]) -> str:
    """REPRODUCTION.md. failed: what could not be run -> why."""
    results = [(line, found(line, places)) for line in listed]
    done = [(line, runs) for line, runs in results if any(run.metrics for run in runs)]
    waiting = [(line, runs) for line, runs in results if runs and not runs[0].metrics]
    cells = sum(len(line.row.metrics) for line, _ in done)
    every = sum(len(line.row.metrics) for line in listed)
    out = [
        f"# The tables of {paper}, computed",
        "",
        f"`python benchmarks/reproduce.py --paper={paper}`: {cells} of {every} cells. Percent; "
        "ours is the mean over seeds, with the deviation between them where there are several. "
        "What a setting is, results.json in the run's folder says.",
    ]
    if any(one.partial for _, runs in done for one in runs):
        out += ["", "**PARTIAL DATA: these numbers are not comparable.**"]
    unlike: list[tuple[Row, list[str], str]] = []
    where = ""
    for line, runs in done:
        row = line.row
        if where != (here := _place(line)):
            where = here
            out += ["", f"## {here}", "", f"Protocol `{line.protocol}`.", ""]
            out += [
                "| method | backbone | metric | paper | ours | difference | seeds | weights | "
                "setting |",
                "|---|---|---|---|---|---|---|---|---|",
            ]
        for name, paper_value in row.metrics.items():
            measured = [published.value(one.metrics, name) for one in runs]
            values = [value for value in measured if value is not None]
            if not values:
                continue
            mean = statistics.fmean(values)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            ours = f"{mean:.2f}" + (f" ± {spread:.2f}" if len(values) > 1 else "")
            off = mean - paper_value
            weights = ", ".join(dict.fromkeys(one.weights_id for one in runs))
            setting = ", ".join(dict.fromkeys(one.setting_id for one in runs))
            seeds = ", ".join(str(one.seed) for one in runs)
            server = " (server)" if runs[0].from_server else ""
            out.append(
                f"| {_named(row)} | {row.backbone} | {name} | {paper_value:.2f} | {ours}{server} "
                f"| {off:+.2f} | {seeds} | `{weights}` | `{setting}` |"
            )
            if abs(off) > max(spread, ROUNDING) and not math.isclose(abs(off), ROUNDING):
                if not unlike or unlike[-1][0] is not row:
                    fields = dict.fromkeys(name for one in runs for name in one.differs)
                    unlike.append((row, [], ", ".join(fields)))
                unlike[-1][1].append(f"{name} {off:+.2f}")
    if unlike:
        out += ["", "## Differences above the spread of seeds", ""]
    for row, values, fields in unlike:
        if fields:
            why = f"the training run differs from the preset in {fields}"
        else:
            why = recipes.known_reason(row) or UNEXPLAINED
        out.append(f"* {what(row)}: {', '.join(values)}; {why}")
    if waiting:
        out += ["", "## Waiting for the test server", ""]
        out += [
            f"* {what(line.row)}: "
            f"`{places.run(line.recipe, line.row, runs[0].seed)}`; put its numbers there as "
            f"`{SERVER}`"
            for line, runs in waiting
        ]
    if failed:
        out += ["", "## Failed", "", *(f"* {what}: {why}" for what, why in failed.items())]
    missing = dict.fromkeys(one for line in listed for one in line.missing)
    if missing:
        out += ["", "## Not here", "", *(f"* {one}" for one in missing)]
    return "\n".join(out) + "\n"
