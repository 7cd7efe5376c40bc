"""TFDS builder of COCO caption retrieval with the ground truths of COCO, CxC and ECCV Caption.

All three come from the JSON files of the package of ECCV Caption (arXiv 2204.03359).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cir_jax.errors import DataError
from data.benchmark import (
    POSITIONS,
    TEXT,
    TEXTS,
    AbsentError,
    Picture,
    absent,
    located,
    renamings,
)
from data.source import (
    Options,
    Report,
    SourceBuilder,
    Split,
    Survey,
    field,
    image_problems,
    read_images,
    read_json,
    stamp,
    tables,
)

TRUTHS = ("original", "cxc", "eccv")
DIRECTIONS = {"i2t": "image_to_caption", "t2i": "caption_to_image"}
SPLIT = "test"
PER_IMAGE = 5  # captions; further ones are not used
ORDER = "coco_test_ids.npy"  # ids of the 25,000 captions, in the order of the 1k folds


class CocoCaptions(SourceBuilder):
    """COCO captions: Karpathy's 5,000 test images, judged by COCO, CxC and ECCV Caption."""

    BUILDER_CONFIGS = tables("gallery", "captions", *TRUTHS)
    VERSION = tfds.core.Version("1.0.0")
    OPTIONAL = TRUTHS[1:]
    LICENSE = "Captions: CC BY 4.0; images: terms of COCO and Flickr; CxC and ECCV: see README"
    HELP = """
COCO captions: images ("2014 Val images") and captions ("2014 Train/Val annotations") from
cocodataset.org, the split of Karpathy (dataset_coco.json of caption_datasets.zip,
cs.stanford.edu/people/karpathy/deepimagesent), relevance from github.com/naver-ai/eccv-caption
(folder eccv_caption/data). The folder holds
    val2014/COCO_val2014_000000000042.jpg ...
    dataset_coco.json, or annotations/captions_val2014.json
    eccv_caption/data/{original,cxc,eccv}_{image_to_caption,caption_to_image}.json
    eccv_caption/data/coco_test_ids.npy"""

    @classmethod
    def split_names(cls) -> tuple[str, ...]:
        """See the base class."""
        return (SPLIT,)

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        """Relevance: positions in `gallery` (images) and `captions`; see the README."""
        if table == "gallery":
            return {"name": TEXT, "image": TEXT, "categories": TEXTS}
        if table == "captions":
            return {"name": TEXT, "text": TEXT, "image": np.int32}
        return {
            "direction": TEXT,
            "query": np.int32,
            "targets": POSITIONS,
            "outside": np.int32,  # positives that are not among the images or captions here
        }

    @classmethod
    def survey(cls, source: Path, options: Options) -> Survey:
        """Reads captions and ground truths, and looks for the images."""
        package = source / "eccv_caption"
        package = package / "data" if (package / "data").is_dir() else package
        try:
            captions = _captions(source, package)
        except AbsentError as reason:
            return Survey({}, {}, {SPLIT: str(reason)})
        images = list(dict.fromkeys(image for _, image, _ in captions))
        pictures = {image: _picture(source, image) for image in images}
        paths = {image: picture.path for image, picture in pictures.items()}
        label = f"looking at the images of {cls.name}/{SPLIT}"
        found = image_problems(list(paths.values()), options.decode == "survey", label)
        problem = dict(zip(images, found, strict=True))
        kept = [image for image in images if problem[image] is None]
        there = set(kept)
        usable = [caption for caption in captions if caption[1] in there]

        problems = [f"{paths[image]}: {problem[image]}" for image in images if problem[image]]
        position = {image: i for i, image in enumerate(kept)}
        texts = [
            {"id": i, "name": str(caption), "text": text, "image": position[image]}
            for i, (caption, image, text) in enumerate(usable)
        ]
        splits = {
            "gallery": _gallery([pictures[image] for image in kept], options.decode == "build"),
            "captions": _listed(texts),
        }
        ids = {"i2t": position, "t2i": {c[0]: i for i, c in enumerate(usable)}}
        everything = {"i2t": set(images), "t2i": {c[0] for c in captions}}
        skipped = {}
        for truth in TRUTHS:
            files = {d: package / f"{truth}_{name}.json" for d, name in DIRECTIONS.items()}
            missing = [file for file in files.values() if not file.is_file()]
            if missing and truth in cls.OPTIONAL:
                skipped[f"table {truth}"] = str(absent(missing))
            else:
                relevant = _own(captions) if missing else _read(files, everything)
                splits[truth] = _listed(list(_relevance(relevant, ids)))
        report = Report(
            {"gallery": len(kept), "captions": len(usable)},
            {"gallery": 5000, "captions": 25000},
            {"gallery": len(images) - len(kept), "captions": len(captions) - len(usable)},
            problems,
            renamings(pictures.values()),
        )
        tables_ = {table: {SPLIT: split} for table, split in splits.items()}
        return Survey(tables_ if usable else {}, {SPLIT: report}, skipped)


Caption = tuple[int, int, str]  # its id, the id of its image, its text


