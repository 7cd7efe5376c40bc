"""What was found, as one HTML page: images inside, no script, nothing that leaves the machine."""

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError
from cir_jax.library import thumbnails
from cir_jax.storage.atomic import write_atomically

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; color: #212529; background: #fafaf8 }}
h1 {{ font-size: 1.2rem }}
main {{ display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)) }}
figure {{ margin: 0 }}
img {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: #e4e6e8 }}
figcaption {{ overflow-wrap: anywhere; font-size: .85rem }}
.given {{ display: flex; gap: 1rem; margin-bottom: 1.5rem }}
.given figure {{ width: 8rem }}
.note {{ color: #868e96 }}
</style></head><body>
<h1>{title}</h1>
<p class="note">{note}</p>
<div class="given">{given}</div>
<main>{found}</main>
</body></html>
"""


def write(
    path: Path,
    title: str,
    note: str,
    given: Iterable[str | Path],
    found: Iterable[tuple[Path, str, float]],
) -> None:
    """The page of a query: its images, and (file, what it is called, score) of what was found.

    Raises DataError where it cannot be written.
    """
    text = _PAGE.format(
        title=html.escape(title),
        note=html.escape(note),
        given="".join(_figure(file, str(file)) for file in given),
        found="".join(_figure(file, name, f"{score:.3f} ") for file, name, score in found),
    )
    data = text.encode("utf-8", "surrogateescape")
    write_atomically(path, lambda file: file.write(data))


def _figure(file: Any, name: str, score: str = "") -> str:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    data = base64.b64encode(thumbnails.jpeg(content, str(file), thumbnails.SMALL)).decode()
    said = html.escape(name)
    return (
        f'<figure><img alt="{said}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{score}{said}</figcaption></figure>"
    )
