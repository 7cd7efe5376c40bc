"""Image preprocessing; the pixels themselves are checked by the fixture in tests/golden."""

import io

import numpy as np
import pytest
from PIL import Image

from cir_jax.errors import DataError, WeightsError
from cir_jax.input import images
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


def test_what_other_formats_say():
    openai = {"size": 224, "crop_size": 224, "resample": 3}  # before sizes were dictionaries
    assert ImageTransform.from_dict(openai) == ImageTransform()
    blip = {"size": {"height": 384, "width": 384}, "resample": 3}
    assert ImageTransform.from_dict(blip) == images.blip(384)
    assert ImageTransform.from_open_clip({}, 288) == images.clip(288)
    squash = ImageTransform.from_open_clip({"resize_mode": "squash", "mean": [0.5] * 3}, 224)
    assert squash.squash and squash.mean == (0.5, 0.5, 0.5)


def test_a_size_that_is_none_of_them_is_told():
    with pytest.raises(WeightsError, match="x.json: size {'longest_edge': 9}; expected shortest_"):
        ImageTransform.from_dict({"size": {"longest_edge": 9}}, "x.json")


def test_exif_is_ignored_unless_asked_for():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = encoded(noise(40, 20), "JPEG", exif=exif)
    assert images.decode(data, "x").size == (40, 20)
    assert images.decode(data, "x", upright=True).size == (20, 40)


def test_unconverted_on_request():
    data = encoded(noise(8, 8, "P"))
    assert images.decode(data, "x").mode == "RGB"
    assert images.decode(data, "x", rgb=False).mode == "P"


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


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="a.png: .*exceeds limit.*MAX_IMAGE_PIXELS"):
        images.decode(encoded(noise(20, 20)), "a.png")


def test_bad_settings():
    with pytest.raises(DataError, match="pad='mirror': expected one of none, target, white"):
        ImageTransform(pad="mirror")
    with pytest.raises(DataError, match="crop=32"):
        ImageTransform(resize=16, crop=32)