def _captions(source: Path, package: Path) -> list[Caption]:
    """The captions of the test, in order. Raises AbsentError when there are none."""
    karpathy = source / "dataset_coco.json"
    coco = source / "annotations" / "captions_val2014.json"
    order = package / ORDER
    if karpathy.is_file():
        captions = _of_karpathy(karpathy)
    elif coco.is_file() and order.is_file():
        captions = _of_coco(coco)
    else:
        raise absent([karpathy, coco if order.is_file() else order])
    if not order.is_file():
        return _first_five(captions)
    try:
        ids = [int(value) for value in np.load(order, allow_pickle=False).reshape(-1)]
    except (OSError, ValueError) as error:
        raise DataError(f"{order}: not readable ({error}). Get it again.") from error
    by_id = {caption[0]: caption for caption in captions}
    if len(set(ids)) != len(ids):
        raise DataError(f"{order}: lists a caption twice. Get it again.")
    if unknown := [i for i in ids if i not in by_id]:
        where = karpathy if karpathy.is_file() else coco
        raise DataError(f"{order}: caption {unknown[0]} is not in {where}; do they fit each other?")
    return [by_id[i] for i in ids]


def _of_karpathy(file: Path) -> list[Caption]:
    captions = []
    for i, image in enumerate(field(read_json(file, dict), "images", list, str(file))):
        where = f"{file} image {i}"
        if field(image, "split", str, where) != "test":
            continue
        number = field(image, "cocoid", int, where)
        for sentence in field(image, "sentences", list, where):
            text = field(sentence, "raw", str, where)
            captions.append((field(sentence, "sentid", int, where), number, text))
    return _distinct(captions, file)


def _of_coco(file: Path) -> list[Caption]:
    captions = []
    for i, entry in enumerate(field(read_json(file, dict), "annotations", list, str(file))):
        where = f"{file} annotation {i}"
        numbers = [field(entry, key, int, where) for key in ("id", "image_id")]
        captions.append((*numbers, field(entry, "caption", str, where)))
    return _distinct(captions, file)


def _distinct(captions: list[Caption], file: Path) -> list[Caption]:
    seen: set[int] = set()
    for number, _, _ in captions:
        if number in seen:
            raise DataError(f"{file}: caption {number} is there twice. Get it again.")
        seen.add(number)
    return captions


def _first_five(captions: Sequence[Caption]) -> list[Caption]:
    count: dict[int, int] = {}
    kept = []
    for caption in captions:
        count[caption[1]] = count.get(caption[1], 0) + 1
        if count[caption[1]] <= PER_IMAGE:
            kept.append(caption)
    return kept


def _picture(source: Path, image: int) -> Picture:
    names = (f"val2014/COCO_val2014_{image:012d}.jpg", f"val2017/{image:012d}.jpg",
             f"train2017/{image:012d}.jpg")  # fmt: skip
    paths = [source / name for name in names]
    picture = located(str(image), paths[0].stem, paths)
    called = next(path.stem for path in paths if path.parent == picture.path.parent)
    return dataclasses.replace(picture, name=called)  # as the folder that has it says


def _gallery(pictures: Sequence[Picture], decode: bool) -> Split:
    def records(start: int) -> Iterator[dict[str, Any]]:
        rest = (picture.path for picture in pictures[start:])
        for i, image in enumerate(read_images(rest, decode), start):
            yield {"id": i, "name": pictures[i].name, "image": image, "categories": []}

    return Split(records, stamp(*(picture.path for picture in pictures)), len(pictures))


def _listed(records: Sequence[dict[str, Any]]) -> Split:
    return Split(lambda start: records[start:], stamp(records), len(records))


Relevance = dict[str, dict[int, list[int]]]  # direction: id of a query: ids of its positives


def _own(captions: Sequence[Caption]) -> Relevance:
    """COCO's: a caption belongs to its image, and to no other."""
    relevant: Relevance = {"i2t": {}, "t2i": {}}
    for number, image, _ in captions:
        relevant["i2t"].setdefault(image, []).append(number)
        relevant["t2i"][number] = [image]
    return relevant


def _read(files: Mapping[str, Path], everything: Mapping[str, set[int]]) -> Relevance:
    """What the files of both directions say. everything: the ids of queries there should be."""
    relevant: Relevance = {}
    for direction, file in files.items():
        relevant[direction] = {}
        for key, values in read_json(file, dict).items():
            where = f"{file} query {key}"
            if not key.isdecimal() or int(key) not in everything[direction]:
                raise DataError(f"{where}: is no image or caption of the test split.")
            try:
                relevant[direction][int(key)] = [int(value) for value in values]
            except (TypeError, ValueError):
                raise DataError(f"{where}: holds {values!r:.80}, expected a list of ids.") from None
    return relevant


def _relevance(
    relevant: Relevance, positions: Mapping[str, Mapping[int, int]]
) -> Iterator[dict[str, Any]]:
    """The records. positions: of the images (i2t) and captions (t2i) that are there, by id.

    Queries without any positive that is there are left out.
    """
    count = 0
    for direction, other in (("i2t", "t2i"), ("t2i", "i2t")):
        for query, positives in relevant[direction].items():
            targets = [positions[other][i] for i in positives if i in positions[other]]
            if query in positions[direction] and targets:
                yield {
                    "id": count,
                    "direction": direction,
                    "query": positions[direction][query],
                    "targets": targets,
                    "outside": len(positives) - len(targets),
                }
                count += 1
