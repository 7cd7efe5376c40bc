"""What is evaluated: queries, gallery, ground truth and protocol, checked against each other."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cir_jax.errors import DataError, unknown
from cir_jax.evaluation.protocols import Protocol


@dataclasses.dataclass(frozen=True)
class Query:
    """One composed query. Image numbers are positions in the gallery.

    reference: in the benchmark's `references`, which are the gallery unless it has its own.
    targets: ground truths, the single target first; empty where the labels are not public.
    candidates: CIRR: the image set with the reference; GeneCIS: the query's own gallery.
    concept: CIRCO: what reference and targets share. soft: CIRR: (image, grade) of answers.
    """

    id: int
    reference: int
    texts: tuple[str, ...]
    targets: tuple[int, ...] = ()
    candidates: tuple[int, ...] = ()
    category: str = ""
    aspects: tuple[str, ...] = ()
    concept: str = ""
    soft: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """One split of a benchmark, validated: what it holds can be evaluated.

    gallery: records with the encoded `image`, in ranking order (ties: lowest position first).
    categories: of each gallery image; needed by protocols that rank within a category only.
    source: what error messages call the query file.
    references: records with the reference images, where they are not those of the gallery.
    labels: `name` and `categories` of each gallery image, where they can be read without the image.
    data: name and version of the data. partial: made of incomplete data, so not comparable.
    Raises DataError naming source and record when a query does not fit the gallery or protocol.
    """

    name: str
    split: str
    protocol: Protocol
    gallery: Sequence[Mapping[str, Any]]
    queries: tuple[Query, ...]
    categories: tuple[frozenset[str], ...] = ()
    source: str = "queries"
    references: Sequence[Mapping[str, Any]] | None = None
    labels: Sequence[Mapping[str, Any]] | None = None
    data: str = ""
    partial: bool = False

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != len(self.gallery):
            raise DataError(
                f"{self.source}: the names of {len(self.labels)} images for a gallery of "
                f"{len(self.gallery)}. Prepare the dataset again."
            )
        if not self.queries or not len(self.gallery):
            raise DataError(
                f"{self.source}: {len(self.queries)} queries and {len(self.gallery)} gallery "
                "images; both must be positive. Prepare the dataset again."
            )
        if self.protocol.by_group and len(self.categories) != len(self.gallery):
            raise DataError(
                f"{self.source}: protocol {self.protocol.id} needs the categories of all "
                f"{len(self.gallery)} gallery images, got {len(self.categories)}."
            )
        seen: dict[int, int] = {}
        known = set().union(*self.categories) if self.categories else set()
        for position, query in enumerate(self.queries):
            problem = self._problem(query, known)
            if query.id in seen:
                problem = f"duplicate query id, already used by record {seen[query.id]}"
            seen[query.id] = position
            if problem:
                raise DataError(f"{self.what(position)}: {problem}. Prepare the dataset again.")
            self.protocol.join(query.texts, self.what(position))

    def what(self, position: int) -> str:
        """What error messages call a query."""
        return f"{self.source}, record {position} (id {self.queries[position].id})"

    @property
    def labelled(self) -> bool:
        """Whether the ground truth is public, so that metrics can be computed here."""
        return bool(self.queries[0].targets)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of queries and gallery images: another count is another benchmark."""
        counts = {"queries": len(self.queries), "gallery": len(self.gallery)}
        if self.protocol.by_group:
            for name in sorted({query.category for query in self.queries}):
                counts[f"gallery {name}"] = sum(name in kinds for kinds in self.categories)
        return counts

    def reference(self, query: Query) -> Mapping[str, Any]:
        """The record of a query's reference image."""
        return (self.gallery if self.references is None else self.references)[query.reference]

    def image_name(self, position: int) -> str:
        """What the authors call an image of the gallery; its position where they do not."""
        records = self.gallery if self.labels is None else self.labels
        name = records[position].get("name", str(position))
        return name.decode() if isinstance(name, bytes) else str(name)

    def target_table(self) -> np.ndarray:
        """int32[queries, targets] padded with -1."""
        return pad_rows([query.targets for query in self.queries])

    def graded(self) -> list[list[tuple[int, float]]]:
        """Graded answers of each query that can be retrieved: CIRR grades the reference, too."""
        removed = self.protocol.remove_reference
        return [
            [one for one in query.soft if not (removed and one[0] == query.reference)]
            for query in self.queries
        ]

    def candidate_table(self, *, without_reference: bool) -> np.ndarray:
        """int32[queries, candidates] padded with -1."""
        return pad_rows(
            [
                [c for c in query.candidates if not (without_reference and c == query.reference)]
                for query in self.queries
            ]
        )

    def _problem(self, query: Query, known: set[str]) -> str:
        size, protocol = len(self.gallery), self.protocol
        references = size if self.references is None else len(self.references)
        if not 0 <= query.reference < references:
            where = "gallery" if self.references is None else "table of references"
            return f"reference {query.reference} is outside the {where} of {references} images"
        soft = [position for position, _ in query.soft]
        for name, positions in (
            ("ground truth", query.targets),
            ("candidate", query.candidates),
            ("graded answer", soft),
        ):
            outside = [p for p in positions if not 0 <= p < size]
            if outside:
                return f"{name} {outside[0]} is outside the gallery of {size} images"
            if len(set(positions)) != len(positions):
                return f"a {name} is listed twice"
        if bool(query.targets) != self.labelled:
            return "ground truth is missing here but present in other records, or the reverse"
        if protocol.remove_reference and query.reference in query.targets:
            return "the reference is a ground truth, but the protocol removes it from the gallery"
        if protocol.soft and query.targets and not query.soft:
            return f"no graded answers, which protocol {protocol.id} needs"
        if protocol.needs_concept and not query.concept:
            return f"no shared concept, which protocol {protocol.id} needs"
        if protocol.by_group:
            if query.category not in known:
                return unknown("category", query.category, known).rstrip(".")
            outside = [t for t in query.targets if query.category not in self.categories[t]]
            if outside:
                return f"ground truth {outside[0]} is not of category {query.category!r}"
        if protocol.gallery == "candidates" or protocol.subset_recall:
            if len(set(query.candidates) - {query.reference}) < 1:
                return f"no candidates, which protocol {protocol.id} needs"
            needed = query.targets if protocol.gallery == "candidates" else query.targets[:1]
            missing = [t for t in needed if t not in query.candidates]
            if missing:
                return f"ground truth {missing[0]} is not among the candidates"
        return ""


