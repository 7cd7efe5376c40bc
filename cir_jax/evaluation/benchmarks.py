"""The list of benchmarks, and how they are read from prepared tables.

A benchmark is named DATASET[/TABLE][:VARIANT[+VARIANT]]: "circo", "shapes/cirr",
"fashioniq:small_gallery". Variants are those of its protocol (`protocols.VARIANTS`); some have data
of their own: "cirr:mbeir", "circo:validated", "cirr:mbeir+shortcut_free".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.errors import ConfigError, DataError, unknown
from cir_jax.evaluation import circus, protocols
from cir_jax.evaluation.protocols import Protocol
from cir_jax.evaluation.queries import Benchmark, CaptionBenchmark, Query, Truth, pad_rows
from cir_jax.input.tables import Table, is_prepared
from cir_jax.storage.buckets import place
from cir_jax.storage.places import default_data_dir

__all__ = [
    "REGISTRY", "Benchmark", "CaptionBenchmark", "Entry", "Query", "Truth", "find", "incomplete",
    "load", "pad_rows", "register", "required",
]  # fmt: skip

COPIES = ("mbeir",)
"""Variants that are copies with images of their own."""

NAMES = "names"
"""The table with what a gallery's images are called, for who does not need the images."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a benchmark lies: tables of a prepared dataset.

    split: the default one. aliases: split -> what this benchmark calls it.
    gallery_split: the one split of the gallery that all query splits share, if they do.
    counts: split -> (queries, gallery images) that the official files have, where known.
    groups: the same per category under the protocol of the entry or a variant:
        (gallery kind, split, category) -> gallery images.
    references: the table of reference images, where they are not those of the gallery.
    truths: tables with the ground truths of caption retrieval; all but the first may be missing.
    copies: variant -> the entry of a copy of it with other images, queries and protocol.
    circus: the table of CIRCUS that names queries of it.
    """

    dataset: str
    table: str
    protocol: Protocol
    gallery: str = "gallery"
    counts: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    split: str = "val"
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gallery_split: str = ""
    groups: Mapping[tuple[str, str, str], int] = dataclasses.field(default_factory=dict)
    references: str = ""
    truths: tuple[str, ...] = ()
    copies: Mapping[str, "Entry"] = dataclasses.field(default_factory=dict)
    circus: str = ""

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that must be there."""
        own = (self.gallery, self.table, self.references, *self.truths[:1])
        return tuple(dict.fromkeys(table for table in own if table))


def _fashioniq_groups() -> dict[tuple[str, str, str], int]:
    counted = {
        ("category", "train"): (11452, 19036, 16121),
        ("category", "val"): (3817, 6346, 5373),
        ("category", "test"): (3818, 6346, 5374),
        ("triplets", "val"): (2628, 3089, 2902),
    }
    return {
        (*kind, name): count
        for kind, counts in counted.items()
        for name, count in zip(("dress", "shirt", "toptee"), counts, strict=True)
    }


def _mbeir(dataset: str, queries: int, gallery: int) -> dict[str, Entry]:
    """M-BEIR's test split is the others' val."""
    copy = Entry(
        f"{dataset}_mbeir",
        "queries",
        protocols.PROTOCOLS[dataset],
        counts={"test": (queries, gallery)},
        split="test",
        aliases={"val": "test"},
        references="references",
        circus=dataset,
    )
    return {"mbeir": copy}


_CIRR = {"train": (28225, 16939), "val": (4181, 2297), "test1": (4148, 2315)}

