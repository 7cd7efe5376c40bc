"""Numbers printed in the papers, to stand beside ours: percent, as printed.

One file a paper, `NAME.txt`, in the order of its tables (`read` says how a file is written), with
what is left out and why. Cells that several tables print stand once, under all of them. A row
belongs to a benchmark under one protocol ("fashioniq:reversed" is Pic2Word's own) and to a split.
Never shown for other data, such as the embedded world.

Backbones: clip_b32, clip_b16, clip_l14, clip_bigg, clip_rn50, clip_rn50x4, blip_b, blip_l,
bge_vl_b, bge_vl_l. "+tat", "+rtd", "+clip4cir" stand for the method on a backbone so tuned;
"supervised": trained on the triplets of the benchmark itself. Notes: `unstated`: the paper does not
say how captions are joined, or which text a query has; `quoted from X`: the numbers are X's own.
Rows whose printed averages contradict their own columns are left out.
"""

import dataclasses
import functools
import importlib.resources
import statistics
from collections.abc import Mapping, Sequence

PAPERS = ("searle", "slerp", "isa", "rtd", "compodiff", "pic2word", "magiclens", "megapairs")

METRICS: Mapping[str, tuple[str, ...]] = {
    "fashioniq": ("R@10/shirt", "R@50/shirt", "R@10/dress", "R@50/dress", "R@10/toptee",
                  "R@50/toptee", "R@10", "R@50"),
    "cirr": ("R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"),
    "circo": ("mAP@5", "mAP@10", "mAP@25", "mAP@50"),
    "coco_object": ("R@1", "R@5", "R@10"),
    "coco_captions": (
        "i2t COCO 5k R@1", "i2t COCO 5k R@5", "i2t COCO 5k R@10",
        "i2t CxC R@1", "i2t CxC R@5", "i2t CxC R@10",
        "i2t ECCV mAP@R", "i2t ECCV R-P", "i2t ECCV R@1",
        "t2i COCO 5k R@1", "t2i COCO 5k R@5", "t2i COCO 5k R@10",
        "t2i CxC R@1", "t2i CxC R@5", "t2i CxC R@10",
        "t2i ECCV mAP@R", "t2i ECCV R-P", "t2i ECCV R@1",
    ),
    "cirr/inversion": ("R@1", "R@3", "R@5"),
}  # fmt: skip
"""Benchmark -> what the columns of its tables are, where a table does not say it."""

MEAN = "mean("
"""Begins a metric that is the mean of others: "mean(R@1+Rs@1)"."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a paper prints of a method. source: the paper, and what to know of the number.

    table: where, "2, D.2" = in both. variant: what an ablation changes of the method, "" = nothing:
    it is the paper's own.
    """

    benchmark: str
    split: str
    source: str
    method: str
    backbone: str
    metrics: Mapping[str, float]
    table: str = ""
    variant: str = ""

    @property
    def paper(self) -> str:
        """Its short name alone."""
        return self.source.partition(",")[0]

    @property
    def note(self) -> str:
        """What to know of the number, "" = nothing."""
        return self.source.partition(",")[2].strip()

    @property
    def quoted(self) -> bool:
        """Whether the numbers are another paper's own."""
        return self.note.startswith("quoted")


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper's tables. left_out: what of them is not among the rows, and why."""

    rows: tuple[Row, ...]
    left_out: tuple[str, ...]


@functools.cache
def read(paper: str) -> Paper:
    """The tables of one of PAPERS.

    Its file has blocks, each under "## Table 2, B.1: BENCHMARK SPLIT", of lines "method | backbone
    | numbers" or, of ablations, "method | backbone | what is changed | numbers"; "-": not printed.
    "columns: R@1, ..." before them says what is printed, if not METRICS; "note: ..." goes to the
    rows' source. The block "## Left out" has a line for each thing and its reason.
    """
    text = importlib.resources.files(__package__).joinpath(f"{paper}.txt").read_text("utf-8")
    rows: list[Row] = []
    left_out: list[str] = []
    for block in text.split("\n## ")[1:]:
        title, *lines = block.strip().splitlines()
        if title == "Left out":
            left_out += lines
            continue
        table, _, place = title.rpartition(": ")
        benchmark, split = place.split()
        said = dict(line.split(": ") for line in lines if "|" not in line)
        columns = METRICS.get(benchmark.partition(":")[0], ())
        if "columns" in said:
            columns = tuple(said["columns"].split(", "))
        source = ", ".join(part for part in (paper, said.get("note", "")) if part)
        number = table.removeprefix("Tables ").removeprefix("Table ")
        for line in lines:
            if "|" not in line:
                continue
            method, backbone, *variant, numbers = (part.strip() for part in line.split("|"))
            values = zip(columns, numbers.split(), strict=True)
            metrics = {name: float(value) for name, value in values if value != "-"}
            rows.append(Row(benchmark, split, source, method, backbone, metrics, number, *variant))
    return Paper(tuple(rows), tuple(left_out))


def of_paper(paper: str) -> list[Row]:
    """All rows of a paper, of all benchmarks, with its ablations and what it quotes."""
    return list(read(paper).rows)


def rows(benchmark: str, split: str, methods: Sequence[str], weights_id: str = "") -> list[Row]:
    """Published rows of these methods on the benchmark's split, under exactly this protocol, each
    of the paper whose number it is, and without ablations.

    weights_id: of the backbone; if it is one of the papers', only rows on that backbone.
    """
    backbone = backbone_of(weights_id)
    return [
        row
        for paper in PAPERS
        for row in of_paper(paper)
        if (row.benchmark, row.split) == (benchmark, split)
        and row.method in methods
        and not (row.variant or row.quoted)
        and (not backbone or _base(row.backbone) == backbone)
    ]


def value(metrics: Mapping[str, float], name: str) -> float | None:
    """A metric of a run by its name in a table, None if it was not measured."""
    if not name.startswith(MEAN):
        return metrics.get(name)
    parts = [metrics.get(part) for part in name[len(MEAN) : -1].split("+")]
    found = [part for part in parts if part is not None]
    return statistics.fmean(found) if len(found) == len(parts) else None


BACKBONES = {
    "clip-vit-base-patch32": "clip_b32",
    "vit-b-32": "clip_b32",
    "clip-vit-base-patch16": "clip_b16",
    "vit-b-16": "clip_b16",
    "clip-vit-large-patch14": "clip_l14",
    "vit-l-14": "clip_l14",
    "vit-bigg-14": "clip_bigg",
    "rn50.": "clip_rn50",
    "bge-vl-base": "bge_vl_b",
    "bge-vl-large": "bge_vl_l",
    "model_large": "blip_l",
    "model_base": "blip_b",
}
"""Part of a weights id, in lower case -> backbone."""


def backbone_of(weights_id: str) -> str:
    """The papers' backbone with these weights, "" for any other."""
    found = [name for part, name in BACKBONES.items() if part in weights_id.lower()]
    return found[0] if found else ""


def _base(backbone: str) -> str:
    return backbone.partition("+")[0].partition(",")[0].partition(" ")[0]
