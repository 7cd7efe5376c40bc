"""Random parts of images, for training."""

import dataclasses
import math

import numpy as np
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.input.images import ImageTransform, own_limit, to_rgb


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

    def enough(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of which no part is enlarged."""
        width, height = size
        slant = min(self.ratio[0], 1 / self.ratio[1])
        shortest = min(width, height, math.sqrt(width * height * self.scale[0] * slant))
        return math.ceil(self.size * width / shortest), math.ceil(self.size * height / shortest)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """PIL image -> uint8[size, size, 3]."""
        with own_limit():
            part = image.crop(self.box(*image.size, rng))
            part = part.resize((self.size, self.size), Image.Resampling(self.resample))
            return np.asarray(to_rgb(part, "drop"), dtype=np.uint8)


@dataclasses.dataclass(frozen=True)
class Whole:
    """No transform: the decoded image, for those that come later."""

    later: tuple[ImageTransform | RandomResizedCrop, ...] = ()

    def enough(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) that will do for all of them."""
        return tuple(
            max(sides) for sides in zip(*(x.enough(size) for x in self.later), strict=True)
        )

    def __call__(self, image: Image.Image) -> Image.Image:
        return image
