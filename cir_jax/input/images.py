"""Image decoding and preprocessing on PIL, so that pixels equal those of the original code."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cir_jax.errors import DataError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def decode(data: bytes, what: str) -> Image.Image:
    """RGB image from encoded bytes. Raises DataError naming `what` when they do not decode."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image.convert("RGB")
    except Exception as error:  # PIL raises many types for corrupt data
        raise DataError(
            f"{what}: not a readable image ({type(error).__name__}: {error}). "
            "Restore the file, or prepare the dataset again."
        ) from error


def read(path: Path) -> Image.Image:
    """RGB image of a file. Raises DataError naming the file when it is missing or unreadable."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    return decode(data, str(path))


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """CLIP's preprocessing: short side to `resize` (bicubic), centre crop, mean and std.

    Calling it gives uint8[crop, crop, 3]; `statistics` are applied on the device (Backbone).
    """

    resize: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, self.std

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ImageTransform":
        """From the dictionary of a Hugging Face `preprocessor_config.json`."""
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        return cls(
            resize=size["shortest_edge"] if isinstance(size, Mapping) else size,
            crop=crop["height"] if isinstance(crop, Mapping) else crop,
            mean=tuple(config.get("image_mean", CLIP_MEAN)),
            std=tuple(config.get("image_std", CLIP_STD)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a Hugging Face `preprocessor_config.json`."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.resize},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": self.crop, "width": self.crop},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def __call__(self, image: Image.Image) -> np.ndarray:
        """PIL image -> uint8[crop, crop, 3]."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        width, height = image.size
        short = min(width, height)
        if short != self.resize:
            # the long side is truncated, as torchvision and Hugging Face do
            size = (int(self.resize * width / short), int(self.resize * height / short))
            image = image.resize(size, Image.Resampling.BICUBIC)
        width, height = image.size
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        if left or top:
            image = image.crop((left, top, left + self.crop, top + self.crop))
        return np.asarray(image, dtype=np.uint8)
