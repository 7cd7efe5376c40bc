"""Datasets of cir_jax: one folder per dataset with its TFDS builder; `data.build` builds them."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yields the items under a progress bar with the time left, as long as someone is watching."""
    quiet = not sys.stderr.isatty()
    return iter(tqdm.tqdm(items, desc=label, total=total, unit=" records", disable=quiet))
