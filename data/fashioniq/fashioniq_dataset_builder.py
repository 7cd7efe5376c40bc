"""TFDS builder of FashionIQ (Wu et al., arXiv 1905.12794)."""

from collections.abc import Container
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError
from data.benchmark import BenchmarkBuilder, Question, Raw, absent, located
from data.source import field, read_json, strings

CATEGORIES = ("dress", "shirt", "toptee")


def _official(
    queries: tuple[int, ...], per_category: tuple[int, ...], gallery: int
) -> dict[str, int]:
    counts = {"queries": sum(queries), "gallery": gallery}
    counts |= {f"queries {c}": n for c, n in zip(CATEGORIES, queries, strict=True)}
    return counts | {f"gallery {c}": n for c, n in zip(CATEGORIES, per_category, strict=True)}


class Fashioniq(BenchmarkBuilder):
    """FashionIQ: clothes of three categories, each with its own gallery; two captions per query."""

    OFFICIAL = {
        "train": _official((5985, 5988, 6027), (11452, 19036, 16121), 45429),
        "val": _official((2017, 2038, 1961), (3817, 6346, 5373), 15415),
        "test": _official((2024, 2038, 2056), (3818, 6346, 5374), 15417),
    }
    COUNTED = True
    LICENSE = "Annotations: Community Data License Agreement; images: terms of their shops"
    HELP = """
FashionIQ: annotations from github.com/XiaoxiaoGuo/fashion-iq. Its image addresses are dead for the
most part; its issues name copies, such as the dataset Plachta/FashionIQ of huggingface.co. The
folder holds
    captions/cap.{dress,shirt,toptee}.{train,val,test}.json
    image_splits/split.{dress,shirt,toptee}.{train,val,test}.json
    images/B0084Y8XIU.jpg ... (or .png)"""

    @classmethod
    def read(cls, source: Path, split: str) -> Raw:
        """See the base class."""
        files = {
            category: (
                source / "captions" / f"cap.{category}.{split}.json",
                source / "image_splits" / f"split.{category}.{split}.json",
            )
            for category in CATEGORIES
        }
        missing = [file for pair in files.values() for file in pair if not file.is_file()]
        if len(missing) == 2 * len(CATEGORIES):
            raise absent(missing)
        listed: dict[str, list[str]] = {}  # ASIN: categories, in the order of the lists
        questions: list[Question] = []
        for category, (captions, names) in files.items():
            if captions in missing or names in missing:
                continue
            own = dict.fromkeys(_names(names))  # a set that keeps the order
            for name in own:
                listed.setdefault(name, []).append(category)
            first, labelled = len(questions), split != "test"
            for i, entry in enumerate(read_json(captions, list)):
                question = _question(entry, f"{captions} record {i}", first + i, category, labelled)
                _check_category(question, own, names)
                questions.append(question)
        pictures = [
            located(name, name, _paths(source, name), tuple(categories))
            for name, categories in listed.items()
        ]
        return Raw(pictures, questions, source / "image_splits", missing)


def _names(file: Path) -> list[str]:
    names = read_json(file, list)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise DataError(f"{file}: lists {wrong[0]!r:.80}, expected names of images.")
    if len(set(names)) != len(names):
        raise DataError(f"{file}: lists an image twice. Get it again.")
    return names


def _paths(source: Path, name: str) -> list[Path]:
    return [source / "images" / f"{name}{suffix}" for suffix in (".jpg", ".png")]


def _question(entry: Any, where: str, number: int, category: str, labelled: bool) -> Question:
    texts = strings(entry, "captions", where)
    if len(texts) != 2:
        raise DataError(f"{where}: captions is {texts!r:.80}, expected two texts.")
    return Question(
        where,
        number,
        reference=field(entry, "candidate", str, where),
        texts=texts,
        targets=(field(entry, "target", str, where),) if labelled else (),
        category=category,
    )


def _check_category(question: Question, names: Container[str], file: Path) -> None:
    for name in (question.reference, *question.targets):
        if name not in names:
            raise DataError(
                f"{question.where}: image {name} is not listed in {file}; do the files belong "
                "together?"
            )
