"""Thumbnails: what one sees of a photo, and nothing else of its file."""

import io

import numpy as np
import pytest
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.library import photos, thumbnails

RED, BLUE = (220, 20, 20), (20, 20, 220)


def halves(size, kind, orientation=1, **options):
    """Stored red on the left, blue on the right."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    exif = image.getexif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("size", [(60, 40), (1000, 500), (1001, 997)])
def test_they_are_turned_and_shrunk(kind, size):
    """Orientation 6: what is stored on the left is seen above."""
    content = halves(size, kind, 6)
    assert photos.size(content, "a") == size[::-1]
    shown = Image.open(io.BytesIO(thumbnails.jpeg(content, "a", 320)))
    assert shown.size == thumbnails.size(size[::-1], 320) and max(shown.size) <= 320
    pixels, (width, height) = np.asarray(shown).astype(int), shown.size
    for row, colour in ((height // 4, RED), (3 * height // 4, BLUE)):
        for column in (width // 8, width // 2, 7 * width // 8):
            assert np.abs(pixels[row, column] - colour).max() < 40
    assert not shown.getexif() and shown.format == "JPEG"


def test_they_say_nothing_of_the_file():
    options = {"comment": b"at home", "icc_profile": b"profile" * 20}
    data = thumbnails.jpeg(halves((60, 40), "JPEG", **options), "a", 320)
    assert not {"icc_profile", "comment", "exif"} & set(Image.open(io.BytesIO(data)).info)
    assert not any(word in data for word in (b"camera", b"home", b"profile"))


def test_their_sizes():
    assert thumbnails.size((300, 20), 320) == (300, 20)
    assert thumbnails.size((6400, 3), 320) == (320, 1)
    assert thumbnails.size((1000, 4000), 320) == (80, 320)


def test_what_is_no_picture():
    with pytest.raises(DataError, match="a.jpg: not a readable image .of no format"):
        thumbnails.jpeg(b"%!PS-Adobe-3.0 EPSF-3.0\n", "a.jpg", 320)
    with pytest.raises(DataError, match="a.jpg: not a readable image"):
        thumbnails.jpeg(halves((600, 400), "JPEG")[:-3000], "a.jpg", 320)