REGISTRY: dict[str, Entry] = {
    f"{dataset}/{name}": Entry(dataset, name, protocol, split="test_0")
    for dataset in ("shapes", "shapes_tiny")
    for name, protocol in protocols.PROTOCOLS.items()
} | {
    f"{dataset}/{name}": entry
    for dataset, part in (("shapes", "train[-1000:]"), ("shapes_tiny", "train[-100:]"))
    for name, entry in {
        "captions": Entry(dataset, "pretrain", protocols.CAPTIONS, gallery="pretrain", split="val"),
        # random scenes: the galleries are full of look-alikes, which no word tells apart
        "inversion": Entry(
            dataset, "captions", protocols.INVERSION, gallery="captions", split=part
        ),
    }.items()
}
REGISTRY |= {
    "circo": Entry(
        "circo",
        "queries",
        protocols.CIRCO,
        counts={"val": (220, 123403), "test": (800, 123403)},
        gallery_split="unlabeled",
        circus="circo",
    ),
    "annotated": Entry("annotated", "queries", protocols.CIRCO, gallery_split="unlabeled"),
    "cirr": Entry(
        "cirr",
        "queries",
        protocols.CIRR,
        counts=_CIRR,
        aliases={"test": "test1"},
        copies=_mbeir("cirr", 4170, 21551),
        circus="cirr",
    ),
    "cirr/inversion": Entry(
        "cirr",
        "gallery",
        protocols.INVERSION,
        counts={split: (size, size) for split, (_, size) in _CIRR.items()},
        aliases={"test": "test1"},
    ),
    "fashioniq": Entry(
        "fashioniq",
        "queries",
        protocols.FASHIONIQ,
        counts={"train": (18000, 45429), "val": (6016, 15415), "test": (6118, 15417)},
        groups=_fashioniq_groups(),
        copies=_mbeir("fashioniq", 6003, 74381),
        circus="fashioniq",
    ),
    "icir": Entry(
        "icir",
        "queries",
        protocols.ICIR,
        # the number of images is known in thousands only
        split="test",
        references="references",
    ),
    # the attribute tasks could not be counted: the files were out of reach (their mark says more)
    "genecis": Entry("genecis", "queries", protocols.GENECIS),
    # one instance per image is chosen, and images without one are left out: no official count
    "coco_object": Entry("coco_object", "queries", protocols.COCO_OBJECT, references="references"),
    "coco_captions": Entry(
        "coco_captions",
        "captions",
        protocols.COCO_CAPTIONS,
        counts={"test": (25000, 5000)},
        split="test",
        truths=("original", "cxc", "eccv"),
    ),
}
"""Benchmark name -> entry."""


def register(name: str, entry: Entry) -> None:
    """Adds a benchmark; the same entry twice is no error, another one under the name is."""
    if REGISTRY.setdefault(name, entry) != entry:
        raise ValueError(f"benchmark {name!r} is already registered as {REGISTRY[name]}")


def find(name: str) -> Entry:
    """The entry of "circo" or "fashioniq:small_gallery", with the protocol of the variants.

    Raises DataError for an unknown name, ConfigError for an unknown variant.
    """
    base, _, variants = name.partition(":")
    if base not in REGISTRY:
        raise DataError(unknown("benchmark", base, REGISTRY))
    entry = REGISTRY[base]
    chosen = variants.split("+") if variants else ()
    protocol = protocols.variant(entry.protocol, chosen)
    # their protocols fit the embedded world, too, but not their data
    copied = [name for name in chosen if name in COPIES]
    alien = any(variant not in entry.copies for variant in copied)
    if alien or (protocol.queries != "all" and not entry.circus):
        having = sorted(n for n, e in REGISTRY.items() if e.circus)
        raise ConfigError(f"{name}: there are such data of {', '.join(having)} only.")
    for variant in copied:
        entry = entry.copies[variant]
    return dataclasses.replace(entry, protocol=protocol)


def required(names: Sequence[str]) -> dict[str, set[str]]:
    """Dataset -> tables that these benchmarks read."""
    needed: dict[str, set[str]] = {}
    for entry in map(find, names):
        needed.setdefault(entry.dataset, set()).update(entry.tables)
        if entry.protocol.queries != "all":
            needed.setdefault(circus.DATASET, set()).add(entry.circus)
    return needed


