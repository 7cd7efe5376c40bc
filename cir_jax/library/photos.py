"""Photo files: which there are below a folder, and what is read of one."""

import contextlib
import datetime
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

from cir_jax.errors import DataError
from cir_jax.input import images

SUFFIXES = frozenset(suffix.encode() for suffix in images.SUFFIXES)
FOREIGN = frozenset(b".heic .heif .jxl .dng .cr2 .cr3 .nef .arw .raf .orf .rw2".split())
"""Photos that PIL does not read."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""What may be in a photo's file, whatever it is called: PIL has other readers, one of which starts
a program (EPS)."""

JPEGS = ("JPEG", "MPO")
"""What PIL calls them once they are opened, with and without further pictures in the file."""

SKIPPED = frozenset(b"@eadir #recycle #snapshot __macosx node_modules thumbnails thumbs".split())
"""Folders of programs, in lower case; so are those whose name begins with a dot."""

_EXIF, _TAKEN, _CHANGED = 0x8769, 0x9003, 0x0132


class File(NamedTuple):
    """path: below the folder, in the file system's own bytes."""

    path: bytes
    size: int
    mtime_ns: int


class Found(NamedTuple):
    """left_out: what is no photo to us -> how many. closed: folders that could not be read, below
    the root, with the reason: nothing is known of what is in them."""

    files: dict[bytes, File]
    left_out: dict[str, int]
    closed: dict[bytes, str]


def printable(name: Any) -> str:
    """A name in the file system's own bytes, in characters that can be shown anywhere."""
    return os.fsencode(name).decode("utf-8", "replace")


def walk(root: Path) -> Found:
    """All photos below a folder, without opening any.

    Hidden files and folders, folders of thumbnails and symbolic links are left out: a link may lead
    out of the folder, or in a circle. Raises DataError where there is no such folder.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Give the folder of your photos.")
    files: dict[bytes, File] = {}
    left_out: dict[str, int] = {}
    closed: dict[bytes, str] = {}
    waiting = [b""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(os.path.join(os.fsencode(root), folder)) as entries:
                inside = list(entries)
        except OSError as error:
            closed[folder] = error.strerror or str(error)
            continue
        for entry in inside:
            suffix = os.path.splitext(entry.name)[1].lower()
            path = os.path.join(folder, entry.name)
            if entry.name.startswith(b"."):
                continue
            if entry.is_symlink():
                if suffix in SUFFIXES or entry.is_dir():
                    left_out["symbolic links"] = left_out.get("symbolic links", 0) + 1
            elif entry.is_dir():
                if entry.name.lower() not in SKIPPED:
                    waiting.append(path)
            elif suffix in SUFFIXES:
                with contextlib.suppress(FileNotFoundError):  # gone since the folder was read
                    stat = entry.stat()
                    files[path] = File(path, stat.st_size, stat.st_mtime_ns)
            elif suffix in FOREIGN:
                what = f"{os.fsdecode(suffix)} files, which PIL does not read"
                left_out[what] = left_out.get(what, 0) + 1
    return Found(dict(sorted(files.items())), left_out, closed)


def digest(data: bytes) -> bytes:
    """What tells one photo's content from another's."""
    return hashlib.blake2b(data, digest_size=16).digest()


def digest_of(path: Path) -> bytes | None:
    """The same of a file, in pieces; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return None


class Read(NamedTuple):
    """What was read of one photo. taken: "2024-05-17T12:30:00", "" = the file does not say.
    problem: why there are no pixels, "" = there are."""

    digest: bytes
    taken: str
    pixels: np.ndarray | None
    problem: str


def read(path: Path, transform: Callable[[Image.Image], np.ndarray]) -> Read:
    """Raises OSError for a file that cannot be opened: that says nothing of what is in it."""
    data = path.read_bytes()
    taken = ""
    try:
        with images.reading(str(path)):
            image, taken = opened(data, str(path))
            return Read(digest(data), taken, transform(image), "")
    except DataError as error:
        return Read(digest(data), taken, None, str(error).removeprefix(str(path)).lstrip(": "))


def opened(data: bytes, what: str, side: int = 0) -> tuple[Image.Image, str]:
    """The picture as one looks at it, and when it was taken: turned as EXIF says, in 8 bits.

    side: where it is to be shown no larger, a JPEG is decoded at a fraction of its size, which is
    faster; 0 = whole.
    Raises DataError naming `what` for what is not readable, over the limit of pixels, or of no
    format in `FORMATS`.
    """
    with images.reading(what):
        image = header(data, what)
        when = _taken(image)
        if side:
            image.draft("RGB", (side, side))
        image.load()
        return eight_bits(ImageOps.exif_transpose(image)), when


def header(data: bytes, what: str) -> Image.Image:
    """The picture of which nothing is decoded yet. Raises as `opened`."""
    with images.reading(what):
        return images.opened(data, what, formats=_formats())


def size(data: bytes, what: str) -> tuple[int, int]:
    """(width, height) of the picture as one looks at it. Raises as `opened`."""
    with images.reading(what):
        image = header(data, what)
        if image.format not in JPEGS:  # each has its own way to be turned, some when it is decoded
            return opened(data, what)[0].size
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this PIL has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of more bits, brought to 0..255: PIL would cut them off there, all white."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image).astype(np.float32)
    low, high = 0.0, 65535.0
    if image.mode == "F" or values.max() > high or values.min() < low:
        low, high = float(values.min()), float(values.max())
    scaled = 255 * (values - low) / max(high - low, 1e-12)
    return Image.fromarray(np.round(scaled).astype(np.uint8))


def _taken(image: Image.Image) -> str:
    try:
        exif = image.getexif()
        said = exif.get_ifd(_EXIF).get(_TAKEN) or exif.get(_CHANGED) or ""
        when = datetime.datetime.strptime(str(said).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except Exception:  # a damaged date is none
        return ""
    return when.isoformat()


def query(given: Any) -> tuple[Any, bytes | None]:
    """A reference as a query gives it, and the digest of its file, if it is one, or a file's bytes.

    Raises DataError for a file that is not readable.
    """
    if isinstance(given, bytes):
        return opened(given, "image")[0], digest(given)
    if not isinstance(given, str | Path):
        return given, None
    try:
        data = Path(given).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"{given}: cannot be read ({error.strerror}).") from error
    return opened(data, str(given))[0], digest(data)
