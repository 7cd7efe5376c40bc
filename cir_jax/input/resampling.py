"""PIL's resizing of the part of an image that is kept: for images too thin to resize as a whole.

A picture of 1 x 20000 pixels whose short side becomes 224 is 4.5 million pixels long before its
middle is cut out, and a square of 400 million pixels once it is padded. Here only the kept pixels
are computed, with the arithmetic of Pillow's Resample.c (22-bit weights, 8 bits between the
horizontal and the vertical pass), so that they are the same.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

AREA = 1 << 24
"""Pixels that PIL may need in passing; of larger images, twice their own."""

_ONE = 1 << 22
_NEAREST = 0
_KEPT = {"L": "L", "RGB": "RGB", "CMYK": "CMYK", "LA": "La", "RGBA": "RGBa"}
"""Modes resized as they are -> the mode in which PIL does it (colours times alpha)."""


def _bicubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _hamming(x: np.ndarray) -> np.ndarray:
    # constants of single precision, as in C
    window = float(np.float32(0.54)) + float(np.float32(0.46)) * np.cos(np.pi * x)
    return np.where(np.abs(x) < 1, np.sinc(x) * window, 0)


_FILTERS: dict[int, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    1: (3.0, lambda x: np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0)),  # Lanczos
    2: (1.0, lambda x: np.maximum(1 - np.abs(x), 0)),  # bilinear
    3: (2.0, _bicubic),
    4: (0.5, lambda x: np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)),  # box
    5: (1.0, _hamming),
}
"""PIL's number of a filter -> its support, and its weight at a distance."""

Window = tuple[int, np.ndarray]
"""First source pixel of an output pixel, and the weights from there on, times 2 ** 22."""


def too_large(image: tuple[int, int], canvas: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether PIL would need far more than the image's own pixels to pad it to `canvas` and to make
    `size` of that. All are (width, height).
    """
    most = max(math.prod(canvas), math.prod(size), size[0] * canvas[1])
    return most > max(AREA, 2 * math.prod(image))


def resized_part(
    image: Image.Image,
    canvas: tuple[int, int],
    corner: tuple[int, int],
    padding: Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    resample: int,
) -> Image.Image:
    """The image on a canvas, resized to `size`, of which `box` is kept.

    canvas, size: (width, height). corner: (left, top) of the image on the canvas, which is of the
    colour of `padding`, an image of one pixel. Palettes come back as RGB, as do modes of more than
    8 bits, which PIL would resize first. Of neighbours that are equally near, PIL may choose the
    other.
    """
    if image.mode in ("1", "P"):
        resample = _NEAREST  # PIL's rule for them
    kept = image.mode if image.mode in _KEPT else "RGB"
    done_in = kept if resample == _NEAREST else _KEPT[kept]
    pixels, colour = (_array(each.convert(kept), done_in) for each in (image, padding))
    columns = _windows(canvas[0], size[0], box[0], box[2], resample)
    rows = _windows(canvas[1], size[1], box[1], box[3], resample)
    if _down_first(canvas, size):
        turned = pixels.swapaxes(0, 1)
        out = _both(turned, corner[::-1], colour, rows, columns).swapaxes(0, 1)
    else:
        out = _both(pixels, corner, colour, columns, rows)
    return Image.frombytes(done_in, (len(columns), len(rows)), out.tobytes()).convert(kept)


def _down_first(canvas: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether PIL begins with the vertical pass, which shows where the first pass overshoots."""
    less_high, less_wide = canvas[1] - size[1], canvas[0] - size[0]
    return less_high > max(0, 2 * less_wide) and _pillow_chooses()


@functools.cache
def _pillow_chooses() -> bool:
    """Whether this Pillow chooses the first pass at all: older ones begin with the horizontal."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 2, (60, 8), np.uint8) * 255)
    size = (6, 7)
    downwards = image.resize((image.width, size[1]), 1).resize(size, 1)
    return downwards.tobytes() == image.resize(size, 1).tobytes()


def _both(
    pixels: np.ndarray,
    corner: tuple[int, int],
    colour: np.ndarray,
    columns: Sequence[Window],
    rows: Sequence[Window],
) -> np.ndarray:
    """uint8[height, width, bands] -> uint8[rows, columns, bands], the pass along rows first."""
    out = np.empty((len(rows), len(columns), colour.shape[-1]), np.uint8)
    # as many rows at a time as need no more than AREA in passing
    reach = max(len(weights) for _, weights in rows)
    apart = max((b[0] - a[0] for a, b in itertools.pairwise(rows)), default=1)
    step = max(1, (AREA // len(columns) - reach) // max(apart, 1))
    for y in range(0, len(rows), step):
        group = rows[y : y + step]
        first = max(group[0][0] - corner[1], 0)
        last = max(start + len(weights) for start, weights in group) - corner[1]
        across = _pass(pixels[first : max(last, first)], columns, corner[0], colour)
        down = _pass(across.swapaxes(0, 1), group, corner[1] + first, colour)
        out[y : y + step] = down.swapaxes(0, 1)
    return out


def _array(image: Image.Image, mode: str) -> np.ndarray:
    """uint8[height, width, bands]."""
    pixels = np.asarray(image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _windows(length: int, size: int, first: int, last: int, resample: int) -> list[Window]:
    """Of the output pixels `first` to `last` when `length` pixels become `size`."""
    scale = length / size
    if resample == _NEAREST:
        one = np.array([_ONE], np.float64)
        return [(min(int((x + 0.5) * scale), length - 1), one) for x in range(first, last)]
    reach, weight = _FILTERS[resample]
    stretch = max(scale, 1.0)
    windows = []
    for x in range(first, last):
        centre = (x + 0.5) * scale
        start = max(int(centre - reach * stretch + 0.5), 0)
        end = min(int(centre + reach * stretch + 0.5), length)
        weights = weight((np.arange(start, end) - centre + 0.5) * (1 / stretch))
        total = np.add.accumulate(weights)[-1]  # one after the other, as a loop does
        weights = weights / total if total else weights
        windows.append((start, np.trunc(weights * _ONE + np.copysign(0.5, weights))))
    return windows


def _pass(
    pixels: np.ndarray, windows: Sequence[Window], offset: int, colour: np.ndarray
) -> np.ndarray:
    """uint8[rows, n, bands] -> uint8[rows, windows, bands].

    Row i of the pixels stands at `offset` of a line that is otherwise of one colour.
    """
    rows, n, bands = pixels.shape
    out = np.empty((rows, len(windows), bands), np.uint8)
    flat = colour.reshape(bands).astype(np.float64)
    for i, (start, weights) in enumerate(windows):
        first = min(max(start - offset, 0), n)
        last = max(min(start + len(weights) - offset, n), first)
        inside = weights[first + offset - start : last + offset - start]
        base = flat * (weights.sum() - inside.sum()) + _ONE / 2
        if first == last:  # nothing but the one colour
            out[:, i] = np.clip(np.floor(base / _ONE), 0, 255)
            continue
        step = max(1, (1 << 20) // max(last - first, 1))
        for row in range(0, rows, step):
            part = pixels[row : row + step, first:last].astype(np.float64)
            # sums of integers below 2 ** 53: exact in any order
            total = base + np.tensordot(part, inside, (1, 0))
            out[row : row + step, i] = np.clip(np.floor(total / _ONE), 0, 255)
    return out
