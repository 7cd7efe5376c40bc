"""Benchmarks: queries, a gallery, ground truth and a protocol, read from prepared tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.errors import DataError, unknown
from cir_jax.evaluation import protocols
from cir_jax.evaluation.protocols import Protocol
from cir_jax.input.tables import Table, default_data_dir


@dataclasses.dataclass(frozen=True)
class Query:
    """One composed query. All image numbers are positions in the gallery.

    targets: ground truths, the single target first; empty where the labels are not public.
    candidates: CIRR: the image set with the reference; GeneCIS: the query's own gallery.
    """

    id: int
    reference: int
    texts: tuple[str, ...]
    targets: tuple[int, ...] = ()
    candidates: tuple[int, ...] = ()
    category: str = ""
    aspects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """One split of a benchmark, validated: what it holds can be evaluated.

    gallery: records with the encoded `image`, in ranking order (ties: lowest position first).
    categories: of each gallery image; needed by protocols with gallery="category" only.
    source: what error messages call the query file.
    Raises DataError naming source and record when a query does not fit the gallery or protocol.
    """

    name: str
    split: str
    protocol: Protocol
    gallery: Sequence[Mapping[str, Any]]
    queries: tuple[Query, ...]
    categories: tuple[frozenset[str], ...] = ()
    source: str = "queries"

    def __post_init__(self) -> None:
        if not self.queries or not len(self.gallery):
            raise DataError(
                f"{self.source}: {len(self.queries)} queries and {len(self.gallery)} gallery "
                "images; both must be positive. Prepare the dataset again."
            )
        if self.protocol.gallery == "category" and len(self.categories) != len(self.gallery):
            raise DataError(
                f"{self.source}: protocol {self.protocol.id} needs the categories of all "
                f"{len(self.gallery)} gallery images, got {len(self.categories)}."
            )
        seen: dict[int, int] = {}
        for position, query in enumerate(self.queries):
            problem = self._problem(query)
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
        return {"queries": len(self.queries), "gallery": len(self.gallery)}

    def target_table(self) -> np.ndarray:
        """int32[queries, targets] padded with -1."""
        return pad_rows([query.targets for query in self.queries])

    def candidate_table(self, *, without_reference: bool) -> np.ndarray:
        """int32[queries, candidates] padded with -1."""
        return pad_rows(
            [
                [c for c in query.candidates if not (without_reference and c == query.reference)]
                for query in self.queries
            ]
        )

    def _problem(self, query: Query) -> str:
        size, protocol = len(self.gallery), self.protocol
        named = [("reference", [query.reference]), ("ground truth", query.targets)]
        for name, positions in [*named, ("candidate", query.candidates)]:
            outside = [p for p in positions if not 0 <= p < size]
            if outside:
                return f"{name} {outside[0]} is outside the gallery of {size} images"
            if len(set(positions)) != len(positions):
                return f"a {name} is listed twice"
        if bool(query.targets) != self.labelled:
            return "ground truth is missing here but present in other records, or the reverse"
        if protocol.remove_reference and query.reference in query.targets:
            return "the reference is a ground truth, but the protocol removes it from the gallery"
        if protocol.gallery == "category":
            if not any(query.category in kinds for kinds in self.categories):
                valid = sorted(set().union(*self.categories))
                return unknown("category", query.category, valid).rstrip(".")
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


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionBenchmark:
    """Images with captions of their own: caption 0 says all (detailed), the others leave out.

    Raises DataError naming the record without a detailed and a partial caption.
    """

    name: str
    split: str
    protocol: Protocol
    gallery: Sequence[Mapping[str, Any]]
    captions: tuple[tuple[str, ...], ...]
    source: str = "captions"

    def __post_init__(self) -> None:
        for position, captions in enumerate(self.captions):
            if len(captions) < 2:
                raise DataError(
                    f"{self.source}, record {position}: {len(captions)} captions, expected a "
                    "detailed and at least one partial caption. Prepare the dataset again."
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


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a benchmark lies: tables `table` (queries) and `gallery` of a prepared dataset.

    counts: split -> (queries, gallery images) that the official files have, where known.
    """

    dataset: str
    table: str
    protocol: Protocol
    gallery: str = "gallery"
    counts: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


REGISTRY: dict[str, Entry] = {
    f"{dataset}/{name}": Entry(dataset, name, protocol)
    for dataset in ("shapes", "shapes_tiny")
    for name, protocol in protocols.PROTOCOLS.items()
} | {
    f"{dataset}/captions": Entry(dataset, "pretrain", protocols.CAPTIONS, gallery="pretrain")
    for dataset in ("shapes", "shapes_tiny")
}
"""Benchmark name -> entry. Real datasets add theirs with `register`."""


def register(name: str, entry: Entry) -> None:
    """Adds a benchmark; the same entry twice is no error, another one under the name is."""
    if REGISTRY.setdefault(name, entry) != entry:
        raise ValueError(f"benchmark {name!r} is already registered as {REGISTRY[name]}")


def load(
    name: str, split: str, data_dir: Path | None = None, *, allow_partial: bool = False
) -> Benchmark | CaptionBenchmark:
    """The benchmark `name` (such as "shapes/circo"), validated.

    allow_partial: accept other counts than the official ones (images that are gone from the web);
        the name then ends in "(partial)", because the numbers are not comparable.
    Raises DataError for unknown names and splits, missing tables, and records that do not fit.
    """
    if name not in REGISTRY:
        raise DataError(unknown("benchmark", name, REGISTRY))
    entry = REGISTRY[name]
    directory = Path(data_dir) if data_dir is not None else default_data_dir()
    gallery = Table(directory, entry.dataset, entry.gallery, split)
    if entry.protocol == protocols.CAPTIONS:
        captions = tuple(_texts(gallery[i]["captions"]) for i in range(len(gallery)))
        return CaptionBenchmark(name, split, entry.protocol, gallery, captions, repr(gallery))
    table = Table(directory, entry.dataset, entry.table, split)
    expected = entry.counts.get(split)
    if expected and expected != (len(table), len(gallery)):
        if not allow_partial:
            raise DataError(
                f"{table!r}: {len(table)} queries and {len(gallery)} gallery images, the official "
                f"split has {expected[0]} and {expected[1]}. Complete the images and prepare "
                "again, or allow a partial gallery, whose numbers are not comparable."
            )
        name += " (partial)"
    categories: tuple[frozenset[str], ...] = ()
    if entry.protocol.gallery == "category":
        categories = tuple(frozenset(_texts(gallery[i]["categories"])) for i in range(len(gallery)))
    queries = tuple(_query(table[i], f"{table!r}, record {i}") for i in range(len(table)))
    return Benchmark(name, split, entry.protocol, gallery, queries, categories, repr(table))


def _query(record: Mapping[str, Any], what: str) -> Query:
    try:
        return Query(
            id=int(record["id"]),
            reference=int(record["reference"]),
            texts=_texts(record["texts"]),
            targets=tuple(int(x) for x in record["targets"]),
            candidates=tuple(int(x) for x in record["candidates"]),
            category=_text(record["category"]),
            aspects=_texts(record["aspects"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{what}: not a query record ({type(error).__name__}: {error}). "
            "Prepare the dataset again with this version."
        ) from error


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(_text(value) for value in values)
