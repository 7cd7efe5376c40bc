"""What benchmarks/compare.py measured, as the tables of RESULTS.md and README.md."""

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import compare_plot
from benchmarks.encoders import BUSY
from cir_jax.storage.atomic import write_atomically


class Method(NamedTuple):
    """A row: an experiment, `experiment:preset` where it is not the one of all, or a baseline."""

    name: str
    paper: str = ""
    """CIRCO test mAP@10 with CLIP ViT-L/14 where nothing else is said, and who prints it."""
    triplets: bool = False
    """Whether it is trained on image triplets, which in this world are of the queries' kind."""


BASELINES = (
    Method("image_only", "3.09 (Slerp)"),
    Method("text_only", "3.65 (Slerp)"),
    Method("image_text", "4.40 (ISA)"),
)
METHODS = (
    Method("slerp", "9.84 (Slerp)"),
    Method("tat", "19.41 (Slerp)"),
    Method("palavra", "5.32 (SEARLE, ViT-B/32)"),
    Method("pic2word", "9.51 (CompoDiff)"),
    Method("rtd", "9.63 (RTD, around Pic2Word)"),
    Method("pdv"),
    Method("searle_oti", "11.03 (SEARLE)"),
    Method("searle", "12.73 (CompoDiff)"),
    Method("lincir", "13.58 (Slerp)"),
    Method("image_text:blip"),
    Method("slerp:blip"),
    Method("pic2word:blip"),
    Method("isa", "12.25 (ISA, BLIP; here on the small BLIP, too)"),
    Method("isa:symmetric", "10.32 (ISA, BLIP; likewise)"),
    Method("compodiff", "13.36 (CompoDiff)", triplets=True),
    Method("compodiff:shapes_long", "13.36 (CompoDiff)", triplets=True),
    Method("clip4cir", triplets=True),
    Method("combiner", "12.08 (CompoDiff, ResNet-50)", triplets=True),
    Method("artemis", "11.41 (CompoDiff, ResNet-50)", triplets=True),
    Method("magiclens", "30.8 (MagicLens, which reads the shared concept, too)", triplets=True),
    Method("searle_oti:inversion"),  # what its words hold of their images: in no table
)
"""In the order of the tables."""

SEEDS = (0, 1, 2)
HEADLINE = "circo mAP@10"
REFERENCES = ("slerp", "image_text")
"""Methods that each row is compared with, on the same queries, by HEADLINE."""
COLUMNS = ("circo mAP@5", HEADLINE, "cirr R@1", "cirr Rs@1", "fashioniq R@10", "genecis R@1")
README_COLUMNS = (HEADLINE, "cirr R@1", "fashioniq R@10", "genecis R@1")
EXPECTED = (
    *(("text_only", "image_only"), ("image_text", "text_only")),
    *((m, "image_text") for m in ("slerp", "pic2word", "searle", "lincir", "rtd", "compodiff")),
    *(("combiner", "image_text"), ("combiner", "slerp"), ("palavra", "image_text")),
    *(("rtd", "pic2word"), ("pdv", "pic2word"), ("tat", "slerp"), ("clip4cir", "image_text")),
    ("compodiff:shapes_long", "compodiff"),
    *(("isa", other) for other in ("image_text:blip", "slerp:blip", "pic2word:blip")),
    ("isa:symmetric", "isa"),
)
"""The better one first: what the papers let one expect, and what is built on what."""

Measured = Mapping[str, Any]


def values(measured: Measured, method: str, metric: str = HEADLINE) -> list[float]:
    """Of each seed; [] unless all seeds have it."""
    runs = measured["runs"].get(method, {})
    found = [runs.get(str(seed), {}).get("metrics", {}).get(metric) for seed in SEEDS]
    return [] if None in found else found


def rows(measured: Measured) -> list[Method]:
    """Those that have a value of every seed."""
    return [row for row in (*BASELINES, *METHODS) if values(measured, row.name)]


def spread(numbers: Sequence[float]) -> str:
    """Mean +- standard deviation."""
    return f"{statistics.mean(numbers):.1f} ± {statistics.stdev(numbers):.1f}"


def difference(numbers: Sequence[float], others: Sequence[float]) -> str:
    """Of pairs: mean +- standard error."""
    apart = [value - other for value, other in zip(numbers, others, strict=True)]
    error = statistics.stdev(apart) / len(apart) ** 0.5
    return f"{statistics.mean(apart):+.1f} ± {error:.1f}"


def _differences(measured: Measured, method: str) -> Iterator[str]:
    own = values(measured, method)
    for other in REFERENCES:
        others = values(measured, other)
        yield difference(own, others) if others and other != method else ""


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    everything = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in everything)


def _table(measured: Measured, columns: Sequence[str], more: Mapping[str, Any]) -> str:
    """more: column -> its cell of a row, between the differences and the paper's number; a column
    without any is left out."""
    shown = [row.name for row in rows(measured)]
    more = {name: f for name, f in more.items() if any(f(measured, method) for method in shown)}
    beside = [f"mAP@10 − {other}" for other in REFERENCES]
    lines = []
    for row in rows(measured):
        cells = [spread(values(measured, row.name, metric)) for metric in columns]
        cells += _differences(measured, row.name)
        cells += [cell(measured, row.name) for cell in more.values()]
        lines.append([row.name, *cells, row.paper])
    return _markdown(["method", *columns, *beside, *more, "paper, CIRCO mAP@10"], lines)


