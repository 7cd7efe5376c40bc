"""Numbers of methods as dots with whiskers."""

import math
import statistics
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from cir_jax.evaluation.contact_sheet import BACKGROUND, FAINT, INK, MARGIN, RULE, font

Colour = tuple[int, int, int]

WIDTH = 1000
HEADER = 92
ROW = 30
AXIS = (250, 850)
"""x of zero, and of the end of the axis."""
SHARPER = 2
"""Drawn so many times as large, for smooth edges."""
KINDS: dict[str, tuple[str, Colour]] = {
    "other": ("no image triplets", (25, 113, 194)),
    "image triplets": ("trained on image triplets", (232, 119, 34)),
    "baseline": ("baseline", (134, 142, 150)),
}
"""Kind of a method -> its words in the legend, and its colour."""


def place(number: float, end: float) -> float:
    """x of a number on an axis that ends at `end`."""
    return AXIS[0] + (AXIS[1] - AXIS[0]) * number / end


def height(row: int) -> int:
    """y of a row's middle."""
    return HEADER + ROW * row + ROW // 2


def axis_end(numbers: Mapping[str, Sequence[float]]) -> int:
    """The multiple of 5 that holds all of them, whiskers, too."""
    most = max(max(*x, statistics.mean(x) + statistics.stdev(x)) for x in numbers.values())
    return 5 * math.ceil(most / 5)


def dots(
    numbers: Mapping[str, Sequence[float]], kinds: Mapping[str, str], title: str
) -> Image.Image:
    """A row per method, in the order of `numbers` (of each seed, 0 or more): the mean, a whisker of
    one standard deviation, the seeds as ticks. kinds: method -> key of KINDS."""
    size = (WIDTH, height(len(numbers)) + 14)
    sheet = Image.new("RGB", tuple(SHARPER * x for x in size), BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    def text(x: float, y: float, said: str, colour: Colour, of_size: int, anchor: str) -> None:
        at = (SHARPER * x, SHARPER * y)
        draw.text(at, said, colour, font(SHARPER * of_size), anchor=anchor)

    def line(x0: float, y0: float, x1: float, y1: float, colour: Colour, width: int) -> None:
        ends = tuple(SHARPER * x for x in (x0, y0, x1, y1))
        draw.line(ends, colour, SHARPER * width)

    def dot(x: float, y: float, radius: float, colour: Colour) -> None:
        draw.circle((SHARPER * x, SHARPER * y), SHARPER * radius, colour)

    text(MARGIN, 26, title, INK, 20, "lm")
    x = MARGIN
    for said, colour in KINDS.values():
        dot(x + 6, 58, 6, colour)
        text(x + 20, 58, said, FAINT, 15, "lm")
        x += 44 + draw.textlength(said, font(SHARPER * 15)) / SHARPER
    end, last = axis_end(numbers), height(len(numbers)) - ROW // 2
    for number in range(0, end + 1, 5):
        line(place(number, end), HEADER, place(number, end), last, RULE, 1)
        text(place(number, end), last + 14, str(number), FAINT, 14, "mm")
    for row, (method, found) in enumerate(numbers.items()):
        y, mean, spread = height(row), statistics.mean(found), statistics.stdev(found)
        colour = KINDS[kinds[method]][1]
        text(AXIS[0] - 16, y, method, INK, 15, "rm")
        line(place(max(0, mean - spread), end), y, place(mean + spread, end), y, colour, 2)
        for number in found:
            line(place(number, end), y - 5, place(number, end), y + 5, colour, 1)
        dot(place(mean, end), y, 6, colour)
        text(WIDTH - MARGIN, y, f"{mean:.1f} ± {spread:.1f}", INK, 15, "rm")
    return sheet.resize(size, Image.Resampling.LANCZOS)
