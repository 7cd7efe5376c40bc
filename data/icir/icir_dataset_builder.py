"""TFDS builder of i-CIR (Psomas et al., arXiv 2510.25387)."""

from collections.abc import Iterator
from pathlib import Path

from cir_jax.errors import DataError
from data.benchmark import BenchmarkBuilder, Picture, Question, Raw, absent, located
from data.source import tables


class Icir(BenchmarkBuilder):
    """i-CIR: 202 particular objects, each with its own database full of look-alikes."""

    BUILDER_CONFIGS = tables("gallery", "references", "queries", "names")
    REFERENCES = True
    OFFICIAL = {"test": {"queries": 1883, "instances": 202}}
    LICENSE = "CC BY-NC-SA 4.0"
    HELP = """
i-CIR: https://vrg.fel.cvut.cz/icir/icir_v1.0.0.tar.gz, unpacked. The folder holds
    query_files.csv, database_files.csv (image, text, instance; no header)
    query/..., database/...
The WebDataset shards of huggingface.co/datasets/billpsomas/icir are not read."""

    @classmethod
    def read(cls, source: Path, split: str) -> Raw:
        """See the base class."""
        asked, listed = source / "query_files.csv", source / "database_files.csv"
        if missing := [file for file in (asked, listed) if not file.is_file()]:
            raise absent(missing)
        instances: dict[str, list[str]] = {}  # image: instances, in the order of the list
        right: dict[tuple[str, str], list[str]] = {}  # instance, text: images
        for _, image, text, instance in _rows(listed):
            own = instances.setdefault(image, [])
            if instance not in own:
                own.append(instance)
            right.setdefault((instance, text), []).append(image)
        pictures = [
            located(image, image, _paths(source, image), tuple(own))
            for image, own in instances.items()
        ]
        references: dict[str, Picture] = {}
        questions = []
        for number, (where, image, text, instance) in enumerate(_rows(asked)):
            if (instance, text) not in right:
                raise DataError(
                    f"{where}: no image of {listed} is of {instance!r} and {text!r}; do the files "
                    "belong together?"
                )
            references.setdefault(image, located(image, image, _paths(source, image)))
            targets = tuple(dict.fromkeys(right[instance, text]))
            questions.append(Question(where, number, image, (text,), targets, category=instance))
        counted = {"instances": len({question.category for question in questions})}
        return Raw(pictures, questions, listed, notes=counted, references=list(references.values()))


def _rows(file: Path) -> Iterator[tuple[str, str, str, str]]:
    """Place, image, text and instance of each line, read as by the released code: split at commas,
    what follows left out."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason}). Get it again.") from error
    for number, line in enumerate(lines, 1):
        parts = [part.strip() for part in line.split(",")]
        if len(parts) < 3 or not parts[0]:
            raise DataError(
                f"{file} line {number}: {line!r:.80}, expected image, text and instance. "
                "Get it again."
            )
        yield f"{file} line {number}", parts[0], parts[1], parts[2]


def _paths(source: Path, image: str) -> list[Path]:
    """The lists name images from the folder above, the archive may be unpacked under any name."""
    inside = Path(image)
    below = Path(*inside.parts[1:]) if len(inside.parts) > 1 else inside
    return [source / below, source / inside, source.parent / inside]
