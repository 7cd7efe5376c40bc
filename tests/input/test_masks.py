"""Regions: stored, taken out of pictures, and given by users."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.input import images, masks, records
from cir_jax.retrieval import features
from tests import tiny as factory

RNG = np.random.default_rng(0)
MASK = np.zeros((64, 64), bool)
MASK[8:24, 40:60] = True


def picture(width=64, height=64):
    return Image.fromarray(RNG.integers(0, 255, (height, width, 3), np.uint8))


def test_stored_masks_are_their_bits():
    packed = masks.pack(MASK)
    assert len(packed) == 512
    np.testing.assert_array_equal(masks.unpack(packed, "mask"), MASK)
    with pytest.raises(DataError, match="record 3: a mask of 511 bytes; expected 512 bytes"):
        masks.unpack(packed[1:], "record 3")


def test_noise_takes_the_place_of_the_region_and_of_nothing_else():
    transform, image = images.clip(64), picture()
    pixels = transform(image)
    noised = masks.noised(image, MASK, transform, 7)
    assert noised.dtype == np.uint8 and noised.shape == pixels.shape
    np.testing.assert_array_equal(noised[~MASK], pixels[~MASK])
    mean, std = np.asarray(transform.statistics)
    normal = (noised[MASK] / 255 - mean) / std
    assert abs(normal.mean()) < 0.1 and 0.85 < normal.std() < 1.05  # bytes end at 0 and 255
    np.testing.assert_array_equal(noised, masks.noised(image, MASK, transform, 7))
    assert (noised != masks.noised(image, MASK, transform, 8)).any()
    other = masks.noised(picture(), MASK, transform, 7)
    np.testing.assert_array_equal(noised[MASK], other[MASK])  # nothing of the picture is left


def test_grey_is_exactly_zero_after_the_normalisation():
    transform = images.clip(64)
    pixels = transform(picture())
    filled = masks.fill(pixels, MASK, transform, "grey")
    mean, std = np.asarray(transform.statistics, np.float32)
    assert filled.dtype == np.float32 and not filled[MASK].any()
    np.testing.assert_allclose(filled[~MASK], ((pixels / 255 - mean) / std)[~MASK], atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (40, 80)])
def test_a_region_goes_where_its_pixels_go(size):
    """Crop, resizing and padding: what is white in the picture is what is in the region."""
    where = np.zeros(size[::-1], bool)
    where[size[1] // 4 : size[1] // 2, size[0] // 2 : size[0] * 3 // 4] = True
    image = Image.fromarray(where.astype(np.uint8)[..., None].repeat(3, 2) * 255)
    for transform in (images.clip(32), images.squash(32), images.targetpad(32)):
        white = transform(image)[..., 0] > 127
        np.testing.assert_array_equal(masks.region(where, size, transform), white)
        assert white.any()


@pytest.mark.parametrize("size", [(16, 16), (30, 20)])
def test_records_and_stored_features_see_the_same_masked_image(tiny, size):
    data = io.BytesIO()
    picture(*size).save(data, "PNG")
    record = {"id": 5, "image": data.getvalue(), "mask": masks.pack(MASK), "captions": [b"a star"]}
    table = factory.MemoryTable([record])
    backbone, _ = tiny
    transform = dataclasses.replace(backbone.image_transform)
    fields = ("image", "masked")
    row = records.Records(table, fields, transform)[0]
    np.testing.assert_array_equal(row["masked"], features.read_image(table, 0, "masked", transform))
    np.testing.assert_array_equal(row["image"], features.read_image(table, 0, "image", transform))
    assert (row["masked"] != row["image"]).any()
    example = records.MaskedPairs(backbone.tokenizer, "images").random_map(row, RNG)
    np.testing.assert_array_equal(example["target_images"], row["image"])
    np.testing.assert_array_equal(example["reference_images"], row["masked"])
    np.testing.assert_array_equal(example["mask"], MASK)
    assert example["has_reference"]
    given = {"image": np.ones((1, 3), np.float32), "masked": np.zeros((1, 3), np.float32)}
    row = records.Records(table, fields, transform, given)[0]
    example = records.MaskedPairs(backbone.tokenizer, "features").random_map(row, RNG)
    assert example["target_features"].all() and not example["reference_features"].any()


def test_rows_without_a_mask_have_an_empty_one_beside_masked_rows(tiny):
    tokenizer = tiny[0].tokenizer
    pair = {"image": np.zeros(3), "captions": [b"a star"]}
    triplet = {"reference": np.zeros(3), "target": np.zeros(3), "text": b"a star"}
    for make, element in ((records.CaptionPairs, pair), (records.Triplets, triplet)):
        plain = make(tokenizer, "features").random_map(element, RNG)
        mixed = make(tokenizer, "features", with_mask=True).random_map(element, RNG)
        assert "mask" not in plain and mixed["mask"].shape == (64, 64) and not mixed["mask"].any()


def test_masks_of_users(tmp_path):
    where = np.zeros((20, 30), bool)
    where[3:9, 4:20] = True
    pictures = {
        "bits": Image.fromarray(where),
        "bytes": Image.fromarray(where.astype(np.uint8) * 255),
        "labels": Image.fromarray(where.astype(np.uint8)),
    }
    for name, made in pictures.items():
        made.save(tmp_path / f"{name}.png")
        for given in (made, tmp_path / f"{name}.png", str(tmp_path / f"{name}.png")):
            np.testing.assert_array_equal(masks.read(given, (30, 20)), where)
    np.testing.assert_array_equal(masks.read(where, (30, 20)), where)
    np.testing.assert_array_equal(masks.read(where.astype(np.float32), (30, 20)), where)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Image.new("RGB", (30, 20)), "a mask of mode 'RGB'; expected 1 or L, black and white"),
        (Image.new("RGBA", (30, 20)), "a mask of mode 'RGBA'"),
        (Image.new("L", (20, 30), 255), "a mask of 20 x 30 pixels; the reference image has 30 x 2"),
        (np.ones((20, 30, 3), bool), "a mask of 3 x 30 x 20 pixels"),
        (Image.new("L", (30, 20), 0), "an empty mask, no pixel is set"),
        (np.linspace(0, 1, 600).reshape(20, 30), r"expected two: 0, and 1 or 255 = the region"),
    ],
)
def test_masks_that_cannot_be_meant(given, message):
    with pytest.raises(DataError) as error:
        masks.read(given, (30, 20))
    assert message in str(error.value)


def test_what_a_method_reads_of_a_mask():
    half = np.zeros((224, 224), bool)
    half[:, :112] = True
    small = masks.condition(half)
    assert small.dtype == np.float32 and small.shape == (64, 64)
    assert small[:, :31].all() and not small[:, 33:].any()
    dot = np.zeros((224, 224), bool)
    dot[0, 0] = True
    with pytest.raises(DataError, match="cut off by the crop of the preprocessing, or smaller"):
        masks.condition(dot)