def load(
    name: str, split: str = "", data_dir: Path | None = None, *, allow_partial: bool = False
) -> Benchmark | CaptionBenchmark:
    """The benchmark `name` (such as "shapes/circo"), validated.

    split: "" = the benchmark's own default: public labels, or the first test of the embedded world.
    allow_partial: accept incomplete data (images that are gone from the web); the name then ends in
        "(partial)", because the numbers are not comparable.
    Raises DataError for unknown names and splits, missing tables, and records that do not fit.
    """
    entry = find(name)
    split = entry.aliases.get(split, split) or entry.split
    directory = place(data_dir) if data_dir is not None else default_data_dir()
    table = Table(directory, entry.dataset, entry.table, split)
    if entry.gallery == entry.table:
        gallery = table
    else:
        gallery = Table(directory, entry.dataset, entry.gallery, entry.gallery_split or split)
    problem = incomplete(entry, table, split, (len(table), len(gallery)))
    if problem and not allow_partial:
        raise DataError(
            f"{table!r}: {problem}. Complete the files and prepare again, or allow partial data "
            "(--allow_partial), whose numbers are not comparable."
        )
    shared = {
        "name": f"{name} (partial)" if problem else name,
        "split": split,
        "protocol": entry.protocol,
        "gallery": gallery,
        "source": repr(table),
        "data": f"{entry.dataset}@{getattr(table, 'version', 'unknown')}",
        "partial": bool(problem),
    }
    if entry.protocol == protocols.CAPTIONS:
        captions = tuple(_texts(gallery[i]["captions"]) for i in range(len(gallery)))
        return CaptionBenchmark(captions=captions, **shared)
    if entry.truths:
        first, *others = entry.truths
        there = [first, *(t for t in others if is_prepared(directory, entry.dataset, t))]
        found = {t: Table(directory, entry.dataset, t, split) for t in there}
        absent = tuple(t for t in others if t not in found)
        return _caption_benchmark(table, found, shared | {"absent": absent})
    if entry.protocol.text == "inversion":
        queries = tuple(Query(i, i, ("",), (i,)) for i in range(len(gallery)))
        return Benchmark(queries=queries, **shared)
    records = [table[i] for i in range(len(table))]
    queries = tuple(_query(r, f"{table!r}, record {i}") for i, r in enumerate(records))
    references = None
    if entry.references:
        references = Table(directory, entry.dataset, entry.references, split)
    labels = None
    if is_prepared(directory, entry.dataset, NAMES):
        labels = Table(directory, entry.dataset, NAMES, entry.gallery_split or split)
    categories = _categories(entry.protocol, gallery if labels is None else labels, queries)
    if entry.protocol.queries != "all":
        chosen = Table(directory, circus.DATASET, entry.circus, entry.protocol.queries)
        if what := _unfinished(chosen, entry.protocol.queries):
            if not allow_partial:
                raise DataError(f"{chosen!r}: {what}. Prepare the dataset again.")
            shared |= {"name": f"{name} (partial)", "partial": True}
        named = gallery if labels is None else labels
        kept = circus.select(
            chosen,
            entry.circus,
            queries,
            lambda position: _text(named[position]["name"]),
            [_text(record["qid"]) for record in records if "qid" in record],
            partial=shared["partial"],
        )
        queries = tuple(queries[i] for i in kept)
        shared["data"] += f"+{circus.DATASET}@{getattr(chosen, 'version', 'unknown')}"
    if entry.protocol.captions in ("orders_separate", "orders_marked"):
        queries = tuple(one for query in queries for one in _orders(entry.protocol, query))
    shared |= {"categories": categories, "references": references, "labels": labels}
    benchmark = Benchmark(queries=queries, **shared)
    for (kind, where, group), count in entry.groups.items():
        here = benchmark.counts.get(f"gallery {group}")
        if (kind, where) == (entry.protocol.gallery, split) and here != count and not problem:
            raise DataError(
                f"{table!r}: {here} gallery images of {group}, the official split has {count}. "
                "Prepare the dataset again."
            )
    return benchmark


def incomplete(entry: Entry, table: Any, split: str, counts: tuple[int, int]) -> str:
    """Why prepared data are partial; "" = they are not, as far as is known.

    counts: queries and gallery images there are.
    """
    expected = entry.counts.get(split)
    if expected and expected != counts:
        return (
            f"{counts[0]} queries and {counts[1]} gallery images, the official split has "
            f"{expected[0]} and {expected[1]}"
        )
    return _unfinished(table, split)


