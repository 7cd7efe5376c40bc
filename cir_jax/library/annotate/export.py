"""What was annotated as CIRCO's own files, which every reader of CIRCO takes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cir_jax.errors import DataError
from cir_jax.library.annotate import quality
from cir_jax.library.annotate.candidates import TARGET, Album
from cir_jax.library.annotate.records import ASPECTS, Query, Records
from cir_jax.storage.atomic import write_atomically

IMAGES = "COCO2017_unlabeled"
INFO = "image_info_unlabeled2017.json"


class Exported(NamedTuple):
    """queries: how many; answers: right ones in all; photos: of the gallery; estimate: of those
    that were missed, None where no method has found any target; kappa: of several annotators."""

    queries: int
    answers: int
    photos: int
    estimate: quality.Estimate | None
    kappa: float | None


def answers(records: Records, query: Query) -> list[bytes]:
    """The target, then what most of the annotators who judged a photo say that fits, sorted."""
    votes: dict[bytes, list[bool]] = {}
    for said in records.judgements(query.id).values():
        for photo, fits in said.items():
            votes.setdefault(photo, []).append(fits)
    fitting = {photo for photo, all_said in votes.items() if 2 * sum(all_said) > len(all_said)}
    return [query.target, *sorted(fitting - {query.target})]


def finished(records: Records) -> list[Query]:
    """Queries whose candidates somebody has looked through."""
    return [q for q in records.queries() if q.worded and records.finished(q.id)]


def missed(records: Records, queries: list[Query]) -> quality.Estimate | None:
    """How many right answers were not found, see `quality.estimate`; None where none can be told:
    no target is among what methods found."""
    annotated = by_methods = targets = 0
    for query in queries:
        sources = {one.photo: one.sources for one in records.pool(query.id)}
        right = answers(records, query)
        found = [set(sources.get(photo, ())) - {TARGET} for photo in right]
        annotated += len(right)
        by_methods += sum(map(bool, found))
        targets += bool(found[0])
    return quality.estimate(annotated, by_methods, targets / len(queries)) if targets else None


def export(records: Records, album: Album, out: Path) -> Exported:
    """Writes annotations/val.json and the list of images, and links the photos, into `out`.

    Every photo of the library is in the gallery; an image's id is its place among their contents.
    Raises DataError where nothing is finished, and where a photo of a query is gone.
    """
    queries = finished(records)
    if not queries:
        raise DataError(
            f"{records.path}: no query is finished yet: its third step is to look through the "
            "candidates."
        )
    contents = album.contents()
    number = {content: i for i, content in enumerate(contents)}
    entries, total = [], 0
    for place, query in enumerate(queries):
        for content in (query.reference, query.target):
            album.path(content)  # or it is gone
        right = [number[content] for content in answers(records, query) if content in number]
        total += len(right)
        entries.append(_entry(place, query, number, right, records.finished(query.id)))
    info: dict[str, Any] = {
        "info": {"description": "made by cir annotate"},
        "images": [
            {"id": i, "file_name": os.fspath(album.path(content).relative_to(album.library.folder))}
            for i, content in enumerate(contents)
        ],
    }
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    (out / IMAGES / "annotations").mkdir(parents=True, exist_ok=True)
    _link(out / IMAGES / "unlabeled2017", album.library.folder)
    _write(out / IMAGES / "annotations" / INFO, info)
    _write(out / "annotations" / "val.json", entries)
    several = [records.judgements(query.id) for query in queries]
    return Exported(
        len(entries), total, len(contents), missed(records, queries), agreement(several)
    )


def agreement(said: list[dict[str, dict[bytes, bool]]]) -> float | None:
    """`quality.kappa` over the judgements of all queries."""
    whole: dict[str, dict[bytes, bool]] = {}
    for i, of_query in enumerate(said):
        for annotator, judged in of_query.items():
            key = i.to_bytes(8, "big")
            whole.setdefault(annotator, {}).update({key + x: fits for x, fits in judged.items()})
    return quality.kappa(list(whole.values()))


def _entry(
    place: int,
    query: Query,
    number: Mapping[bytes, int],
    right: list[int],
    finished: Mapping[str, tuple[str, ...]],
) -> dict[str, Any]:
    chosen = {name for aspects in finished.values() for name in aspects}
    return {
        "reference_img_id": number[query.reference],
        "target_img_id": number[query.target],
        "relative_caption": query.caption,
        "shared_concept": query.concept,
        "gt_img_ids": right,
        "id": place,
        "semantic_aspects": [name for name in ASPECTS if name in chosen],
    }


def _link(link: Path, folder: Path) -> None:
    """The photos, where CIRCO's readers look for them. Raises DataError for another thing there."""
    if link.is_symlink():
        if link.resolve() == folder.resolve():
            return
        link.unlink()
    elif link.exists():
        raise DataError(f"{link}: is in the way of a link to the photos. Give another --out.")
    link.symlink_to(folder, target_is_directory=True)


def _write(path: Path, value: Any) -> None:
    data = (json.dumps(value, indent=1) + "\n").encode()
    write_atomically(path, lambda file: file.write(data))
