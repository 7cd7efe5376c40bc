"""Regions of images: stored masks, masks that users give, and pictures with a region taken out.

A mask is bool[SIZE, SIZE], rows from the top, squashed to a square whatever the picture's sides
are; True = the region that the text is about. Stored, it is its bits, 512 bytes.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.input import images
from cir_jax.input.images import ImageTransform

SIZE = 64
FIELD = "masked"
"""What a record's `image` with noise in its `mask` is called where image fields are named."""

NOISE = "standard normal noise, seeded by the record's id"
FILLS = ("noise", "grey")
"""What takes the place of a region: noise (CompoDiff's paper), or the mean colour (its release)."""


def pack(mask: np.ndarray) -> bytes:
    """bool[SIZE, SIZE] -> its bits, row by row."""
    assert mask.shape == (SIZE, SIZE), mask.shape
    return np.packbits(mask.astype(bool)).tobytes()


def unpack(data: bytes, what: str) -> np.ndarray:
    """bool[SIZE, SIZE]. Raises DataError naming `what` for bytes that are no mask."""
    if not isinstance(data, bytes) or len(data) != SIZE * SIZE // 8:
        found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise DataError(
            f"{what}: a mask of {found}; expected {SIZE * SIZE // 8} bytes, the bits of "
            f"{SIZE} x {SIZE} pixels. Prepare the table again."
        )
    return np.unpackbits(np.frombuffer(data, np.uint8)).reshape(SIZE, SIZE).astype(bool)


def region(mask: np.ndarray, size: tuple[int, int], transform: ImageTransform) -> np.ndarray:
    """bool[height, width], of any shape, of a picture of `size` (width, height) -> the same in the
    pixels that `transform` makes of the picture. What is padded is no region."""
    whole = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    return transform(whole.convert("RGB"))[..., 0] > 127


def noised(image: Image.Image, mask: np.ndarray, transform: ImageTransform, seed: int) -> Any:
    """uint8[crop, crop, 3] of the picture, the mask's region in it replaced by noise."""
    return fill(transform(image), region(mask, image.size, transform), transform, "noise", seed)


def fill(
    pixels: np.ndarray, where: np.ndarray, transform: ImageTransform, how: str, seed: int = 0
) -> np.ndarray:
    """What a transform gave, uint8[height, width, 3], without the region bool[height, width].

    how: "noise", whose normalised values are N(0, 1), as far as bytes can say it: uint8.
    "grey", normalised values of zero: float32, normalised, since no byte is exactly the mean.
    """
    mean, std = np.asarray(transform.statistics, np.float32)
    if how == "grey":
        normal = (pixels.astype(np.float32) * np.float32(transform.rescale) - mean) / std
        return np.where(where[..., None], np.float32(0), normal)
    noise = np.random.default_rng(seed).standard_normal((int(where.sum()), 3), np.float32)
    filled = pixels.copy()
    filled[where] = np.clip(np.round((mean + std * noise) / transform.rescale), 0, 255)
    return filled


def read(given: Any, size: tuple[int, int]) -> np.ndarray:
    """The mask of a query, bool[height, width] of the reference's size (width, height).

    given: a PNG file, a PIL image of mode "1" or "L", or an array [height, width]; bool, or 0 and 1
    (or 0 and 255): 1 = the region to edit. Raises DataError for another size or mode, for other
    values, and for an empty region.
    """
    what = _name(given)
    given = _pixels(given)
    if given.shape != size[::-1]:
        shape = " x ".join(map(str, given.shape[::-1]))
        raise DataError(
            f"{what}: a mask of {shape} pixels; the reference image has {size[0]} x {size[1]}. "
            "Give a mask of the reference's own size."
        )
    values = np.unique(given)
    if not (np.isin(values, (0, 1)).all() or np.isin(values, (0, 255)).all()):
        raise DataError(
            f"{what}: a mask with the values {', '.join(map(str, values[:5]))}...; expected two: "
            "0, and 1 or 255 = the region to edit. Save it without smooth edges."
        )
    if not given.any():
        raise DataError(f"{what}: an empty mask, no pixel is set. Leave it out, or mark a region.")
    return given > 0


def content_id(given: Any) -> str:
    """A hash of the region, of a mask as `read` takes it. Raises its DataError for what is none."""
    pixels = _pixels(given) > 0
    return hashlib.sha256(f"{pixels.shape} ".encode() + pixels.tobytes()).hexdigest()[:16]


def _name(given: Any) -> str:
    return str(given) if isinstance(given, str | Path) else "mask"


def _pixels(given: Any) -> np.ndarray:
    """Of a mask as `read` takes it. Raises its DataError for another mode."""
    what = _name(given)
    if isinstance(given, str | Path):
        given = images.read(Path(given))
    if not isinstance(given, Image.Image):
        return np.asarray(given)
    if given.mode not in ("1", "L"):
        raise DataError(
            f"{what}: a mask of mode {given.mode!r}; expected 1 or L, black and white: white = "
            'the region to edit. Convert it: Image.open(FILE).convert("L").'
        )
    with images.reading(what):
        return np.asarray(given)


def condition(where: np.ndarray) -> np.ndarray:
    """bool[crop, crop], from `region` -> float32[SIZE, SIZE] of 0 and 1, as methods read it.

    Raises DataError where nothing is left of it.
    """
    small = Image.fromarray(where.astype(np.uint8) * 255)
    small = small.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    mask = (np.asarray(small) > 127).astype(np.float32)
    if not mask.any():
        raise DataError(
            "the mask's region is cut off by the crop of the preprocessing, or smaller than a "
            f"pixel of {SIZE} x {SIZE}. Mark a larger one, or set --config.preprocessing=squash."
        )
    return mask
