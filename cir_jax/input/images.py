"""Image decoding and preprocessing on PIL, so that pixels equal those of the original code.

Transparency follows the weights' own preprocessor. transformers puts the image on white, before it
resizes (`alpha="white"`). OpenAI's and open_clip's code resizes all bands and then drops alpha, so
that the colours below transparent pixels show; salesforce's BLIP and timm drop it first
(`alpha="drop"`). The same holds for files that name one transparent colour.
"""

import contextlib
import dataclasses
import io
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cir_jax.errors import DataError, WeightsError
from cir_jax.input import preprocessors, resampling

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
"""Of files that are taken for images, in lower case."""

PADS = ("none", "target", "white")
ALPHAS = ("white", "drop")

MAX_MEGAPIXELS = 200.0
"""Larger images are not decoded, unless `limited` or `limit` says so."""
MAX_SIDE = 1 << 20
"""Nor are longer ones: no picture is a million pixels wide, but a file of a few bytes may be."""

_limit = MAX_MEGAPIXELS


def max_megapixels() -> float:
    """The limit of this process."""
    return _limit


def limit(megapixels: float) -> None:
    """Sets the limit of this process. Raises DataError for none that is above 0."""
    global _limit
    if not megapixels > 0:
        raise DataError(f"max_megapixels={megapixels}: expected a number above 0, usually 200.")
    _limit = megapixels


@contextlib.contextmanager
def limited(megapixels: float | None) -> Iterator[None]:
    """`limit` for a while, in all threads; None leaves it as it is."""
    before = _limit
    limit(before if megapixels is None else megapixels)
    try:
        yield
    finally:
        limit(before)


def check_size(size: tuple[int, int], what: str, max_megapixels: float | None = None) -> None:
    """Raises DataError naming `what` for an image of (width, height) over the limit."""
    width, height = size
    pixels = width * height / 1e6
    most = _limit if max_megapixels is None else max_megapixels
    if pixels > most:
        raise DataError(
            f"{what} has {width} x {height} pixels, {pixels:.4g} megapixels; the limit is "
            f"{most:g}. Make it smaller, or, if you trust it, raise --max_megapixels "
            "(in Python: max_megapixels)."
        )
    if max(size) > MAX_SIDE:
        raise DataError(
            f"{what} has {width} x {height} pixels; the longest side read is {MAX_SIDE}. "
            "Cut it into pictures, or make it smaller."
        )


def opened(
    data: bytes,
    what: str,
    max_megapixels: float | None = None,
    formats: Sequence[str] | None = None,
) -> Image.Image:
    """Image whose header is read, but which is not decoded yet.

    max_megapixels: None = the limit of this process. formats: PIL's names of those that are tried,
    None = all that it knows.
    Raises DataError naming `what` if it is over the limit, and what PIL raises for damaged ones.
    """
    with own_limit():
        image = Image.open(io.BytesIO(data), formats=formats)
    check_size(image.size, what, max_megapixels)
    return image


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Makes DataError naming `what` of all that decoding and transforming an image may raise."""
    try:
        with own_limit():
            yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{what}: not a readable image (MemoryError: too little memory to decode it). Make it "
            "smaller, or free some."
        ) from error
    except Exception as error:  # PIL raises many types for corrupt data
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # PIL names its buffer, which is nobody's
            reason = "of no format that PIL knows"
        raise DataError(
            f"{what}: not a readable image ({reason}). Restore the file (in a prepared dataset: "
            "prepare it again)."
        ) from error


_lock, _readers, _pil_limit = threading.Lock(), 0, None


@contextlib.contextmanager
def own_limit() -> Iterator[None]:
    """PIL's limit would warn or raise before ours: it rests while any thread reads an image."""
    global _readers, _pil_limit
    with _lock:
        if not _readers:
            _pil_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                Image.MAX_IMAGE_PIXELS = _pil_limit


def decode(
    data: bytes,
    what: str,
    *,
    upright: bool = False,
    max_megapixels: float | None = None,
    enough: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
) -> Image.Image:
    """Image from encoded bytes, in the file's own mode; the first one of an animation.

    upright: turn as the EXIF orientation says. No original of the papers does so.
    max_megapixels: None = the limit of this process.
    enough: (width, height) -> those that will do. A JPEG then is decoded at a half, a quarter or an
        eighth of its size, where that is no smaller; other formats as they are.
    Raises DataError naming `what` when it does not decode, or is over the limit.
    """
    with reading(what):
        image = opened(data, what, max_megapixels)
        if enough is not None:
            image.draft(None, enough(image.size))
        image.load()
        return ImageOps.exif_transpose(image) if upright else image


