"""Image decoding and preprocessing on PIL, so that pixels equal those of the original code."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cir_jax.errors import DataError, WeightsError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PADS = ("none", "target", "white")


def decode(data: bytes, what: str, *, rgb: bool = True, upright: bool = False) -> Image.Image:
    """Image from encoded bytes. Raises DataError naming `what` when they do not decode.

    rgb: convert to RGB; False leaves that to the transform, for originals that convert last.
    upright: turn as the EXIF orientation says. No original of the papers does so.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        if upright:
            image = ImageOps.exif_transpose(image)
        return image.convert("RGB") if rgb else image
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{what}: {error}. Make the image smaller, or, if you trust it, raise "
            "PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:  # PIL raises many types for corrupt data
        raise DataError(
            f"{what}: not a readable image ({type(error).__name__}: {error}). "
            "Restore the file, or prepare the dataset again."
        ) from error


def read(path: Path, *, rgb: bool = True, upright: bool = False) -> Image.Image:
    """Image of a file, as `decode`. Raises DataError naming the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    return decode(data, str(path), rgb=rgb, upright=upright)


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Pad, short side to `resize`, centre crop, mean and std; the defaults are CLIP's.

    Calling it gives uint8[crop, crop, 3]; `statistics` are applied on the device (Backbone).

    pad: "target" pads with zeros until the sides' ratio is at most `ratio` (CLIP4Cir, SEARLE);
        "white" pads to a square with white (ARTEMIS).
    squash: to [resize, resize] whatever the sides were (BLIP).
    resample: PIL's filter, 3 = bicubic.
    rgb_last: convert palette, alpha and grey images to RGB after resizing, as the code built on
        torchvision does; Hugging Face's converts first. Padding then is transparent, or of the
        palette's first colour, and PIL resizes palette images with nearest neighbour.
    round_offset: the crop starts at round(margin / 2) (torchvision), not floor (Hugging Face).
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

    def __post_init__(self) -> None:
        if self.pad not in PADS:
            raise DataError(f"pad={self.pad!r}: expected one of {', '.join(PADS)}")
        if not 0 < self.crop <= self.resize:
            raise DataError(f"crop={self.crop}: expected 1 to resize={self.resize}")

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], what: str | Path = "preprocessor_config.json"
    ) -> "ImageTransform":
        """From the dictionary of a Hugging Face `preprocessor_config.json`.

        Raises WeightsError naming `what`, the file, for a size that is neither kind.
        """
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        # {"shortest_edge": n} is resized and cropped; {"height": n, "width": n} is squashed (BLIP)
        squash = isinstance(size, Mapping) and "height" in size
        if isinstance(size, Mapping):
            side = "height" if squash else "shortest_edge"
            if side not in size:
                raise WeightsError(
                    f"{what}: size {dict(size)}; expected shortest_edge, or height and width. Copy "
                    "it from where the weights come from."
                )
            size = size[side]
        crop = crop["height"] if isinstance(crop, Mapping) else crop
        return cls(
            resize=size,
            crop=size if squash or not config.get("do_center_crop", True) else crop,
            mean=tuple(config.get("image_mean", CLIP_MEAN)),
            std=tuple(config.get("image_std", CLIP_STD)),
            squash=squash,
            resample=config.get("resample", 3),
            **config.get("cir_jax", {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a Hugging Face `preprocessor_config.json`.

        What that format cannot say is added under "cir_jax", where it is not the default.
        """
        if self.squash:
            size = {"height": self.resize, "width": self.resize}
        else:
            size = {"shortest_edge": self.resize}
        more = ("pad", "ratio", "rgb_last", "round_offset")
        ours = {n: getattr(self, n) for n in more if getattr(self, n) != getattr(ImageTransform, n)}
        return {
            "image_processor_type": "BlipImageProcessor" if self.squash else "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            "do_center_crop": not self.squash,
            "crop_size": {"height": self.crop, "width": self.crop},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        } | ({"cir_jax": ours} if ours else {})

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any], size: int) -> "ImageTransform":
        """From the `preprocess_cfg` of an `open_clip_config.json`; {} is OpenAI's own."""
        size = config.get("size", size)
        size = size[0] if isinstance(size, list | tuple) else size
        mode, filter_name = config.get("resize_mode", "shortest"), config.get("interpolation")
        if mode not in ("shortest", "squash"):
            raise WeightsError(
                f"open_clip_config.json: resize_mode {mode!r}; expected 'shortest' or 'squash'"
            )
        return cls(
            resize=size,
            crop=size,
            mean=tuple(config.get("mean", CLIP_MEAN)),
            std=tuple(config.get("std", CLIP_STD)),
            squash=mode == "squash",
            resample=2 if filter_name == "bilinear" else 3,
            rgb_last=True,
            round_offset=True,
        )

    def padded(self, image: Image.Image) -> Image.Image:
        """The image with its padding, of the same mode."""
        width, height = image.size
        longest, shortest = max(width, height), min(width, height)
        if self.pad == "none" or longest / shortest < self.ratio:
            return image
        if self.pad == "white":
            left, top = (longest - width) // 2, (longest - height) // 2
            right, bottom = longest - width - left, longest - height - top
            fill: Any = "white"
        else:
            side = longest / self.ratio
            left = right = max(int((side - width) / 2), 0)
            top = bottom = max(int((side - height) / 2), 0)
            fill = 0
        if not (left or top or right or bottom):
            return image
        size = (width + left + right, height + top + bottom)
        if image.mode == "P":
            canvas = Image.new("P", size, fill if isinstance(fill, int) else 0)
            canvas.putpalette(image.getpalette("RGB"), "RGB")
        else:
            bands = len(image.getbands())
            canvas = Image.new(image.mode, size, (fill,) * bands if fill == 0 else fill)
        canvas.paste(image, (left, top))
        return canvas

    def __call__(self, image: Image.Image) -> np.ndarray:
        """PIL image -> uint8[crop, crop, 3]."""
        if not self.rgb_last:
            image = _rgb(image)
        image = self.padded(image)
        width, height = image.size
        if self.squash:
            size = (self.resize, self.resize)
        else:
            # the long side is truncated, as torchvision and Hugging Face do
            short = min(width, height)
            size = (int(self.resize * width / short), int(self.resize * height / short))
        if size != image.size:
            image = image.resize(size, Image.Resampling(self.resample))
        left, top = (self._offset(side) for side in size)
        image = image.crop((left, top, left + self.crop, top + self.crop))
        return np.asarray(_rgb(image), dtype=np.uint8)

    def _offset(self, side: int) -> int:
        margin = side - self.crop
        return round(margin / 2) if self.round_offset else margin // 2


