"""The kept part of a resized image: PIL's own pixels, without the rest of the image."""

import resource

import numpy as np
import pytest
from PIL import Image

from cir_jax.input import images, resampling
from cir_jax.input.crops import RandomResizedCrop
from cir_jax.input.images import ImageTransform


def noise(rng, width, height, mode="RGB"):
    """Black and white above all: the passes overshoot, so that their order shows."""
    pixels = rng.choice(np.array([0, 7, 131, 255], np.uint8), (height, width, 4))
    if mode == "CMYK":
        return Image.fromarray(pixels[..., :3]).convert(mode)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def both(rng, mode, image, margins, size, resample):
    """A random box of the resized image, by PIL and by us."""
    picture = noise(rng, *image, mode)
    left, top, right, bottom = margins
    canvas = (image[0] + left + right, image[1] + top + bottom)
    colour = (int(rng.integers(256)),) * len(picture.getbands())
    whole = Image.new(mode, canvas, colour)
    whole.paste(picture, (left, top))
    x, y = (int(rng.integers(side)) for side in size)
    box = (x, y, int(rng.integers(x, size[0])) + 1, int(rng.integers(y, size[1])) + 1)
    padding = Image.new(mode, (1, 1), colour)
    ours = resampling.resized_part(picture, canvas, (left, top), padding, size, box, resample)
    return whole.resize(size, resample).crop(box), ours


@pytest.mark.parametrize("resample", range(1, 6))
def test_the_same_pixels_as_pil_for_any_part_of_any_size(resample, monkeypatch):
    rng = np.random.default_rng(resample)
    for trial in range(60):
        image, size = (
            tuple(int(side) for side in np.exp(rng.uniform(0, np.log(most), 2)))
            for most in (300, 200)
        )
        if trial % 4 == 0:
            image = (1, image[1])
        margins = tuple(int(m) for m in rng.integers(0, 40, 4) * (trial % 3 > 0))
        # few pixels at a time, so that there are several groups of rows
        monkeypatch.setattr(resampling, "AREA", 1 << (8 if trial % 2 else 24))
        mode = ("RGB", "L", "RGBA", "LA", "CMYK")[trial % 5]
        expected, ours = both(rng, mode, image, margins, size, resample)
        assert ours.mode == mode
        np.testing.assert_array_equal(
            np.asarray(ours), np.asarray(expected), f"{mode} {image} {margins} -> {size}"
        )


def test_both_orders_of_the_passes_are_met():
    """Pillow begins with the columns where that saves more; older ones never do."""
    if resampling._pillow_chooses():
        assert resampling._down_first((8, 60), (6, 7)) and not resampling._down_first(
            (60, 8), (7, 6)
        )
        assert not resampling._down_first((8, 60), (6, 90))
    rng = np.random.default_rng(0)
    for image, size in (((9, 90), (7, 12)), ((90, 9), (12, 7)), ((40, 60), (25, 29))):
        expected, ours = both(rng, "RGB", image, (0, 0, 0, 0), size, 1)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_nearest_neighbour_and_palettes():
    """Sides that divide: no two neighbours are equally near."""
    rng = np.random.default_rng(0)
    palette = noise(rng, 30, 9).quantize(30)
    for picture in (noise(rng, 30, 9), palette, noise(rng, 30, 9, "1"), noise(rng, 30, 9, "RGBA")):
        padding = Image.new(picture.mode, (1, 1))
        resample = 0 if picture.mode in ("RGB", "RGBA") else 3
        ours = resampling.resized_part(
            picture, (30, 9), (0, 0), padding, (90, 27), (4, 5, 80, 20), resample
        )
        expected = picture.resize((90, 27), 0).crop((4, 5, 80, 20)).convert(ours.mode)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


THIN = {
    "hugging face": ImageTransform(224, 224),
    "clip": images.clip(224),
    "targetpad": images.targetpad(224),
    "squarepad": images.squarepad(224),
    "blip": images.blip(384),
    "artemis": images.artemis(),
}


@pytest.mark.parametrize("name", THIN)
def test_preprocessing_takes_this_way_for_thin_images_and_gives_the_same(name, monkeypatch):
    rng, transform = np.random.default_rng(0), THIN[name]
    for size in ((1, 500), (700, 2), (3, 1100), (40, 1999), (500, 501)):
        for mode in ("RGB", "RGBA"):
            picture = noise(rng, *size, mode)
            expected = transform(picture)
            with monkeypatch.context() as patch:
                patch.setattr(resampling, "too_large", lambda *sizes: True)
                np.testing.assert_array_equal(transform(picture), expected, f"{mode} {size}")
    assert resampling.too_large((1, 20000), (1, 20000), (224, 4480000))
    assert resampling.too_large((1, 20000), (16000, 20000), (224, 280))
    # photographs, panoramas and scans go through PIL, however large
    assert not resampling.too_large((4000, 3000), (4000, 3000), (298, 224))
    assert not resampling.too_large((20000, 400), (20000, 400), (11200, 224))
    assert not resampling.too_large((10000, 20000), (20000, 20000), (224, 224))


@pytest.mark.parametrize("name", THIN)
def test_thin_images_need_little_memory(name):
    """4.6 GB and 174 s for 1 x 20000 before. The middle shows the middle of the image."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    longest = 1 << (20 if THIN[name].pad == "none" else 17)
    for width, height in ((1, 20000), (20000, 1), (60000, 20), (2, longest)):
        image = Image.new("RGB", (width, height), (200, 10, 20))
        pixels = THIN[name](image)
        assert pixels.shape == (THIN[name].crop, THIN[name].crop, 3)
        if THIN[name].pad == "none":
            assert (pixels == (200, 10, 20)).all()
        crop = RandomResizedCrop(224)(image, np.random.default_rng(0))
        assert crop.shape == (224, 224, 3)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500 * 1024, f"{grown / 1024:.0f} MB"
