"""Datasets of cir_jax: one folder per dataset with its TFDS builder; `data.build` builds them."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], total: int | None, label: str, start: int = 0) -> Iterator[T]:
    """Yields the items under a progress bar with the time left, as long as someone is watching.

    start: number of items that were done before.
    """
    quiet = not sys.stderr.isatty()
    unit = " records"
    bar = tqdm.tqdm(items, desc=label, total=total, initial=start, unit=unit, disable=quiet)
    return iter(bar)