def _unfinished(table: Any, split: str) -> str:
    """What a table's mark says of the split; "" = it is made of complete files."""
    mark = table.mark().get("splits", {}).get(split, {})
    if mark.get("complete", True):
        return ""
    lost = ", ".join(f"{count} {what}" for what, count in mark.get("lost", {}).items() if count)
    return f"prepared from incomplete files (lost: {lost or 'see source.json beside the table'})"


def _categories(
    protocol: Protocol, gallery: Sequence[Mapping[str, Any]], queries: Sequence[Query]
) -> tuple[frozenset[str], ...]:
    """The groups that each gallery image is ranked in."""
    if protocol.gallery == "category":
        return tuple(frozenset(_texts(gallery[i]["categories"])) for i in range(len(gallery)))
    if protocol.gallery != "triplets":
        return ()
    found: list[set[str]] = [set() for _ in range(len(gallery))]
    for query in queries:
        for position in (query.reference, *query.targets):
            if 0 <= position < len(found):  # else `Benchmark` names the record
                found[position].add(query.category)
    return tuple(map(frozenset, found))


def _orders(protocol: Protocol, query: Query) -> list[Query]:
    """Each order of the captions as a query, with the ids 2 id and 2 id + 1."""
    texts = protocol.join(query.texts, f"query {query.id}")
    return [
        dataclasses.replace(query, id=2 * query.id + i, texts=(text,))
        for i, text in enumerate(texts)
    ]


def _query(record: Mapping[str, Any], what: str) -> Query:
    try:
        soft = zip(record.get("soft_targets", ()), record.get("soft_weights", ()), strict=True)
        return Query(
            id=int(record["id"]),
            reference=int(record["reference"]),
            texts=_texts(record["texts"]),
            targets=tuple(int(x) for x in record["targets"]),
            candidates=tuple(int(x) for x in record["candidates"]),
            category=_text(record["category"]),
            aspects=_texts(record["aspects"]),
            concept=_text(record.get("shared_concept", "")),
            soft=tuple((int(image), float(weight)) for image, weight in soft),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{what}: not a query record ({type(error).__name__}: {error}). "
            "Prepare the dataset again with this version."
        ) from error


def _caption_benchmark(
    table: Any, tables: Mapping[str, Any], shared: dict[str, Any]
) -> CaptionBenchmark:
    """COCO captions: grouped by image; the ground truths then name the grouped positions."""
    images = len(shared["gallery"])
    grouped: list[list[tuple[int, str]]] = [[] for _ in range(images)]
    for i in range(len(table)):
        record = table[i]
        image = int(record["image"])
        if not 0 <= image < images:
            raise DataError(
                f"{table!r}, record {i}: image {image} is outside the gallery of {images} images. "
                "Prepare the dataset again."
            )
        grouped[image].append((i, _text(record["text"])))
    order = np.asarray([i for group in grouped for i, _ in group])
    place = np.empty(len(order), np.int32)  # position in the table -> grouped position
    place[order] = np.arange(len(order))
    truths: dict[str, dict[str, Truth]] = {}
    for name, relevance in tables.items():
        rows: dict[str, list[tuple[int, tuple[int, ...]]]] = {"i2t": [], "t2i": []}
        for i in range(len(relevance)):
            record, what = relevance[i], f"{relevance!r}, record {i}"
            direction = _text(record["direction"])
            if direction not in rows:
                raise DataError(f"{what}: {unknown('direction', direction, rows)}")
            query, targets = int(record["query"]), [int(x) for x in record["targets"]]
            captions = [query] if direction == "t2i" else targets
            if any(not 0 <= x < len(place) for x in captions):
                raise DataError(
                    f"{what}: a caption is outside the {len(place)} captions. "
                    "Prepare the dataset again."
                )
            if direction == "t2i":
                query = int(place[query])
            else:
                targets = [int(place[x]) for x in targets]
            rows[direction].append((query, tuple(dict.fromkeys(targets))))
        truths[name] = {
            direction: Truth(
                np.asarray([q for q, _ in found], np.int32), tuple(t for _, t in found)
            )
            for direction, found in rows.items()
        }
    captions = tuple(tuple(text for _, text in group) for group in grouped)
    return CaptionBenchmark(captions=captions, truths=truths, order=order, **shared)


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(_text(value) for value in values)
