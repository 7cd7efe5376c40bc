"""Datasets of cir_jax: one folder per dataset with its TFDS builder; `data.build` builds them."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")
EVERY = 30.0
"""Seconds between two lines where nobody is watching."""


def progress(items: Iterable[T], total: int | None, label: str, start: int = 0) -> Iterator[T]:
    """Yields the items under a progress bar with the time left, as long as someone is watching;
    otherwise, as in the log of a job, says one line every half minute.

    start: number of items that were done before.
    """
    if sys.stderr.isatty():
        yield from tqdm.tqdm(items, desc=label, total=total, initial=start, unit=" records")
        return
    began = last = time.monotonic()
    for done, item in enumerate(items, start + 1):
        yield item
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            left = ""
            if total:
                minutes = (now - began) / (done - start) * (total - done) / 60
                left = f" of {total:,}, about {minutes:.0f} min left"
            print(f"{label}: {done:,} records{left}", file=sys.stderr, flush=True)