@dataclasses.dataclass(frozen=True)
class Whole:
    """No transform: the decoded image, for one that comes later."""

    rgb_last: bool = True

    def __call__(self, image: Image.Image) -> Image.Image:
        return image


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, squashed to size x size, as torchvision's: training of Pic2Word.

    scale: share of the image's area; ratio: of width to height. Where ten draws do not fit into
    the image, the largest central part of an allowed ratio.
    """

    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resample: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise DataError(f"scale={self.scale}: expected two shares of the area, (0.9, 1.0)")

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the part."""
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = np.exp(rng.uniform(*np.log(self.ratio)))
            wide, high = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
            if 0 < wide <= width and 0 < high <= height:
                left = int(rng.integers(width - wide + 1))
                top = int(rng.integers(height - high + 1))
                return left, top, left + wide, top + high
        wide, high = width, height
        if width / height < self.ratio[0]:
            high = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            wide = round(height * self.ratio[1])
        left, top = (width - wide) // 2, (height - high) // 2
        return left, top, left + wide, top + high

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """PIL image -> uint8[size, size, 3]."""
        part = image.crop(self.box(*image.size, rng))
        part = part.resize((self.size, self.size), Image.Resampling(self.resample))
        return np.asarray(_rgb(part), dtype=np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def clip(size: int) -> ImageTransform:
    """OpenAI's CLIP, and so the evaluation of Pic2Word."""
    return ImageTransform(size, size, rgb_last=True, round_offset=True)


def targetpad(size: int, ratio: float = 1.25) -> ImageTransform:
    """CLIP4Cir and SEARLE: zeros until the long side is `ratio` times the short one."""
    return dataclasses.replace(clip(size), pad="target", ratio=ratio)


def squarepad(size: int) -> ImageTransform:
    """CLIP4Cir's option: zeros to a square (one pixel short of it where the sides' sum is odd)."""
    return targetpad(size, 1.0)


PREPROCESSING = {"clip": clip, "targetpad": targetpad, "squarepad": squarepad}
"""What may take the place of the preprocessing that comes with CLIP weights."""


def blip(size: int) -> ImageTransform:
    """BLIP: squashed to a square."""
    return ImageTransform(size, size, squash=True)


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
    )