@dataclasses.dataclass(frozen=True)
class Truth:
    """Who belongs to whom, in one direction.

    queries: int32[n] positions of captions (t2i) or images (i2t); every one is ranked against all
        images, or all captions. targets: positions of the right ones, per query.
    """

    queries: np.ndarray
    targets: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionBenchmark:
    """Images and captions that find each other.

    captions: per image. In the embedded world caption 0 says all, the others leave out (`kinds`).
    truths: name -> direction ("t2i", "i2t") -> `Truth`, positions of captions counted through all
        images; empty = captions belong to their image.
    order: int32[captions], the order of the captions in the official list; their folds follow it.
    absent: ground truths that are not prepared, whose numbers are left out.
    Raises DataError naming the record without a detailed and a partial caption.
    """

    name: str
    split: str
    protocol: Protocol
    gallery: Sequence[Mapping[str, Any]]
    captions: tuple[tuple[str, ...], ...]
    source: str = "captions"
    truths: Mapping[str, Mapping[str, Truth]] = dataclasses.field(default_factory=dict)
    order: np.ndarray | None = None
    absent: tuple[str, ...] = ()
    data: str = ""
    partial: bool = False

    def __post_init__(self) -> None:
        least = 1 if self.truths else 2
        for position, captions in enumerate(self.captions):
            if len(captions) < least:
                expected = "one" if self.truths else "a detailed and at least one partial caption"
                raise DataError(
                    f"{self.source}, record {position}: {len(captions)} captions, expected "
                    f"{expected}. Prepare the dataset again."
                )
        total = sum(map(len, self.captions))
        for name, directions in self.truths.items():
            for direction, truth in directions.items():
                sizes = (total, len(self.gallery))
                own, other = sizes if direction == "t2i" else sizes[::-1]
                for i, (query, targets) in enumerate(
                    zip(truth.queries, truth.targets, strict=True)
                ):
                    outside = [t for t in targets if not 0 <= t < other]
                    if not targets or outside or not 0 <= query < own:
                        raise DataError(
                            f"{self.source}, {name} {direction} record {i}: query {query} of {own} "
                            f"with answers {list(targets)[:5]} of {other}: no answer, or outside. "
                            "Prepare the dataset again."
                        )

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of captions and images."""
        return {"queries": sum(map(len, self.captions)), "gallery": len(self.gallery)}


def pad_rows(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Ragged rows of positions -> int32[rows, longest], padded with -1."""
    width = max(1, max(map(len, rows), default=0))
    out = np.full((len(rows), width), -1, np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
