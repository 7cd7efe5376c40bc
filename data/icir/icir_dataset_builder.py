"""TFDS builder of i-CIR (Psomas et al., arXiv 2510.25387)."""

from collections.abc import Iterator
from pathlib import Path

from cir_jax.errors import DataError
from data import tars
from data.benchmark import BenchmarkBuilder, Picture, Question, Raw, absent, located
from data.corpus import Unusable
from data.held import Archived, Place
from data.source import tables

EXTENSIONS = ("jpg", "png", "jpeg", "webp")


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
or `huggingface-cli download billpsomas/icir --repo-type dataset --local-dir DIR`. It holds
    webdataset/query/query-000000.tar ..., webdataset/database/database-000000.tar ..."""

    @classmethod
    def read(cls, source: Path, split: str) -> Raw:
        """See the base class."""
        lists = source / "query_files.csv", source / "database_files.csv"
        shards = source / "webdataset" / "query", source / "webdataset" / "database"
        if all(any(folder.glob("*.tar")) for folder in shards):
            (asked, listed), read = shards, _samples
        elif missing := [file for file in lists if not file.is_file()]:
            raise absent(missing)
        else:
            (asked, listed), read = lists, _rows
        instances: dict[str, list[str]] = {}  # image: instances, in the order of the list
        right: dict[tuple[str, str], list[str]] = {}  # instance, text: images
        places: dict[str, Place | None] = {}
        for _, image, text, instance, place in read(listed):
            own = instances.setdefault(image, [])
            if instance not in own:
                own.append(instance)
            right.setdefault((instance, text), []).append(image)
            places.setdefault(image, place)
        pictures = [
            _picture(source, image, places[image], tuple(own)) for image, own in instances.items()
        ]
        references: dict[str, Picture] = {}
        questions = []
        for number, (where, image, text, instance, place) in enumerate(read(asked)):
            if (instance, text) not in right:
                raise DataError(
                    f"{where}: no image of {listed} is of {instance!r} and {text!r}; do the files "
                    "belong together?"
                )
            if image not in references:
                references[image] = _picture(source, image, place)
            targets = tuple(dict.fromkeys(right[instance, text]))
            questions.append(Question(where, number, image, (text,), targets, category=instance))
        counted = {"instances": len({question.category for question in questions})}
        return Raw(pictures, questions, listed, notes=counted, references=list(references.values()))


Row = tuple[str, str, str, str, Place | None]
"""Where it stands, image, text, instance, where the image lies (None = to be looked for)."""


def _rows(file: Path) -> Iterator[Row]:
    """The lines of a list, read as by the released code: split at commas, what follows left out."""
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
        yield f"{file} line {number}", parts[0], parts[1], parts[2], None


def _samples(folder: Path) -> Iterator[Row]:
    """The samples of the hub's shards: an image, and JSON with img_path, text and instance."""
    for item in tars.samples(sorted(folder.glob("*.tar"))):
        try:
            sample = tars.Sample(item.value)
            image = next((name for name in EXTENSIONS if name in sample.columns), None)
            if image is None:
                raise Unusable(f"holds {', '.join(sample.columns)}, expected an image")
            values = [sample.text(f"json.{name}") for name in ("img_path", "text", "instance")]
        except (Unusable, KeyError) as error:
            raise DataError(f"{item.where}: no sample of i-CIR ({error}). Get it again.") from error
        yield item.where, *values, Archived(sample.member(image))


def _picture(source: Path, image: str, place: Place | None, own: tuple[str, ...] = ()) -> Picture:
    if place is not None:
        return Picture(image, image, place, own)
    # the lists name images from the folder above, and the archive may be unpacked under any name
    inside = Path(image)
    below = Path(*inside.parts[1:]) if len(inside.parts) > 1 else inside
    return located(image, image, [source / below, source / inside, source.parent / inside], own)
