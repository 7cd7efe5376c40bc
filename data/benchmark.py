"""Benchmarks of composed retrieval: from the authors' files to the tables `queries` and `gallery`.

A builder reads a split as `Raw`: images and queries by name. This module finds out which images are
there, drops what is lost with those that are not, and numbers the rest: a query names its images by
their positions in the gallery.

Table `gallery`: `id` (the position), `name`, `image` (bytes of the file), `categories`.
Table `names`: the same without the images, for who needs to know what they are called.
Table `references`, where reference images are not of the gallery: `id`, `name`, `image`.
Table `queries`: `id` (the official one, where there is one), `reference`, `texts`, `targets` (the
single target first; empty where the labels are not public), `candidates`, `category`, `aspects`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cir_jax.errors import DataError
from cir_jax.input import links
from data.held import Place
from data.lookup import first_image
from data.source import (
    Options,
    Report,
    SourceBuilder,
    Split,
    Survey,
    image_problems,
    read_images,
    stamp,
    tables,
)

TEXT = tfds.features.Text()  # of bytes, too: TFDS's own Image feature needs TensorFlow to write
TEXTS = tfds.features.Sequence(tfds.features.Text())
POSITIONS = tfds.features.Sequence(np.int32)
MAX_MISSING_NAMES = 3


class AbsentError(DataError):
    """A split of which no file is there: it is left out."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of a gallery.

    key: what queries call it; unique. name: what the authors call it. path: its file, or where it
        is held (`data.held`).
    box: left, top, width, height, where only a part of the image is meant.
    renamed: whether its file is called otherwise than the authors say (`data.lookup`).
    """

    key: str
    name: str
    path: Place
    categories: tuple[str, ...] = ()
    box: tuple[float, ...] | None = None
    renamed: bool = False


def located(key: str, name: str, paths: Sequence[Path], *more: Any, **fields: Any) -> Picture:
    """A picture whose file is one of the paths, or is called nearly so."""
    path = first_image(*paths)
    return Picture(key, name, path, *more, renamed=path not in paths, **fields)


@dataclasses.dataclass(frozen=True)
class Question:
    """A query before its images are numbered.

    where: file and record, for messages.
    fields: further fields of its record. soft: {key: weight} of graded answers.
    remarks: what is odd in its entry, and yet no error.
    """

    where: str
    id: int
    reference: str
    texts: tuple[str, ...]
    targets: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    category: str = ""
    aspects: tuple[str, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    soft: Mapping[str, float] | None = None
    remarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Raw:
    """A split as its annotation files say.

    gallery_file: what messages call the list of images.
    missing: annotation files that are not there although others of the split are.
    notes: further counts for the report, of what the released code leaves out.
    references: the reference images, of builders with REFERENCES; else they are `pictures`.
    """

    pictures: Sequence[Picture]
    questions: Sequence[Question]
    gallery_file: Path
    missing: Sequence[Path] = ()
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    references: Sequence[Picture] = ()

    @property
    def asked_of(self) -> Sequence[Picture]:
        """The images that queries may have as their reference."""
        return self.references or self.pictures


class BenchmarkBuilder(SourceBuilder, skip_registration=True):
    """A benchmark with the tables `queries` and `gallery`. Subclasses define `read`.

    OFFICIAL: {split: {"queries": ..., "gallery": ..., ...}}, the splits there are.
    GALLERY_SPLIT: the one split of the gallery, if all query splits share it.
    COUNTED: whether to count queries and images per category, too.
    REFERENCES: whether reference images are a table of their own.
    QUERY_FIELDS, GALLERY_FIELDS: features of further fields.
    """

    BUILDER_CONFIGS = tables("gallery", "queries", "names")  # no queries without images
    OPTIONAL = ("names",)  # tables that were built before there was this one are whole
    VERSION = tfds.core.Version("1.0.0")
    OWN_IDS = ("queries",)
    OFFICIAL: Mapping[str, Mapping[str, int]] = {}
    LINKS = True
    GALLERY_SPLIT: str | None = None
    COUNTED = False
    REFERENCES = False
    QUERY_FIELDS: Mapping[str, Any] = {}
    GALLERY_FIELDS: Mapping[str, Any] = {}

    @classmethod
    def split_names(cls) -> tuple[str, ...]:
        """See the base class."""
        return tuple(cls.OFFICIAL)

    @classmethod
    def read(cls, source: Path, split: str) -> Raw:
        """What the annotation files in the folder say. Raises AbsentError and DataError."""
        raise NotImplementedError

    @classmethod
    def of_bytes(cls, picture: Picture, image: bytes) -> dict[str, Any]:
        """The further fields of a gallery record."""
        del picture, image
        return {}

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        """See the module's docstring."""
        if table == "names":
            return {"name": TEXT, "categories": TEXTS}
        if table == "references":
            return {"name": TEXT, "image": TEXT, "categories": TEXTS}
        if table == "gallery":
            return {"name": TEXT, "image": TEXT, "categories": TEXTS, **cls.GALLERY_FIELDS}
        return {
            "reference": np.int32,
            "texts": TEXTS,
            "targets": POSITIONS,
            "candidates": POSITIONS,
            "category": TEXT,
            "aspects": TEXTS,
            **cls.QUERY_FIELDS,
        }

    @classmethod
    def survey(cls, source: Path, options: Options) -> Survey:
        """Reads the annotations of all wanted splits and looks for their images."""
        queries, galleries, names, references, reports, skipped = {}, {}, {}, {}, {}, {}
        problem_of: dict[Any, str | None] = {}
        for split, official in cls.OFFICIAL.items():
            if not options.wanted(split):
                continue
            try:
                raw = cls.read(source, split)
            except AbsentError as reason:
                skipped[split] = str(reason)
                continue
            check(raw)
            pictures = [*raw.pictures, *raw.references]
            new = [p for p in dict.fromkeys(x.path for x in pictures) if p not in problem_of]
            label = f"looking at the images of {cls.name}/{split}"
            found = image_problems(new, options.decode == "survey", label)
            problem_of |= dict(zip(new, found, strict=True))
            kept = [picture for picture in raw.pictures if problem_of[picture.path] is None]
            there = {picture.key: i for i, picture in enumerate(kept)}
            asked = [picture for picture in raw.references if problem_of[picture.path] is None]
            own = {picture.key: i for i, picture in enumerate(asked)} if raw.references else there
            records, lost = resolve(raw.questions, there, own)
            lost["gallery"] = len(raw.pictures) - len(kept)
            problems = [f"{path}: is missing" for path in raw.missing]
            problems += [
                f"{path}: {problem_of[path]}"
                for path in dict.fromkeys(x.path for x in pictures)
                if problem_of[path]
            ]
            counts = cls.counts(records, kept) | dict(raw.notes)
            reports[split] = Report(
                counts,
                official,
                lost,
                problems,
                remarks(raw),
                damaged(raw, problem_of),
                [q.id for q in raw.questions if is_lost(q, there, own)],
            )
            if not records or not kept:
                continue  # nothing to build; the report says why
            queries[split] = Split(_from(records), stamp(records), len(records))
            galleries[cls.GALLERY_SPLIT or split] = cls.gallery(kept, options)
            called = [
                {"id": i, "name": p.name, "categories": list(p.categories)}
                for i, p in enumerate(kept)
            ]
            names[cls.GALLERY_SPLIT or split] = Split(_from(called), stamp(called), len(called))
            if cls.REFERENCES:
                references[split] = cls.gallery(asked, options, others=False)
        made = {"gallery": galleries, "queries": queries, "names": names}
        made |= {"references": references} if cls.REFERENCES else {}
        return Survey(made, reports, skipped)

    @classmethod
    def counts(cls, records: Sequence[dict], kept: Sequence[Picture]) -> dict[str, int]:
        """What a report counts."""
        counts = {"queries": len(records), "gallery": len(kept)}
        if cls.COUNTED:
            per_query = Counter(record["category"] for record in records)
            counts |= {f"queries {name}": n for name, n in per_query.items()}
            names = (name for picture in kept for name in picture.categories)
            counts |= {f"gallery {name}": n for name, n in Counter(names).items()}
        return counts

    @classmethod
    def gallery(
        cls, pictures: Sequence[Picture], options: Options, *, others: bool = True
    ) -> Split:
        """The records of images that are all there; with the gallery's `others` of their fields."""
        link = options.images == "link"
        if link and (held := [p.path for p in pictures if not isinstance(p.path, Path)]):
            raise DataError(
                f"--images=link: {held[0]} is inside of another file, which cannot be linked. "
                "Leave the flag out, or unpack the images."
            )

        def records(start: int) -> Iterator[dict[str, Any]]:
            rest = pictures[start:]
            images = read_images((picture.path for picture in rest), options.decode == "build")
            for i, (picture, image) in enumerate(zip(rest, images, strict=True), start):
                held = links.make(picture.path, len(image)) if link else image
                record = {"id": i, "name": picture.name, "image": held}
                record["categories"] = list(picture.categories)
                yield record | (cls.of_bytes(picture, image) if others else {})

        parts = ([p.key, p.name, p.categories, p.box, p.path] for p in pictures)
        how = ["linked", *(str(p.path.absolute()) for p in pictures)] if link else []
        return Split(records, stamp(*parts, *how), len(pictures))