def read(path: Path, *, upright: bool = False) -> Image.Image:
    """Image of a file, as `decode`. Raises DataError naming the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    return decode(data, str(path), upright=upright)


def of_array(array: Any, what: str = "image") -> Image.Image:
    """Image of uint8[height, width, 3] or of floats in [0, 1]; also without or with 4 channels.

    Raises DataError naming `what`, its shape, type or range for anything else.
    """
    array = np.asarray(array)
    if array.ndim not in (2, 3) or not array.size or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise DataError(
            f"{what}: an array of shape {array.shape}; expected one image, [height, width, 3]."
        )
    if array.dtype != np.uint8:
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            raise DataError(
                f"{what}: an array of {array.dtype}; expected uint8 of 0 to 255, or floats of 0 "
                "to 1. Convert it: array.astype(numpy.uint8)."
            )
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # NaN, too
            raise DataError(
                f"{what}: floats of {low:g} to {high:g}; expected 0 to 1. Give the picture itself, "
                "not normalised; where it is of 0 to 255, as uint8: array.astype(numpy.uint8)."
            )
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def to_rgb(image: Image.Image, alpha: str = "white") -> Image.Image:
    """In RGB; what is transparent on white, or, with `alpha="drop"`, in the colour below."""
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if alpha == "white" and transparent:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Pad, short side to `resize`, centre crop, mean and std; the defaults are CLIP's.

    Calling it gives uint8[crop, crop, 3]; `rescale` and `statistics` are applied on the device
    (Backbone): (pixel * rescale - mean) / std.

    pad: "target" pads with zeros until the sides' ratio is at most `ratio` (CLIP4Cir, SEARLE);
        "white" pads to a square with white (ARTEMIS).
    squash: to [resize, resize] whatever the sides were (BLIP, SigLIP).
    resample: PIL's filter, 3 = bicubic.
    rgb_last: convert palette, alpha and grey images to RGB after resizing, as the code built on
        torchvision does; Hugging Face's converts first. Padding then is transparent, or of the
        palette's first colour, and PIL resizes palette images with nearest neighbour.
    round_offset: the crop starts at round(margin / 2) (torchvision), not floor (Hugging Face).
    alpha: "white" or "drop", see above; what comes last drops.
    processor: the class of transformers that `to_dict` names.
    """

    resize: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pad: str = "none"
    ratio: float = 1.25
    squash: bool = False
    resample: int = 3
    rgb_last: bool = False
    round_offset: bool = False
    alpha: str = "white"
    rescale: float = 1 / 255
    processor: str = dataclasses.field(default="CLIPImageProcessor", repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, known in (("pad", PADS), ("alpha", ALPHAS)):
            if (value := getattr(self, name)) not in known:
                raise DataError(f"{name}={value!r}: expected one of {', '.join(known)}")
        if self.rgb_last and self.alpha != "drop":
            raise DataError(f"alpha={self.alpha!r} comes before resizing: rgb_last needs 'drop'")
        if not 0 < self.crop <= self.resize:
            raise DataError(f"crop={self.crop}: expected 1 to resize={self.resize}")

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    @classmethod
    def from_dict(
        cls,
        config: Mapping[str, Any],
        what: str | Path = "preprocessor_config.json",
        family: str = "clip",
    ) -> "ImageTransform":
        """From the dictionary of a Hugging Face `preprocessor_config.json`.

        family: "clip", "blip" or "siglip", for files that name no processor.
        Raises WeightsError naming `what`, the file, and a field that cannot be honoured.
        """
        fields, ours = preprocessors.hugging_face(config, what, family), config.get("cir_jax") or {}
        if unknown := sorted(set(ours) - set(_OURS)):
            raise WeightsError(
                f"{what}: cir_jax has a field {unknown[0]!r}, expected {', '.join(_OURS)}. It was "
                "written by another version: update this one."
            )
        if ours.get("rgb_last"):  # files from before there was a choice
            fields["alpha"] = "drop"
        return cls(**fields | ours)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a Hugging Face `preprocessor_config.json`.

        What that format cannot say is added under "cir_jax", where it is not the default.
        """
        if self.squash:
            size = {"height": self.resize, "width": self.resize}
        else:
            size = {"shortest_edge": self.resize}
        own = {name: getattr(self, name) for name in _OURS}
        own = {name: value for name, value in own.items() if value != getattr(type(self), name)}
        return {
            "image_processor_type": self.processor,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            "do_center_crop": not self.squash or self.crop != self.resize,
            "crop_size": {"height": self.crop, "width": self.crop},
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        } | ({"cir_jax": own} if own else {})

    @classmethod
    def from_open_clip(
        cls, config: Mapping[str, Any], size: int, what: str | Path = "open_clip_config.json"
    ) -> "ImageTransform":
        """From the `preprocess_cfg` of an `open_clip_config.json`; {} is OpenAI's own.

        size: of the model's images. Raises WeightsError as `from_dict`.
        """
        return cls(**preprocessors.open_clip(config, size, what))

    def padded(self, image: Image.Image) -> Image.Image:
        """The image with its padding, of the same mode."""
        left, top, right, bottom = self._margins(*image.size)
        if not (left or top or right or bottom):
            return image
        canvas = self._padding(image, (image.width + left + right, image.height + top + bottom))
        canvas.paste(image, (left, top))
        return canvas

    def _margins(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        longest, shortest = max(width, height), min(width, height)
        if self.pad == "none" or longest / shortest < self.ratio:
            return 0, 0, 0, 0
        if self.pad == "white":
            left, top = (longest - width) // 2, (longest - height) // 2
            return left, top, longest - width - left, longest - height - top
        side = longest / self.ratio
        left, top = max(int((side - width) / 2), 0), max(int((side - height) / 2), 0)
        return left, top, left, top

    def _padding(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """A canvas for the image, of the colour of the padding."""
        fill: Any = "white" if self.pad == "white" else 0
        if image.mode == "P":
            canvas = Image.new("P", size, 0)
            canvas.putpalette(image.getpalette("RGB"), "RGB")
            return canvas
        bands = len(image.getbands())
        return Image.new(image.mode, size, (fill,) * bands if fill == 0 else fill)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """PIL image -> uint8[crop, crop, 3]."""
        if not self.rgb_last:
            image = to_rgb(image, self.alpha)
        left, top, right, bottom = self._margins(*image.size)
        canvas = width, height = image.width + left + right, image.height + top + bottom
        if self.squash:
            size = (self.resize, self.resize)
        else:
            # the long side is truncated, as torchvision and Hugging Face do
            short = min(width, height)
            size = (int(self.resize * width / short), int(self.resize * height / short))
        x, y = (self._offset(side) for side in size)
        box = (x, y, x + self.crop, y + self.crop)
        if resampling.too_large(image.size, canvas, size):
            colour = self._padding(image, (1, 1))
            image = resampling.resized_part(
                image, canvas, (left, top), colour, size, box, self.resample
            )
        else:
            image = self.padded(image)
            if size != image.size:
                image = image.resize(size, Image.Resampling(self.resample))
            image = image.crop(box)
        return np.asarray(to_rgb(image, "drop"), dtype=np.uint8)

    def enough(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that an image of this size comes to: less of it would be enlarged."""
        left, top, right, bottom = self._margins(*size)
        canvas = size[0] + left + right, size[1] + top + bottom
        into = canvas if self.squash else (min(canvas),) * 2
        return tuple(
            math.ceil(self.resize * side / of) for side, of in zip(size, into, strict=True)
        )

    def _offset(self, side: int) -> int:
        margin = side - self.crop
        return round(margin / 2) if self.round_offset else margin // 2


_OURS = ("pad", "ratio", "rgb_last", "round_offset", "alpha")
"""What transformers' format cannot say."""


def clip(size: int) -> ImageTransform:
    """OpenAI's CLIP, and so the evaluation of Pic2Word."""
    return ImageTransform(size, size, rgb_last=True, round_offset=True, alpha="drop")


def targetpad(size: int, ratio: float = 1.25) -> ImageTransform:
    """CLIP4Cir and SEARLE: zeros until the long side is `ratio` times the short one."""
    return dataclasses.replace(clip(size), pad="target", ratio=ratio)


def squarepad(size: int) -> ImageTransform:
    """CLIP4Cir's option: zeros to a square (one pixel short of it where the sides' sum is odd)."""
    return targetpad(size, 1.0)


def squash(size: int) -> ImageTransform:
    """MagicLens's evaluation: the whole image, whatever its sides were, bilinear."""
    return ImageTransform(size, size, squash=True, resample=2, alpha="drop")


PREPROCESSING = {"clip": clip, "targetpad": targetpad, "squarepad": squarepad, "squash": squash}
"""What may take the place of the preprocessing that comes with CLIP weights."""


def blip(size: int) -> ImageTransform:
    """salesforce's BLIP: squashed to a square."""
    return ImageTransform(
        size, size, squash=True, alpha="drop", processor=preprocessors.FAMILIES["blip"]
    )


def artemis(resize: int = 256, crop: int = 224) -> ImageTransform:
    """ARTEMIS: white to a square, bilinear, ImageNet statistics."""
    return ImageTransform(
        resize,
        crop,
        IMAGENET_MEAN,
        IMAGENET_STD,
        pad="white",
        ratio=1.0,
        resample=2,
        round_offset=True,
        alpha="drop",
    )
