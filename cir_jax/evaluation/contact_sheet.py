"""One picture of what a method retrieves: hits, failures, and what it should have found."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cir_jax.evaluation.queries import Benchmark, Query
from cir_jax.evaluation.result import Result
from cir_jax.input.images import reading, to_rgb
from cir_jax.retrieval.features import open_image
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.buckets import place

TILE = 128
GAP = 14
FRAME = 4
SHOWN = 5
TEXT_WIDTH = 176
MARGIN = 26
HEADER = 92
ROW = TILE + 34
LINE = TILE + 48
"""Of one run of a query, where several are compared: its name, the images, their scores."""
FOOTER = 36

BACKGROUND = (250, 250, 248)
INK = (33, 37, 41)
FAINT = (134, 142, 150)
RULE = (228, 230, 232)
HIT = (47, 158, 68)
OTHER = (201, 205, 210)
MISSED = (232, 119, 34)


def contact_sheet(
    result: Result,
    benchmark: Benchmark,
    path: Path | None = None,
    *,
    rows: int = 8,
    decode: Callable[[np.ndarray, str], Image.Image] | None = None,
) -> Image.Image:
    """A PNG, about 1200 pixels wide: per query its reference, text, top 5 with their scores and one
    missed target with its rank; protocol, weights and setting at the foot.

    Hits are framed green, other images grey, a ground truth outside the top 5 orange. Half of the
    queries are those with a hit (spread over them, best first), half those without one (spread, the
    worst last); a function of the result alone. path: written atomically, on process 0. decode: one
    more column, the composed queries as `decoding.Unclip` shows them.
    Raises ValueError when the result has no ground truth or is of another benchmark.
    """
    if result.outcome is None:
        raise ValueError(f"{result.benchmark} {result.split} has no public ground truth")
    if (result.benchmark, result.split) != (benchmark.name, benchmark.split):
        raise ValueError(f"a result of {result.benchmark} {result.split}, not of {benchmark.name}")
    if decode is not None and result.composed is None:
        raise ValueError(f"{result.method} composes no features of the backbone: none to decode")
    chosen = _choose(result.best_rank, rows)
    width = _columns(decode is not None)[-1] + TILE + MARGIN
    footer = f"{result.protocol.id}; {result.weights_id}; setting {result.setting_id or '-'}"
    sheet, draw = _sheet(width, ROW * len(chosen), footer)
    _title(draw, result, sheet.width, decode is not None)
    for line, position in enumerate(chosen):
        shown = None
        if decode is not None:
            shown = decode(result.composed[position], f"{result.seed}/{position}")
        _row(sheet, draw, result, benchmark, int(position), HEADER + line * ROW, shown)
    if path is not None and jax.process_index() == 0:
        write_atomically(place(path), lambda file: sheet.save(file, format="PNG"))
    return sheet


def comparison_sheet(
    benchmark: Benchmark,
    title: str,
    footer: str,
    labels: Sequence[str],
    rows: Sequence[tuple[Query, Sequence[Sequence[tuple[int, float]]], Sequence[str]]],
    path: Path | None = None,
) -> Image.Image:
    """A PNG of queries under several runs: reference and text, then a line of images per run.

    labels: of the runs. rows: query, per run the positions and scores of its best images, per run a
    note. The first target stands at the right. path: written atomically.
    """
    lines = len(labels)
    width = _columns()[-1] + TILE + MARGIN
    height = LINE * lines + 16
    sheet, draw = _sheet(width, height * len(rows), footer)
    draw.text((MARGIN, 18), title, INK, font(22))
    reference, text, shown, missed = _columns()
    for x0, label in ((reference, "reference"), (text, "modification"), (missed, "ground truth")):
        draw.text((x0, HEADER - 30), label, FAINT, font(14))
    for line, (query, tops, notes) in enumerate(rows):
        top = HEADER + line * height
        draw.line((MARGIN, top - 8, width - MARGIN, top - 8), RULE)
        what = f"reference of query {query.id}"
        tile(sheet, benchmark.reference(query), what, reference, top + 24, None)
        words = wrap(draw, " / ".join(query.texts), font(17), TEXT_WIDTH)
        limit = (lines * LINE - 50) // 22
        words = [*words[: limit - 1], "…"] if len(words) > limit else words
        for i, one in enumerate(words):
            draw.text((text, top + 24 + 22 * i), one, INK, font(17))
        draw.text((text, top + height - 40), f"query {query.id}", FAINT, font(13))
        for i, (label, best, note) in enumerate(zip(labels, tops, notes, strict=True)):
            y = top + i * LINE
            draw.text((shown[0], y), f"{label}: {note}", INK, font(14))
            for x0, (image, score) in zip(shown, best, strict=False):
                colour = HIT if image in query.targets else OTHER
                what = f"gallery record {image}"
                tile(sheet, benchmark.gallery[image], what, x0, y + 24, colour)
                draw.text((x0, y + 24 + TILE + FRAME + 1), f"{score:.3f}", FAINT, font(12))
        what = f"gallery record {query.targets[0]}"
        tile(sheet, benchmark.gallery[query.targets[0]], what, missed, top + 24, HIT)
    if path is not None:
        write_atomically(place(path), lambda file: sheet.save(file, format="PNG"))
    return sheet


def _sheet(width: int, height: int, footer: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A sheet with room for rows of `height` in all; its footer has as many lines as it needs."""
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = wrap(measure, footer, font(13), width - 2 * MARGIN)
    foot = FOOTER + 18 * (len(lines) - 1)
    sheet = Image.new("RGB", (width, HEADER + height + foot), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((MARGIN, HEADER + height + FOOTER - 28 + 18 * i), line, FAINT, font(13))
    return sheet, draw


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


def _columns(decoded: bool = False) -> tuple[int, int, list[int], int]:
    """x of the reference, the text, the retrieved images, the missed ground truth. decoded: whether
    there is one more image, `_decoded`, behind the text."""
    reference = MARGIN
    text = reference + TILE + GAP + 2
    first = _decoded(text) + decoded * (TILE + 2 * GAP)
    shown = [first + i * (TILE + GAP) for i in range(SHOWN)]
    return reference, text, shown, shown[-1] + TILE + 2 * GAP


def _decoded(text: int) -> int:
    return text + TEXT_WIDTH + GAP


def _title(draw: ImageDraw.ImageDraw, result: Result, width: int, decoded: bool) -> None:
    name = result.headline[0]
    x = result.metrics[name]
    title = f"{result.benchmark} {result.split}  ·  {result.method}  ·  {name} {x.value:.1f}"
    title += "" if np.isnan(x.se) else f" ± {x.se:.1f}"
    draw.text((MARGIN, 18), title, INK, font(22))
    reference, text, shown, missed = _columns(decoded)
    labels = [(reference, "reference"), (text, "modification"), (missed, "missed")]
    labels += [(_decoded(text), "decoded")] * decoded
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
    decoded: Image.Image | None,
) -> None:
    query = benchmark.queries[position]
    reference, text, shown, missed = _columns(decoded is not None)
    draw.line((MARGIN, top - 8, sheet.width - MARGIN, top - 8), RULE)
    top += 4
    tile(sheet, benchmark.reference(query), f"reference of query {query.id}", reference, top, None)
    rank = int(result.best_rank[position]) + 1
    note = f"query {query.id}, best rank {rank}"
    lines = wrap(draw, " / ".join(query.texts), font(17), TEXT_WIDTH)
    limit = (TILE - 22) // 22
    if len(lines) > limit:
        lines = [*lines[: limit - 1], lines[limit - 1][:-1].rstrip() + "…"]
    for i, line in enumerate(lines):
        draw.text((text, top + 22 * i), line, INK, font(17))
    draw.text((text, top + TILE - 16), note, FAINT, font(13))
    if decoded is not None:
        paste(sheet, decoded, _decoded(text), top, None)
    found = [int(image) for image in result.top[position][:SHOWN] if image >= 0]
    below = top + TILE + FRAME + 1
    for x0, image, score in zip(shown, found, result.scores[position], strict=False):
        colour = HIT if image in query.targets else OTHER
        tile(sheet, benchmark.gallery[image], f"gallery record {image}", x0, top, colour)
        draw.text((x0, below), f"{score:.3f}", FAINT, font(12))
    rest = [target for target in query.targets if target not in found]
    if rest:
        what = f"gallery record {rest[0]}"
        tile(sheet, benchmark.gallery[rest[0]], what, missed, top, MISSED)
        where = result.outcome.target_ranks[position][query.targets.index(rest[0])]
        draw.text((missed, below), f"rank {where + 1}", FAINT, font(12))


def tile(
    sheet: Image.Image,
    record: Mapping[str, Any],
    what: str,
    x: int,
    y: int,
    colour: tuple[int, int, int] | None,
) -> None:
    """Pastes the image of a record, of TILE pixels at most, in a frame of the colour if there is
    one. what: the record, in messages."""
    with reading(what):
        paste(sheet, to_rgb(open_image(record, "image", what)), x, y, colour)


def paste(
    sheet: Image.Image,
    image: Image.Image,
    x: int,
    y: int,
    colour: tuple[int, int, int] | None,
) -> None:
    """Likewise an image that is open."""
    scale = TILE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    if colour is not None:
        draw = ImageDraw.Draw(sheet)
        box = (x - FRAME, y - FRAME, x + TILE + FRAME - 1, y + TILE + FRAME - 1)
        draw.rectangle(box, fill=BACKGROUND, outline=colour, width=FRAME)
    sheet.paste(image, (x + (TILE - size[0]) // 2, y + (TILE - size[1]) // 2))


def wrap(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> list[str]:
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
