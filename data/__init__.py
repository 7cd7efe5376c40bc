"""Datasets of cir_jax: one folder per dataset with its TFDS builder; `data.build` builds them."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from cir_jax.progress import Progress

T = TypeVar("T")


def progress(items: Iterable[T], total: int | None, label: str, start: int = 0) -> Iterator[T]:
    """Yields the items, and shows how far they are.

    start: number of items that were done before.
    """
    yield from Progress(items, desc=label, total=total, initial=start, unit=" records")
