"""One picture of what a method retrieves: hits, failures, and what it should have found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cir_jax.evaluation.queries import Benchmark
from cir_jax.evaluation.result import Result
from cir_jax.input.images import reading, to_rgb
from cir_jax.retrieval.features import open_image
from cir_jax.storage.atomic import write_atomically

TILE = 128
GAP = 14
FRAME = 4
SHOWN = 5
TEXT_WIDTH = 176
MARGIN = 26
HEADER = 92
ROW = TILE + 30

BACKGROUND = (250, 250, 248)
INK = (33, 37, 41)
FAINT = (134, 142, 150)
RULE = (228, 230, 232)
HIT = (47, 158, 68)
OTHER = (201, 205, 210)
MISSED = (232, 119, 34)


def contact_sheet(
    result: Result, benchmark: Benchmark, path: Path | None = None, *, rows: int = 8
) -> Image.Image:
    """A PNG, about 1200 pixels wide: per query its reference, text, top 5 and one missed target.

    Hits are framed green, other images grey, a ground truth outside the top 5 orange. Half of the
    queries are those with a hit (spread over them, best first), half those without one (spread, the
    worst last); a function of the result alone. path: written atomically, on process 0.
    Raises ValueError when the result has no ground truth or is of another benchmark.
    """
    if result.outcome is None:
        raise ValueError(f"{result.benchmark} {result.split} has no public ground truth")
    if (result.benchmark, result.split) != (benchmark.name, benchmark.split):
        raise ValueError(f"a result of {result.benchmark} {result.split}, not of {benchmark.name}")
    chosen = _choose(result.best_rank, rows)
    width = _columns()[-1] + TILE + MARGIN
    sheet = Image.new("RGB", (width, HEADER + ROW * len(chosen) + 8), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _title(draw, result, sheet.width)
    for line, position in enumerate(chosen):
        _row(sheet, draw, result, benchmark, int(position), HEADER + line * ROW)
    if path is not None and jax.process_index() == 0:
        write_atomically(Path(path), lambda file: sheet.save(file, format="PNG"))
    return sheet


def _choose(best: np.ndarray, rows: int) -> list[int]:
    """Positions of hits, then of failures, each spread evenly over its kind."""
    order = np.argsort(best, kind="stable")
    hits, failures = order[best[order] < SHOWN], order[best[order] >= SHOWN]
    few = min(len(failures), rows // 2)
    many = min(len(hits), rows - few)
    few = min(len(failures), rows - many)

    def spread(x: np.ndarray, count: int) -> list[int]:
        return [int(i) for i in x[np.linspace(0, len(x) - 1, count).round().astype(int)]]

    return spread(hits, many) + spread(failures, few)


def _columns() -> tuple[int, int, list[int], int]:
    """x of the reference, the text, the retrieved images, the missed ground truth."""
    reference = MARGIN
    text = reference + TILE + GAP + 2
    first = text + TEXT_WIDTH + GAP
    shown = [first + i * (TILE + GAP) for i in range(SHOWN)]
    return reference, text, shown, shown[-1] + TILE + 2 * GAP


def _title(draw: ImageDraw.ImageDraw, result: Result, width: int) -> None:
    name = result.headline[0]
    x = result.metrics[name]
    title = f"{result.benchmark} {result.split}  ·  {result.method}  ·  {name} {x.value:.1f}"
    title += "" if np.isnan(x.se) else f" ± {x.se:.1f}"
    draw.text((MARGIN, 18), title, INK, font(22))
    reference, text, shown, missed = _columns()
    labels = [(reference, "reference"), (text, "modification"), (missed, "missed")]
    for x0, label in [*labels, *((x0, str(i + 1)) for i, x0 in enumerate(shown))]:
        draw.text((x0, HEADER - 30), label, FAINT, font(14))
    legend = (
        ("hit", HIT),
        ("not a ground truth", OTHER),
        ("ground truth, missed", MISSED),
    )
    x0 = width - MARGIN
    for label, colour in reversed(legend):
        x0 -= int(draw.textlength(label, font(14)))
        draw.text((x0, 24), label, FAINT, font(14))
        draw.rectangle((x0 - 20, 26, x0 - 8, 38), outline=colour, width=3)
        x0 -= 38


def _row(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    result: Result,
    benchmark: Benchmark,
    position: int,
    top: int,
) -> None:
    query = benchmark.queries[position]
    reference, text, shown, missed = _columns()
    draw.line((MARGIN, top - 8, sheet.width - MARGIN, top - 8), RULE)
    top += 4
    _tile(sheet, benchmark.reference(query), f"reference of query {query.id}", reference, top, None)
    rank = int(result.best_rank[position]) + 1
    note = f"query {query.id}, best rank {rank}"
    lines = _wrap(draw, " / ".join(query.texts), font(17), TEXT_WIDTH)
    limit = (TILE - 22) // 22
    if len(lines) > limit:
        lines = [*lines[: limit - 1], lines[limit - 1][:-1].rstrip() + "…"]
    for i, line in enumerate(lines):
        draw.text((text, top + 22 * i), line, INK, font(17))
    draw.text((text, top + TILE - 16), note, FAINT, font(13))
    found = [int(image) for image in result.top[position][:SHOWN] if image >= 0]
    for x0, image in zip(shown, found, strict=False):
        colour = HIT if image in query.targets else OTHER
        _tile(sheet, benchmark.gallery[image], f"gallery record {image}", x0, top, colour)
    rest = [target for target in query.targets if target not in found]
    if rest:
        what = f"gallery record {rest[0]}"
        _tile(sheet, benchmark.gallery[rest[0]], what, missed, top, MISSED)


def _tile(
    sheet: Image.Image,
    record: Mapping[str, Any],
    what: str,
    x: int,
    y: int,
    colour: tuple[int, int, int] | None,
) -> None:
    with reading(what):
        image = to_rgb(open_image(record, "image", what))
        scale = TILE / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    if colour is not None:
        draw = ImageDraw.Draw(sheet)
        box = (x - FRAME, y - FRAME, x + TILE + FRAME - 1, y + TILE + FRAME - 1)
        draw.rectangle(box, fill=BACKGROUND, outline=colour, width=FRAME)
    sheet.paste(image, (x + (TILE - size[0]) // 2, y + (TILE - size[1]) // 2))


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> list[str]:
    """Lines no wider than `width`; a single longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def font(size: int) -> Any:
    return ImageFont.load_default(size)
