"""Image preprocessing; the pixels themselves are checked by the fixture in tests/golden."""

import io
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cir_jax.errors import DataError
from cir_jax.input import crops, images
from cir_jax.input.images import ImageTransform


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    if mode == "P":
        return image.convert("RGB").quantize(30)
    return image.convert("RGB").convert(mode) if mode == "CMYK" else image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


ALL = {
    "hugging face": ImageTransform(16, 16),
    "clip": images.clip(16),
    "targetpad": images.targetpad(16),
    "squarepad": images.squarepad(16),
    "blip": images.blip(16),
    "artemis": images.artemis(18, 16),
}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("name", ALL)
def test_every_mode_and_shape_gives_rgb_of_one_size(name, mode):
    for size in ((40, 20), (20, 41), (16, 16), (200, 3), (1, 1)):
        got = ALL[name](noise(*size, mode))
        assert got.shape == (16, 16, 3) and got.dtype == np.uint8


def test_rgb_first_or_last_as_the_original():
    """A palette is resized with nearest neighbour when RGB comes last: no new colours."""
    image = noise(40, 40, "P")
    colours = set(map(tuple, np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()))
    last = set(map(tuple, images.clip(16)(image).reshape(-1, 3).tolist()))
    first = set(map(tuple, ImageTransform(16, 16)(image).reshape(-1, 3).tolist()))
    assert last <= colours and not first <= colours


def test_transparent_pixels_by_hand():
    """On white (transformers), or in the colour below (OpenAI, BLIP, timm)."""
    image = Image.new("RGBA", (32, 32), (200, 10, 20, 0))
    half = Image.new("RGBA", (32, 32), (200, 10, 20, 51))
    grey, one = Image.new("LA", (32, 32), (40, 0)), Image.new("RGB", (32, 32), (1, 2, 3))
    one.info["transparency"] = (1, 2, 3)  # as a PNG names one colour that is not shown
    for name, transform in ALL.items():
        if name == "hugging face":
            assert (transform(image) == 255).all() and (transform(grey) == 255).all()
            assert (transform(one) == 255).all() and (transform(half) == (244, 206, 208)).all()
        elif not transform.rgb_last:  # what comes last is resized as colour times alpha
            assert (transform(image) == (200, 10, 20)).all() and (transform(grey) == 40).all()
            assert (transform(one) == (1, 2, 3)).all() and (transform(half) == (200, 10, 20)).all()
        else:
            assert (transform(one) == (1, 2, 3)).all() and (transform(half) == (200, 10, 20)).all()


def test_padding_by_hand():
    image = Image.new("RGB", (100, 50), (200, 10, 20))
    # 100 / 1.25 = 80 rows wanted: 15 zeros above and below
    padded = np.asarray(images.targetpad(32).padded(image))
    assert padded.shape == (80, 100, 3)
    assert not padded[:15].any() and not padded[65:].any() and padded[15:65].all()
    assert images.targetpad(32).padded(Image.new("RGB", (62, 50))).size == (62, 50)
    assert images.squarepad(32).padded(Image.new("RGB", (50, 21))).size == (50, 49)
    white = np.asarray(images.artemis().padded(Image.new("RGB", (7, 10))))
    assert white.shape == (10, 10, 3)
    assert (white[:, :1] == 255).all() and (white[:, 8:] == 255).all() and not white[:, 1:8].any()


def test_transparent_padding_of_alpha_and_the_first_colour_of_palettes():
    square = images.squarepad(16)
    assert np.asarray(square.padded(noise(20, 10, "RGBA")))[0, 0].tolist() == [0, 0, 0, 0]
    image = noise(20, 10, "P")
    expected = image.getpalette("RGB")[:3]
    assert list(square.padded(image).convert("RGB").getpixel((0, 0))) == expected


def test_the_crop_offset_of_torchvision_and_of_hugging_face():
    ramp = Image.fromarray(np.repeat(np.arange(19, dtype=np.uint8)[None], 16, 0)).convert("RGB")
    # 3 pixels too many: round(1.5) = 2, floor 1
    assert images.clip(16)(ramp)[0, 0, 0] == 2 and ImageTransform(16, 16)(ramp)[0, 0, 0] == 1


@pytest.mark.parametrize("name", ALL)
def test_configs_survive_a_round_trip(name):
    assert ImageTransform.from_dict(ALL[name].to_dict()) == ALL[name]


def test_exif_is_ignored_unless_asked_for():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encoded(noise(40, 20), "JPEG", exif=exif)
    assert images.decode(data, "x").size == (40, 20)
    assert images.decode(data, "x", upright=True).size == (20, 40)


