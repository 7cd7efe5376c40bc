"""TFDS builders of M-BEIR's copies of CIRR and FashionIQ (UniIR, arXiv 2311.17136).

As mteb's datasets of huggingface.co have them: Parquet files of the configurations `query`,
`corpus` and `qrels`, images inside.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cir_jax.errors import DataError
from data import formats, progress
from data.benchmark import TEXT, BenchmarkBuilder, Picture, Question, Raw, absent
from data.held import Held
from data.source import parallel, tables

ROLES = {  # configuration -> how the names of its files, or of their folder, begin
    "corpus": ("corpus",),
    "query": ("query", "queries"),
    "qrels": ("qrels", "default"),
}
ID = ("id", "_id")  # mteb reads both


class Mbeir(BenchmarkBuilder, skip_registration=True):
    """A dataset of M-BEIR with its own pool of images, task 7: image and text find an image."""

    BUILDER_CONFIGS = tables("gallery", "references", "queries", "names")
    REFERENCES = True
    LINKS = False
    QUERY_FIELDS = {"qid": TEXT}

    @classmethod
    def read(cls, source: Path, split: str) -> Raw:
        """See the base class."""
        files = _files(source)
        if missing := [source / f"{role}-*.parquet" for role in ROLES if not files[role]]:
            raise absent(missing)
        pictures = [
            Picture(key, _name(path, key), held)
            for key, path, held in _images(files["corpus"], cls.name)
        ]
        right: dict[str, list[str]] = {}
        where: dict[str, str] = {}
        for item in formats.rows(
            files["qrels"],
            {"query": ("query-id",), "image": ("corpus-id",), "score": ("score",)},
        ):
            row = formats.row(item)
            if row["score"] > 0:
                right.setdefault(str(row["query"]), []).append(str(row["image"]))
                where.setdefault(str(row["query"]), item.where)
        asked = _images(files["query"], cls.name)
        texts = [
            (item.where, str(formats.row(item)["text"]))
            for item in formats.rows(files["query"], {"text": ("text",)})
        ]
        # an image of several queries is kept once: who reads them sees the same bytes
        digests = _digests([held for *_, held in asked], cls.name)
        references: dict[str, Picture] = {}
        questions = []
        for number, ((key, path, held), (place, text), digest) in enumerate(
            zip(asked, texts, digests, strict=True)
        ):
            references.setdefault(digest, Picture(digest, _name(path, key), held))
            targets = tuple(dict.fromkeys(right.pop(key, ())))
            if targets:
                questions.append(
                    Question(place, number, digest, (text,), targets, fields={"qid": key})
                )
        if right:
            key = next(iter(right))
            raise DataError(
                f"{where[key]}: query {key} is in no file of queries of {source}; do the files "
                "belong together?"
            )
        unjudged = len(asked) - len(questions)
        notes = {"queries without a right answer, left out": unjudged} if unjudged else {}
        return Raw(pictures, questions, source, notes=notes, references=list(references.values()))


class CirrMbeir(Mbeir):
    """CIRR as M-BEIR has it: the val queries, and the images of all splits, 256 pixels high."""

    OFFICIAL = {"test": {"queries": 4170, "gallery": 21551}}
    LICENSE = "Annotations: MIT; images: terms of NLVR2"
    HELP = """
M-BEIR's CIRR: `huggingface-cli download mteb/mbeir_cirr_task7 --repo-type dataset --local-dir DIR`.
The folder holds
    query-*.parquet, corpus-*.parquet, qrels-*.parquet (or in folders so called)"""


class FashioniqMbeir(Mbeir):
    """FashionIQ as M-BEIR has it: the val queries of all categories in one pool of all images."""

    OFFICIAL = {"test": {"queries": 6003, "gallery": 74381}}
    LICENSE = "Annotations: Community Data License Agreement; images: terms of their shops"
    HELP = """
M-BEIR's FashionIQ: `huggingface-cli download mteb/mbeir_fashioniq_task7 --repo-type dataset
--local-dir DIR`. The folder holds
    query-*.parquet, corpus-*.parquet, qrels-*.parquet (or in folders so called)"""


def _files(source: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {role: [] for role in ROLES}
    for file in sorted(source.rglob("*.parquet")):
        inside = file.relative_to(source)
        if any(part.startswith(".") for part in inside.parts):  # of the hub's client
            continue
        for role, starts in ROLES.items():
            if any(part.startswith(starts) for part in (inside.name, *inside.parts[:-1])):
                found[role].append(file)
                break
    return found


def _images(files: Sequence[Path], dataset: str) -> list[tuple[str, str, Held]]:
    """Id, name of the image file ("" = none) and place of the image of each row."""
    found = []
    for file in files:
        names = formats.parquet_columns(file)
        column = next((name for name in ID if name in names), None)
        if column is None or "image" not in names:
            raise DataError(
                f"{file}: has the columns {', '.join(names)}, expected {ID[0]} and image. Is it of "
                f"{dataset}?"
            )
        table = formats.parquet(file)
        kind = table.schema_arrow.field("image").type
        if {"bytes", "path"} - {field.name for field in getattr(kind, "fields", ())}:
            raise DataError(f"{file}: image is {kind}, expected bytes and path. Get it again.")
        read = table.read(columns=[column, "image.path"])
        paths = read.column("image").to_pylist()
        for row, (key, image) in enumerate(
            zip(read.column(column).to_pylist(), paths, strict=True)
        ):
            found.append((str(key), (image or {}).get("path") or "", Held(file, row)))
    for key, count in Counter(key for key, *_ in found).items():
        if count > 1:
            raise DataError(f"{files[0]}: id {key} is there {count} times. Get it again.")
    return found


def _name(path: str, key: str) -> str:
    return Path(path).stem if path else key


def _digests(images: Sequence[Held], dataset: str) -> list[str]:
    """What tells the images apart; of one that is not there, its place."""

    def digest(image: Held) -> str:
        try:
            return hashlib.sha256(image.read_bytes()).hexdigest()[:24]
        except FileNotFoundError:
            return str(image)

    label = f"reading the images of {dataset}'s queries"
    return list(progress(parallel(digest, images), len(images), label))
