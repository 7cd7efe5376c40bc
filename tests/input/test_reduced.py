"""JPEGs that are decoded at a reduced size, for training that asks for it."""

import io

import numpy as np
import pytest
from PIL import Image

from cir_jax.input import images, masks
from cir_jax.input.crops import RandomResizedCrop, Whole
from cir_jax.input.images import ImageTransform
from cir_jax.input.records import Records
from tests import tiny as factory

TRANSFORMS = {
    "clip": images.clip(224),
    "targetpad": images.targetpad(224),
    "blip": images.blip(224),
    "artemis": images.artemis(),
}


def picture(width, height):
    """As smooth as photographs are."""
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 255, (height // 64 + 2, width // 64 + 2, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG"):
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_reduced_jpeg_looks_alike_and_nothing_is_enlarged(name):
    transform = TRANSFORMS[name]
    for width, height in ((640, 480), (1000, 3000), (2400, 517), (450, 449)):
        data = encoded(picture(width, height))
        whole = images.decode(data, "a.jpg")
        reduced = images.decode(data, "a.jpg", enough=transform.enough)
        least = transform.enough(whole.size)
        assert all(side >= wanted for side, wanted in zip(reduced.size, least, strict=True))
        assert whole.size == (width, height)
        by = width / reduced.width
        assert round(by) in (1, 2, 4, 8) and by == pytest.approx(height / reduced.height, rel=0.01)
        # a half of it would not do
        assert any(side / 2 < wanted for side, wanted in zip(reduced.size, least, strict=True))
        exact, near = (transform(x).astype(np.float32) for x in (whole, reduced))
        assert exact.shape == near.shape and np.abs(exact - near).mean() < 4


def test_what_is_small_or_no_jpeg_is_as_it_was():
    transform = images.clip(224)
    for data in (encoded(picture(440, 447)), encoded(picture(900, 900), "PNG")):
        whole = images.decode(data, "a")
        assert images.decode(data, "a", enough=transform.enough).tobytes() == whole.tobytes()


def test_no_part_that_is_cropped_of_it_is_enlarged():
    rng = np.random.default_rng(0)
    for crop in (RandomResizedCrop(64), RandomResizedCrop(64, (0.2, 1.0))):
        for width, height in ((640, 480), (200, 1800), (1500, 90)):
            data = encoded(picture(width, height))
            small = images.decode(data, "a", enough=Whole((crop, images.clip(64))).enough)
            if height >= 480:
                assert small.width < width
            for _ in range(50):
                left, top, right, bottom = crop.box(*small.size, rng)
                assert min(right - left, bottom - top) >= 63  # rounded


def test_records_are_read_reduced_where_it_is_asked_for(tiny):
    data = encoded(picture(640, 480))
    table = factory.MemoryTable([{"id": 0, "image": data, "captions": [b"a star"]}])
    transform = ImageTransform(16, 16)
    exact = transform(images.decode(data, "a"))
    read = {reduced: Records(table, ("image",), transform, reduced=reduced) for reduced in (0, 1)}
    assert np.array_equal(read[0][0]["image"], exact)
    assert not np.array_equal(read[1][0]["image"], exact)
    assert np.abs(read[1][0]["image"].astype(int) - exact).mean() < 8
    whole = Records(table, ("image",), Whole((RandomResizedCrop(16),)), reduced=True)
    assert whole[0]["image"].size == (80, 60)


def test_the_noise_of_masked_pairs_is_of_the_image_as_it_is_stored():
    region = np.zeros((masks.SIZE, masks.SIZE), bool)
    region[:20, :30] = True
    record = {"id": 3, "image": encoded(picture(640, 480)), "mask": masks.pack(region)}
    table = factory.MemoryTable([record])
    fields = ("image", masks.FIELD)
    exact, asked = (
        Records(table, fields, images.clip(64), reduced=reduced)[0] for reduced in (False, True)
    )
    assert all(np.array_equal(exact[field], asked[field]) for field in fields)
