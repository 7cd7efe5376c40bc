"""What an annotator is shown: references, targets, and where the other right answers may be."""

import hashlib
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from cir_jax.errors import DataError
from cir_jax.library.annotate.records import Candidate, Query
from cir_jax.library.library import Library

TARGETS, MOST_ALIKE = 50, 0.92
"""Photos nearest to the reference by the backbone; those more alike are the same picture."""

BY_METHOD, BY_TARGET = 100, 50
"""Photos that each method finds, and nearest to the target."""

TARGET = "target"
"""The source of what looks like the target; all others are methods."""


class Album:
    """The photos of a library by their content, which has one path at a time."""

    def __init__(self, library: Library):
        self.library = library
        self._paths: dict[bytes, bytes] = {}
        self._numbers: dict[bytes, int] = {}
        self.refresh()

    def refresh(self) -> None:
        """After an update of the library."""
        there = [photo for photo in self.library.store.photos() if not photo.problem]
        there.sort(key=lambda photo: photo.path, reverse=True)  # of copies, the first by name
        self._paths = {photo.digest: photo.path for photo in there}
        self._numbers = {photo.digest: photo.id for photo in there}
        self._contents = {photo.path: photo.digest for photo in there}
        self._of_number = {photo.id: photo.digest for photo in there}

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, content: bytes) -> bool:
        return content in self._paths

    def contents(self) -> list[bytes]:
        return sorted(self._paths)

    def path(self, content: bytes) -> Path:
        """Raises DataError for a photo that is gone."""
        if content not in self._paths:
            raise DataError(
                f"a photo of an annotation ({content.hex()}) is not in {self.library.folder} any "
                "more. Put it back, under any name, or drop the query."
            )
        return self.library.folder / os.fsdecode(self._paths[content])

    def number(self, content: bytes) -> int:
        """The store's, of a photo that is there."""
        return self._numbers[content]

    def of_number(self, number: int) -> bytes:
        """Raises DataError where there is none of this number."""
        if number not in self._of_number:
            raise DataError(
                f"photo {number}: there is none; it may have gone. Load the page again."
            )
        return self._of_number[number]

    def named(self, found: Iterable[Path]) -> list[bytes]:
        """Contents of what a search gives, each once."""
        names = (bytes(path.relative_to(self.library.folder)) for path in found)
        return list(dict.fromkeys(self._contents[n] for n in names if n in self._contents))


def next_reference(album: Album, annotator: str, seen: set[bytes]) -> bytes | None:
    """A random photo, in an order that is each annotator's own; None = all are seen."""

    def place(content: bytes) -> bytes:
        return hashlib.blake2b(f"{annotator} ".encode() + content).digest()

    return min((c for c in album.contents() if c not in seen), key=place, default=None)


def targets(album: Album, reference: bytes) -> list[bytes]:
    """The photos nearest to a reference, without those that are nearly the same picture."""
    library, wanted = album.library, 2 * TARGETS
    while True:
        found = library.search(image=album.path(reference), k=wanted)
        less = [path for path, score in found if score <= MOST_ALIKE]
        named = album.named(less)
        if len(named) >= TARGETS or len(found) < wanted:
            return named[:TARGETS]
        wanted *= 2


def text_rank(album: Album, query: Query) -> int | None:
    """Place of the target, from 1, in the search by the caption alone; None = not among ten."""
    found = album.named(path for path, _ in album.library.search(text=query.caption, k=10))
    return found.index(query.target) + 1 if query.target in found else None


def pool(album: Album, methods: Mapping[str, Library], query: Query) -> list[Candidate]:
    """What the methods find, with the shared concept, and what looks like the target; in an order
    that says nothing, the same for all annotators. The target is one of them."""
    reference, target = album.path(query.reference), album.path(query.target)
    sources: dict[bytes, list[str]] = {}

    def found_by(source: str, contents: Iterable[bytes]) -> None:
        for content in contents:
            if content != query.reference:
                sources.setdefault(content, []).append(source)

    for name, library in methods.items():
        asked = {"image": reference, "text": query.caption, "concept": query.concept}
        found_by(name, album.named(path for path, _ in library.search(**asked, k=BY_METHOD)))
    alike = album.library.search(image=target, k=BY_TARGET)
    found_by(TARGET, [query.target, *album.named(path for path, _ in alike)])
    order = sorted(sources)
    random.Random(query.id).shuffle(order)
    return [Candidate(content, tuple(sources[content])) for content in order]