def check(raw: Raw) -> None:
    """Raises DataError if annotations contradict themselves: no missing image explains that."""
    keys: set[str] = set()
    for picture in raw.pictures:
        if picture.key in keys:
            raise DataError(f"{raw.gallery_file}: lists image {picture.key} twice. Get it again.")
        keys.add(picture.key)
    references = {picture.key for picture in raw.asked_of}
    check_ids(raw.questions)
    for question in raw.questions:
        for role, names, known in (
            ("reference", [question.reference], references),
            ("target", question.targets, keys),
            ("candidate", question.candidates, keys),
            ("soft target", question.soft or (), keys),
        ):
            if unknown := [name for name in names if name not in known]:
                raise DataError(
                    f"{question.where}: {role} {unknown[0]} is no image of {raw.gallery_file}; "
                    "do the files belong together?"
                )


def check_ids(questions: Sequence[Question]) -> None:
    """Raises DataError if two queries have one id."""
    seen: dict[int, str] = {}
    for question in questions:
        if question.id in seen:
            raise DataError(
                f"{question.where}: its id {question.id} is also that of {seen[question.id]}. "
                "Get the file again."
            )
        seen[question.id] = question.where


def resolve(
    questions: Sequence[Question],
    position: Mapping[str, int],
    references: Mapping[str, int] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Query records on a gallery of these images, and how much is lost for want of others.

    position: of the images that are there, by key; references: of those among the references,
    None = they are of the gallery. A query is lost with its reference or (first) target
    (`is_lost`). Other images it names are left out.
    """
    references = position if references is None else references
    records, lost = [], Counter({"queries": 0})

    def there(names: Sequence[str], what: str) -> list[int]:
        found = [position[name] for name in names if name in position]
        if len(found) < len(names):
            lost[what] += 1
        return found

    for question in questions:
        if is_lost(question, position, references):
            lost["queries"] += 1
            continue
        record = {
            "id": question.id,
            "reference": references[question.reference],
            "texts": list(question.texts),
            "targets": there(question.targets, "some targets of queries"),
            "candidates": there(question.candidates, "some candidates of queries"),
            "category": question.category,
            "aspects": list(question.aspects),
            **question.fields,
        }
        if question.soft is not None:
            soft = {position[k]: w for k, w in question.soft.items() if k in position}
            record |= {"soft_targets": list(soft), "soft_weights": list(soft.values())}
        records.append(record)
    return records, dict(lost)


def is_lost(question: Question, there: Mapping[str, Any], references: Mapping[str, Any]) -> bool:
    """Whether the query cannot be asked of these images."""
    return question.reference not in references or any(x not in there for x in question.targets[:1])


def remarks(raw: Raw) -> list[str]:
    """What is odd in the annotations and the names of the files, and yet no error."""
    found = renamings(raw.pictures)
    for question in raw.questions:
        odd = list(question.remarks)
        if not raw.references and question.reference in question.targets:
            odd.append(f"its reference {question.reference} is a ground truth")
        if empty := sum(not text.strip() for text in question.texts):
            odd.append(f"{empty} of its {len(question.texts)} caption(s) are empty")
        found += [f"{question.where}: {one}" for one in odd]
    return found


def renamings(pictures: Iterable[Picture]) -> list[str]:
    """A remark on those whose files are called otherwise than the authors say, if there are any."""
    renamed = [picture for picture in pictures if picture.renamed]
    if not renamed:
        return []
    example = f"such as {renamed[0].path.name} of image {renamed[0].name}"
    return [f"{len(renamed):,} image(s) have files of another case, suffix or prefix, {example}"]


def damaged(raw: Raw, problem_of: Mapping[Path, str | None]) -> list[dict[str, Any]]:
    """The images that are missing or unreadable, and the queries that are lost with each."""
    roles = {"gallery": raw.pictures, "reference": raw.references}
    bad = {
        (role, picture.key): picture
        for role, pictures in roles.items()
        for picture in pictures
        if problem_of[picture.path] is not None
    }
    asked: dict[tuple[str, str], list[int]] = {key: [] for key in bad}
    role = "reference" if raw.references else "gallery"
    for question in raw.questions:
        used = [(role, question.reference), *(("gallery", x) for x in question.targets[:1])]
        for key in dict.fromkeys(used):
            if key in bad:
                asked[key].append(question.id)
    return [
        {
            "image": picture.name,
            "file": str(picture.path),
            "problem": problem_of[picture.path],
            "queries": asked[key],
        }
        for key, picture in bad.items()
    ]


def _from(records: Sequence[dict[str, Any]]) -> Callable[[int], Sequence[dict[str, Any]]]:
    return lambda start: records[start:]


def absent(files: Sequence[Path]) -> AbsentError:
    """The error for a split without files."""
    names = ", ".join(map(str, files[:MAX_MISSING_NAMES]))
    return AbsentError(f"no {names}" + (" ..." if len(files) > MAX_MISSING_NAMES else ""))