def test_files_keep_their_mode_and_animations_give_the_first_image():
    assert images.decode(encoded(noise(8, 8, "P")), "x").mode == "P"
    first, second = noise(8, 8), Image.new("RGB", (8, 8))
    for kind in ("PNG", "TIFF"):
        data = encoded(first, kind, save_all=True, append_images=[second])
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert np.array_equal(np.asarray(images.decode(data, "x").convert("RGB")), first)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_broken_files_are_named(tmp_path, kind):
    data = encoded(noise(64, 64), kind)
    file = tmp_path / "photo.img"
    for broken in (data[: len(data) // 2], b"", b"<html>not found</html>", data[100:]):
        file.write_bytes(broken)
        with pytest.raises(DataError, match="photo.img: not a readable image .* Restore the file"):
            images.read(file)
    with pytest.raises(DataError, match="missing.png: cannot be read .No such file"):
        images.read(tmp_path / "missing.png")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("what"), SyntaxError("broken PNG")])
def test_whatever_decoding_raises_is_a_data_error(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(DataError, match=f"a.png: not a readable image .{type(error).__name__}"):
        images.decode(encoded(noise(8, 8)), "a.png")


def test_the_limit_of_pixels_is_of_the_header(monkeypatch):
    def decoded(*args, **kwargs):
        raise AssertionError("it was decoded")

    data = encoded(noise(40, 20))
    with monkeypatch.context() as patch, images.limited(0.0005):
        patch.setattr(PngImagePlugin.PngImageFile, "load", decoded)
        with pytest.raises(
            DataError,
            match=r"a.png has 40 x 20 pixels, 0.0008 megapixels; the limit is 0.0005. Make it "
            r"smaller, or, if you trust it, raise --max_megapixels \(in Python: max_megapixels\)",
        ):
            images.decode(data, "a.png")
    assert images.max_megapixels() == 200 and images.decode(data, "a.png").size == (40, 20)
    with pytest.raises(DataError, match="a.png has 40 x 20"):
        images.decode(data, "a.png", max_megapixels=0.0005)
    with pytest.raises(DataError, match="image has 2000000 x 1 pixels; the longest side read"):
        images.check_size((2000000, 1), "image")
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(DataError, match="max_megapixels=.*: expected a number above 0"):
            images.limit(wrong)
    assert images.max_megapixels() == 200


def test_pils_own_limit_neither_warns_nor_raises_before_ours(monkeypatch):
    """It holds for everybody else in the process."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(noise(40, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = images.decode(data, "a.png")
        crop = crops.RandomResizedCrop(8, (1.0, 1.0), (2.0, 2.0))
        assert crop(image, np.random.default_rng(0)).shape == (8, 8, 3)
        with images.reading("a.png"):
            assert images.clip(16)(image).shape == (16, 16, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))


def test_arrays_are_bytes_or_floats_of_0_to_1():
    picture = noise(9, 7)
    pixels = np.asarray(picture)
    for array in (pixels, pixels / 255, jnp.asarray(pixels / 255), jnp.asarray(pixels)):
        assert np.array_equal(np.asarray(images.of_array(array)), pixels)
    assert images.of_array(pixels[..., 0]).mode == images.of_array(pixels[..., :1]).mode == "L"
    assert images.of_array(np.asarray(noise(9, 7, "RGBA"))).mode == "RGBA"
    for array, said in (
        (pixels.astype(np.float32), "floats of 0 to 25[0-9]; expected 0 to 1. Give the picture"),
        (pixels / 255 - 0.5, "floats of -0.5 to 0.*expected 0 to 1"),
        (np.full((2, 2, 3), np.nan), "floats of nan to nan; expected 0 to 1"),
        (pixels.astype(int), "an array of int64; expected uint8 of 0 to 255, or floats"),
        (pixels[None], r"an array of shape \(1, 7, 9, 3\); expected one image"),
        (np.zeros((0, 4, 3), np.uint8), "an array of shape"),
        (np.zeros((3, 4, 5), np.uint8), "an array of shape"),
    ):
        with pytest.raises(DataError, match=f"query: {said}"):
            images.of_array(array, "query")


def test_bad_settings():
    with pytest.raises(DataError, match="pad='mirror': expected one of none, target, white"):
        ImageTransform(pad="mirror")
    with pytest.raises(DataError, match="alpha='black': expected one of white, drop"):
        ImageTransform(alpha="black")
    with pytest.raises(DataError, match="alpha='white' comes before resizing: rgb_last needs"):
        ImageTransform(rgb_last=True)
    with pytest.raises(DataError, match="crop=32"):
        ImageTransform(resize=16, crop=32)