def _parameters(measured: Measured, method: str) -> int | None:
    if method in {row.name for row in BASELINES}:
        return 0
    return measured["runs"][method][str(SEEDS[0])].get("parameters")


def parameters(measured: Measured, method: str) -> str:
    """How many are trained; "" where that was not recorded."""
    count = _parameters(measured, method)
    return "" if count is None else f"{count:,}"


def training(measured: Measured, method: str) -> str:
    """CPU minutes, the median of the seeds; "" where not all were trained in one go."""
    if _parameters(measured, method) == 0:
        return "none"
    taken = [measured["runs"][method][str(seed)].get("training") for seed in SEEDS]
    if not all(taken):
        return ""
    return f"{statistics.median(x['cpu_seconds'] for x in taken) / 60:.1f}"


def latency(measured: Measured, method: str) -> str:
    """Milliseconds; "" where it was not measured, or on a busy machine."""
    found = measured.get("latency", {}).get(method)
    if not found or found["busy_cores"] > BUSY * found["machine"]["cores"]:
        return ""
    return f"{found['ms']:,.0f}" if found["ms"] >= 100 else f"{found['ms']:.1f}"


COSTS = {
    "training, CPU min": training,
    "query, ms": latency,
    "trained parameters": parameters,
}


def table(measured: Measured) -> str:
    """Markdown: rows = methods, mean +- standard deviation over the seeds, costs, papers.

    Differences of HEADLINE are paired, seed by seed: mean +- standard error.
    """
    return _table(measured, COLUMNS, COSTS)


def short_table(measured: Measured) -> str:
    """Likewise, for the README."""
    return _table(measured, README_COLUMNS, {})


def expectations(measured: Measured) -> str:
    """Markdown: which of two methods was to be better, by how much it is, on how many seeds."""
    lines = []
    for better, worse in EXPECTED:
        pair = values(measured, better), values(measured, worse)
        if not all(pair):
            lines.append([f"{better} > {worse}", "not measured yet", ""])
            continue
        wins = sum(a > b for a, b in zip(*pair, strict=True))
        lines.append([f"{better} > {worse}", difference(*pair), f"{wins} of {len(SEEDS)}"])
    return _markdown(["expected", "difference of circo mAP@10", "seeds on which it holds"], lines)


def origin(measured: Measured) -> str:
    """Markdown: command, and commit, dates and hardware of the rows."""
    made: dict[tuple[str, str], tuple[list[str], set[str]]] = {}
    for method in (*BASELINES, *METHODS):
        for run in measured["runs"].get(method.name, {}).values():
            names, dates = made.setdefault((run["commit"], _machine(run)), ([], set()))
            names += [] if method.name in names else [method.name]
            dates.add(run["date"])
    lines = [
        f"* commit {commit}, {' to '.join(sorted({min(dates), max(dates)}))}, {machine}: "
        + ", ".join(names)
        for (commit, machine), (names, dates) in made.items()
    ]
    timed = {
        f"* time of a query: commit {record['commit']}, {record['date']}, {_machine(record)}"
        for name, record in measured.get("latency", {}).items()
        if latency(measured, name)
    }
    lines += sorted(timed)
    if missing := [row.name for row in METHODS if row.name not in measured["runs"]]:
        lines.append(f"* not measured yet: {', '.join(missing)}")
    return "\n".join([f"`{measured['command']}`:", "", *lines])


def _machine(record: Measured) -> str:
    where = record.get("machine")
    if not where:
        return "two CPU cores"  # what was recorded before this command recorded it
    return f"{where['cores']} cores of {where['cpu']} ({where['device']})"


BLOCKS = {
    "origin": origin,
    "table": table,
    "short table": short_table,
    "expectations": expectations,
}
"""What stands between `<!-- NAME: benchmarks/compare.json -->` and `<!-- end -->`."""


def filled(text: str, measured: Measured) -> str:
    """`text` with its blocks as `measured` has them."""

    def block(found: re.Match) -> str:
        return f"{found[1]}\n{BLOCKS[found[2]](measured)}\n<!-- end -->"

    body = r"(?:(?!<!-- end -->).*\n)*"
    pattern = rf"(<!-- ([\w ]+): benchmarks/compare\.json -->)\n{body}<!-- end -->"
    return re.sub(pattern, block, text)


def plotted(measured: Measured) -> dict[str, list[float]]:
    """Method -> HEADLINE of each seed, best first."""
    shown = {row.name: values(measured, row.name) for row in rows(measured)}
    return dict(sorted(shown.items(), key=lambda item: -sum(item[1])))


def plot(measured: Measured) -> Image.Image:
    kinds = dict.fromkeys((row.name for row in BASELINES), "baseline")
    kinds |= {row.name: "image triplets" if row.triplets else "other" for row in METHODS}
    return compare_plot.dots(
        plotted(measured),
        kinds,
        title=f"{HEADLINE} on the embedded world, mean ± standard deviation of three seeds (ticks)",
    )


DOCUMENTS = ("RESULTS.md", "README.md")
PLOT = "benchmarks/compare.png"


def render(measured: Measured, root: Path) -> None:
    """Rewrites the blocks of the documents, and the plot."""
    for name in DOCUMENTS:
        text = filled((root / name).read_text(), measured)
        write_atomically(root / name, lambda file, text=text: file.write(text.encode()))
    picture, said = plot(measured), PngInfo()
    said.add_text("numbers", json.dumps(plotted(measured)))  # what it shows, for a test to read
    write_atomically(root / PLOT, lambda file: picture.save(file, "PNG", pnginfo=said))
