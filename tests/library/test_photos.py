"""Which files are photos, and what is read of them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.input import images
from cir_jax.library import photos

GREY = np.linspace(0, 1, 32 * 24).reshape(24, 32)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def huge_png(width, height):
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_walk_sees_the_photos_alone(tmp_path):
    root = tmp_path / "photos"
    for name in (
        "a.JPG", "b/c.webp", "b/@eaDir/t.jpg", ".hidden/d.png", "b/.e.png", "Thumbnails/f.png",
        "g.txt", "h.heic", "i.HEIC", "node_modules/j.png", "k/l/m/n.tiff", "o.avif",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"xy")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"x")
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside)
    (root / "circle").symlink_to(root)
    (root / "note").symlink_to(root / "g.txt")
    odd = bytes(root) + b"/\xff\xfe.png"  # no UTF-8
    with open(odd, "wb") as file:
        file.write(b"x")
    found = photos.walk(root)
    assert sorted(found.files) == [
        b"a.JPG",
        b"b/c.webp",
        b"k/l/m/n.tiff",
        b"o.avif",
        b"\xff\xfe.png",
    ]
    assert found.files[b"a.JPG"].size == 2
    assert found.files[b"a.JPG"].mtime_ns == (root / "a.JPG").stat().st_mtime_ns
    said = ".heic files, which PIL does not read"
    assert found.left_out == {"symbolic links": 3, said: 2} and not found.closed
    with pytest.raises(DataError, match="nowhere: no such folder"):
        photos.walk(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.png").write_bytes(b"x")
    scandir = photos.os.scandir

    def guarded(path):
        if path.endswith(b"shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(photos.os, "scandir", guarded)
    found = photos.walk(tmp_path)
    assert list(found.files) == [b"a.png"] and found.closed == {b"shut": "Permission denied"}


@pytest.mark.parametrize(
    ("mode", "form", "scale"), [("I;16", "PNG", 65535), ("I;16", "TIFF", 65535), ("F", "TIFF", 1)]
)
def test_grey_levels_of_more_than_8_bits_are_scaled(mode, form, scale):
    """PIL itself would cut them off at 255, all white."""
    values = GREY * scale
    data = encoded(Image.fromarray(values.astype(np.uint16 if mode != "F" else np.float32)), form)
    assert Image.open(io.BytesIO(data)).mode == mode
    image, _ = photos.opened(data, "grey")
    assert image.mode == "L"
    assert np.abs(np.asarray(image) - GREY * 255).max() <= 1


def test_cmyk_animated_and_palette_are_photos(tmp_path):
    colour = Image.new("RGB", (20, 10), (200, 40, 30))
    blue = Image.new("RGB", (20, 10), (0, 0, 255))
    for name, data in {
        "cmyk.jpg": encoded(colour.convert("CMYK"), "JPEG"),
        "animated.gif": encoded(colour, "GIF", save_all=True, append_images=[blue]),
        "animated.webp": encoded(colour, "WEBP", save_all=True, append_images=[blue], quality=100),
        "palette.png": encoded(colour.quantize(4)),
    }.items():
        (tmp_path / name).write_bytes(data)
        read = photos.read(tmp_path / name, lambda image: np.asarray(image.convert("RGB")))
        assert not read.problem, name
        assert np.abs(read.pixels.astype(int) - (200, 40, 30)).max() < 12, name  # the first one
        assert read.digest == photos.digest(data) == photos.digest_of(tmp_path / name)


def test_upright_and_when_it_was_taken(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))  # left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    exif.get_ifd(0x8769)[0x9003] = "2024:05:17 12:30:01"
    data = encoded(image, "JPEG", exif=exif, quality=95)
    (tmp_path / "a.jpg").write_bytes(data)
    upright, taken = photos.opened(data, "a")
    assert upright.size == (20, 40) and taken == "2024-05-17T12:30:01"
    assert upright.getpixel((10, 5))[1] < 60 < upright.getpixel((10, 35))[1]
    assert photos.read(tmp_path / "a.jpg", np.asarray).taken == taken
    assert photos.query(tmp_path / "a.jpg")[0].size == (20, 40)
    assert photos.query(image) == (image, None)
    exif.get_ifd(0x8769)[0x9003] = "0000:00:00 00:00:00"
    assert photos.opened(encoded(image, "JPEG", exif=exif), "a")[1] == ""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "of no format that PIL knows"),
        (b"no image", "of no format that PIL knows"),
        (encoded(Image.fromarray(np.uint8(GREY * 255)))[:80], "not a readable image"),
        (huge_png(20_000, 20_000), "has 20000 x 20000 pixels, 400 megapixels; the limit is 200"),
    ],
    ids=["empty", "text", "cut", "huge"],
)
def test_what_cannot_be_read_is_a_problem_of_the_file(tmp_path, data, message):
    path = tmp_path / "odd.png"
    path.write_bytes(data)
    read = photos.read(path, np.asarray)
    assert message in read.problem and read.pixels is None and str(path) not in read.problem
    assert read.digest == photos.digest(data)
    with pytest.raises(DataError, match=message):
        photos.query(path)


def test_a_file_that_does_not_open_is_no_problem_of_the_photo(tmp_path):
    with pytest.raises(FileNotFoundError):
        photos.read(tmp_path / "gone.png", np.asarray)
    assert photos.digest_of(tmp_path / "gone.png") is None
    with pytest.raises(DataError, match="gone.png: cannot be read .No such file"):
        photos.query(tmp_path / "gone.png")


def test_the_limit_of_pixels_holds_while_it_is_set(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.new("RGB", (300, 300))))
    with images.limited(0.01):
        assert "the limit is 0.01" in photos.read(path, np.asarray).problem
    assert not photos.read(path, np.asarray).problem
