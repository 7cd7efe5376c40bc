"""Small pictures of photos, for pages: turned as EXIF says, without anything else that it says."""

import io

from PIL import Image

from cir_jax.input import images
from cir_jax.library import photos

SMALL, LARGE = 320, 1280
"""Longer sides, in pixels."""


def size(picture: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) of a picture that is to be no longer than that; smaller ones stay."""
    longest = max(picture)
    if longest <= side:
        return picture
    width, height = (max(1, round(one * side / longest)) for one in picture)
    return width, height


def jpeg(content: bytes, what: str, side: int) -> bytes:
    """Of a file's content. Raises DataError naming `what`, as `photos.opened`."""
    with images.reading(what):
        picture = images.to_rgb(photos.opened(content, what, side)[0])
        whole = picture.size
        if photos.header(content, what).format in photos.JPEGS:  # decoded at a fraction
            whole = photos.size(content, what)
        shown = size(whole, side)
        if picture.size != shown:
            picture = picture.resize(shown, Image.Resampling.BICUBIC, reducing_gap=2.0)
        bare = Image.frombytes("RGB", picture.size, picture.tobytes())  # no comment, no profile
        buffer = io.BytesIO()
        bare.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()
