"""One picture of the filters' work: what passed, and what fell at each of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from cir_jax.evaluation.contact_sheet import (
    BACKGROUND,
    FAINT,
    GAP,
    HIT,
    INK,
    MARGIN,
    MISSED,
    RULE,
    TILE,
    font,
    tile,
    wrap,
)
from cir_jax.storage.atomic import write_atomically
from data.synthtriplets.filters import THRESHOLDS

ROWS = 3  # of each kind
TITLES = {"": "kept", **{name: f"fell at {name}" for name in THRESHOLDS}, "best": "too many"}

_ROW = TILE + 26
_HEADER = 78
_TEXT = 330
_NUMBERS = 190


@dataclasses.dataclass(frozen=True)
class Example:
    """A pair, encoded, with the record of its JSON and its similarities."""

    reference: bytes
    target: bytes
    record: Mapping[str, Any]
    similarities: Mapping[str, float | None]


def write(
    path: Path, examples: Mapping[str, Sequence[Example]], statistics: Mapping[str, Any]
) -> None:
    """A PNG: of each key of TITLES the examples there are, with all their similarities, orange what
    is below its threshold."""
    lines = [(verdict, example) for verdict in TITLES for example in examples.get(verdict, ())]
    width = 2 * MARGIN + 2 * (TILE + GAP) + _TEXT + GAP + _NUMBERS
    picture = Image.new("RGB", (width, _HEADER + _ROW * len(lines) + 8), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    kept, pairs = statistics["kept"], statistics["pairs"]
    draw.text((MARGIN, 18), f"{kept:,} of {pairs:,} pairs kept", INK, font(22))
    columns = (MARGIN, MARGIN + TILE + GAP, MARGIN + 2 * (TILE + GAP))
    numbers = columns[2] + _TEXT + GAP
    labels = ("reference", "target", "captions and instruction", "similarities")
    for x, label in zip((*columns, numbers), labels, strict=True):
        draw.text((x, _HEADER - 26), label, FAINT, font(14))
    for i, (verdict, example) in enumerate(lines):
        top = _HEADER + i * _ROW
        draw.line((MARGIN, top - 6, width - MARGIN, top - 6), RULE)
        colour = MISSED if verdict else HIT
        for x, name in zip(columns, ("reference", "target"), strict=False):
            data = getattr(example, name)
            tile(picture, {"image": data}, f"{name} of {TITLES[verdict]}", x, top + 4, colour)
        _texts(draw, verdict, example, columns[2], top)
        _similarities(draw, example, statistics["filters"], numbers, top)
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


def _texts(draw: ImageDraw.ImageDraw, verdict: str, example: Example, x: int, top: int) -> None:
    record = example.record
    draw.text((x, top + 2), TITLES[verdict], MISSED if verdict else HIT, font(14))
    texts = {"text": INK, "reference_caption": FAINT, "target_caption": FAINT}
    lines = [
        (line, colour)
        for name, colour in texts.items()
        for line in wrap(draw, record[name], font(14), _TEXT)[:2]
    ]
    for i, (line, colour) in enumerate(lines):
        draw.text((x, top + 24 + 18 * i), line, colour, font(14))


def _similarities(
    draw: ImageDraw.ImageDraw, example: Example, filters: Mapping[str, Any], x: int, top: int
) -> None:
    asked = {name: value for name, value in example.similarities.items() if value is not None}
    for i, (name, value) in enumerate(asked.items()):
        colour = MISSED if value < filters[name]["threshold"] else INK
        y = top + 2 + 20 * i
        draw.text((x, y), name.replace("_", " "), FAINT, font(14))
        number = f"{value:.2f}"
        draw.text((x + _NUMBERS - draw.textlength(number, font(14)), y), number, colour, font(14))
