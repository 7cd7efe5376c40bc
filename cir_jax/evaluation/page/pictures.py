"""Small pictures of images, as lines of text in the page."""

import base64
import concurrent.futures
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from cir_jax.evaluation.queries import Benchmark, Query
from cir_jax.input.images import reading, to_rgb
from cir_jax.progress import Progress
from cir_jax.retrieval.features import open_image
from cir_jax.sharding.cores import cores

LARGEST, SMALLEST = 320, 96
"""Longer side, in pixels: what a page of few pictures has, and one of many."""

BUDGET = 48 << 20
"""Bytes of a page's pictures, in mean, while SMALLEST allows it."""

BYTES_PER_PIXEL = 0.12
"""Of the square of the longer side: WebP of QUALITY in base64. Measured: 0.07 to 0.15, photographs
of 3 : 2."""

QUALITY = 60


class Pictures:
    """The pictures of a page. They are numbered as they are added; equal ones are stored once."""

    GROUP = 100
    """Per script element: what the browser splits at once."""

    def __init__(self) -> None:
        self._added: list[tuple[Sequence[Mapping[str, Any]], int, str]] = []

    def add(self, records: Sequence[Mapping[str, Any]], position: int, what: str) -> int:
        """The number of the picture of a record's image; it is read later. what: in messages."""
        self._added.append((records, position, what))
        return len(self._added) - 1

    @property
    def side(self) -> int:
        """Longer side of the pictures: as large as so many may be."""
        if not self._added:
            return LARGEST
        side = math.isqrt(int(BUDGET / (BYTES_PER_PIXEL * len(self._added))))
        return min(LARGEST, max(SMALLEST, side))

    def scripts(self) -> str:
        """Elements `pictures-0`, ...: GROUP lines each, of base64, or of the number of an earlier
        picture that is the same, behind "=". Uses all cores."""
        side, seen, lines = self.side, {}, []
        with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
            made = pool.map(lambda one: picture(*one, side), self._added)
            bar = Progress(made, "pictures of the page", len(self._added), unit="image", delay=1)
            for number, data in enumerate(bar):
                first = seen.setdefault(data, number)
                lines.append(f"={first}" if first < number else data)
        starts = range(0, len(lines), self.GROUP)
        groups = [lines[start : start + self.GROUP] for start in starts]
        return "\n".join(
            f'<script type="text/plain" id="pictures-{number}">{chr(10).join(group)}</script>'
            for number, group in enumerate(groups)
        )


class Images:
    """The images of one benchmark that a page shows.

    listed: (number of the picture, name) of each.
    """

    def __init__(self, benchmark: Benchmark, pictures: Pictures) -> None:
        self.listed: list[tuple[int, str]] = []
        self._benchmark, self._pictures = benchmark, pictures
        self._places: dict[tuple[bool, int], int] = {}

    def gallery(self, position: int) -> int:
        """Where the image of the gallery stands in `listed`."""
        return self._place(position, False)

    def reference(self, query: Query) -> int:
        """Likewise the reference image of a query."""
        return self._place(query.reference, self._benchmark.references is not None)

    def _place(self, position: int, reference: bool) -> int:
        key, benchmark = (reference, position), self._benchmark
        if key not in self._places:
            self._places[key] = len(self.listed)
            records = benchmark.references if reference else benchmark.gallery
            name = str(position) if reference else benchmark.image_name(position)
            what = f"{'reference' if reference else 'gallery'} record {position}"
            number = self._pictures.add(records, position, f"{benchmark.name}, {what}")
            self.listed.append((number, name))
        return self._places[key]


def picture(records: Sequence[Mapping[str, Any]], position: int, what: str, side: int) -> str:
    """The image of a record as WebP in base64, its longer side at most `side`."""
    with reading(what):
        image = to_rgb(open_image(records[position], "image", what))
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=QUALITY, method=2)
    return base64.b64encode(buffer.getvalue()).decode()
