"""TFDS builder of COCO object composition (Pic2Word, arXiv 2302.03084).

The released preparation chooses one instance per image without a seed, so its queries cannot be had
again. Here the choice is a function of SEED and the image's id, and of nothing else.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cir_jax.errors import DataError
from cir_jax.input.images import decode as decode_image
from data.benchmark import POSITIONS, TEXT, TEXTS, Picture, absent, located, renamings
from data.source import (
    Options,
    Report,
    SourceBuilder,
    Split,
    Survey,
    field,
    image_problems,
    parallel,
    read_images,
    read_json,
    stamp,
    tables,
)

SEED = 2302  # of the choice of instances; the class's docstring records it with the tables
SMALLEST, LARGEST = 0.05, 0.5  # area of the box: in pixels (sic), and of the image
SPLIT = "val"


class Instance(NamedTuple):
    """The object that is asked for, of one image."""

    image_id: int
    size: tuple[int, int]  # width, height of the image
    box: tuple[float, ...]  # left, top, width, height
    segmentation: Any  # COCO's polygons or run lengths
    query_class: str
    classes: tuple[str, ...]  # the other ones in the image


class CocoObject(SourceBuilder):
    """COCO object composition: an object and the names of the other classes find their image.

    Objects chosen with seed 2302.
    """

    BUILDER_CONFIGS = tables("gallery", "references", "queries")
    VERSION = tfds.core.Version("1.0.0")
    LICENSE = "Annotations: CC BY 4.0; images: terms of COCO and Flickr"
    HELP = """
COCO 2017 from cocodataset.org: "2017 Val images" and "2017 Train/Val annotations". The folder holds
    annotations/instances_val2017.json
    val2017/000000000139.jpg ..."""

    @classmethod
    def split_names(cls) -> tuple[str, ...]:
        """See the base class."""
        return (SPLIT,)

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        """Queries: texts as in the released code, the query's class first; see the README."""
        if table != "queries":
            return {"name": TEXT, "image": TEXT, "categories": TEXTS}
        return {
            "reference": np.int32,  # position in `references`
            "texts": TEXTS,
            "targets": POSITIONS,  # in `gallery`
            "candidates": POSITIONS,
            "category": TEXT,
            "aspects": TEXTS,
            "query_class": TEXT,
            "classes": TEXTS,
        }

    @classmethod
    def survey(cls, source: Path, options: Options) -> Survey:
        """Chooses the instances and looks for their images."""
        file = source / "annotations" / "instances_val2017.json"
        if not file.is_file():
            return Survey({}, {}, {SPLIT: str(absent([file]))})
        _masks()  # fail now if it cannot be imported
        annotations = read_json(file, dict)
        chosen = choose(annotations, file)
        pictures = [
            located(name, name, [source / "val2017" / f"{name}.jpg"])
            for name in (f"{instance.image_id:012d}" for instance in chosen)
        ]
        paths = [picture.path for picture in pictures]
        label = f"looking at the images of {cls.name}/{SPLIT}"
        problems = image_problems(paths, options.decode == "survey", label)
        kept = [
            pair
            for pair, problem in zip(zip(chosen, pictures, strict=True), problems, strict=True)
            if problem is None
        ]
        lost = len(chosen) - len(kept)
        listed = len(annotations["images"])
        report = Report(
            {
                "images listed": listed,
                "queries": len(kept),
                "gallery": len(kept),
            },
            {"images listed": 5000},
            {"queries": lost, "gallery": lost},
            [
                f"{path}: {problem}"
                for path, problem in zip(paths, problems, strict=True)
                if problem
            ],
            renamings(pictures),
        )
        splits = {table: {SPLIT: split} for table, split in _tables(kept, options).items()}
        return Survey(splits if kept else {}, {SPLIT: report})


def choose(annotations: Mapping[str, Any], file: Path) -> list[Instance]:
    """One instance per image, by id of the image; images without a suitable one are left out.

    Crowds count as instances, as in the released code. Raises DataError naming the record.
    """
    classes = {
        field(entry, "id", int, f"{file} category {i}"): field(
            entry, "name", str, f"{file} category {i}"
        )
        for i, entry in enumerate(field(annotations, "categories", list, str(file)))
    }
    sizes = {}
    for i, entry in enumerate(field(annotations, "images", list, str(file))):
        where = f"{file} image {i}"
        size = field(entry, "width", int, where), field(entry, "height", int, where)
        sizes[field(entry, "id", int, where)] = size
    of_image: dict[int, list[tuple[str, Any]]] = {}
    for i, entry in enumerate(field(annotations, "annotations", list, str(file))):
        where = f"{file} annotation {i}"
        image, category = (field(entry, key, int, where) for key in ("image_id", "category_id"))
        if image not in sizes or category not in classes:
            raise DataError(
                f"{where}: image_id {image} or category_id {category} is not listed in the file. "
                "Get it again."
            )
        box = field(entry, "bbox", list, where)
        if len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
            raise DataError(f"{where}: bbox is {box!r:.80}, expected [x, y, width, height].")
        field(entry, "segmentation", (list, dict), where)
        of_image.setdefault(image, []).append((classes[category], entry))
    chosen = []
    for image, entries in sorted(of_image.items()):
        width, height = sizes[image]
        suitable = [
            (name, entry)
            for name, entry in entries
            if SMALLEST < entry["bbox"][2] * entry["bbox"][3] < LARGEST * width * height
        ]
        if suitable:
            name, entry = suitable[_draw(image, len(suitable))]
            others = tuple(n for n in dict.fromkeys(n for n, _ in entries) if n != name)
            box = tuple(entry["bbox"])
            chosen.append(Instance(image, sizes[image], box, entry["segmentation"], name, others))
    return chosen


def _draw(image_id: int, count: int) -> int:
    """A number below `count` that depends on nothing but SEED and the image."""
    digest = hashlib.sha256(f"coco_object {SEED} {image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % count


def _tables(kept: Sequence[tuple[Instance, Picture]], options: Options) -> dict[str, Split]:
    decode = options.decode == "build"
    pictures = [picture for _, picture in kept]
    queries = [_query(i, instance) for i, (instance, _) in enumerate(kept)]
    files = stamp(*(picture.path for picture in pictures))

    def records(start: int, cut: bool) -> Iterator[dict[str, Any]]:
        images = read_images((picture.path for picture in pictures[start:]), decode)
        if cut:
            images = parallel(_object_of, zip(images, kept[start:], strict=True))
        for i, image in enumerate(images, start):
            yield {"id": i, "name": pictures[i].name, "image": image, "categories": []}

    objects = stamp(files, *(list(instance) for instance, _ in kept))
    return {
        "queries": Split(lambda start: queries[start:], stamp(queries), len(kept)),
        "gallery": Split(lambda start: records(start, False), files, len(kept)),
        "references": Split(lambda start: records(start, True), objects, len(kept)),
    }


def _object_of(item: tuple[bytes, tuple[Instance, Picture]]) -> bytes:
    image, (instance, picture) = item
    return object_only(image, instance, str(picture.path))


def _query(i: int, instance: Instance) -> dict[str, Any]:
    return {
        "id": i,
        "reference": i,
        # without other classes it ends in "and ", as in the released code
        "texts": [f"{instance.query_class} and {' and '.join(instance.classes)}"],
        "targets": [i],
        "candidates": [],
        "category": "",
        "aspects": [],
        "query_class": instance.query_class,
        "classes": list(instance.classes),
    }


def object_only(image: bytes, instance: Instance, what: str) -> bytes:
    """PNG of the instance's box, white outside its mask. Raises DataError naming `what`.

    The box is cut at whole pixels, towards zero, as in the released code (which, other than here,
    went through a JPEG file of the masked image).
    """
    decoded = decode_image(image, what)
    pixels = np.asarray(decoded if decoded.mode in ("L", "RGB") else decoded.convert("RGB"))
    height, width = pixels.shape[:2]
    if (width, height) != instance.size:
        raise DataError(
            f"{what}: {width} x {height} pixels, the annotations say "
            f"{instance.size[0]} x {instance.size[1]}. Is it another image?"
        )
    inside = mask(instance.segmentation, width, height, what)
    pixels = np.where(inside.reshape(inside.shape + (1,) * (pixels.ndim - 2)), pixels, 255)
    x, y, w, h = instance.box
    left, top, right, bottom = int(x), int(y), int(x + w), int(y + h)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    png = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).crop((left, top, right, bottom)).save(png, "PNG")
    return png.getvalue()


def mask(segmentation: Any, width: int, height: int, what: str) -> np.ndarray:
    """bool[height, width] of polygons or run lengths, drawn by COCO's own code."""
    coco = _masks()
    try:
        if isinstance(segmentation, list):  # polygons, possibly of several parts
            runs = coco.merge(coco.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            runs = coco.frPyObjects(segmentation, height, width)
        else:
            runs = segmentation
        return coco.decode(runs).astype(bool)
    except Exception as error:  # of its C code, for anything malformed
        raise DataError(f"{what}: segmentation cannot be drawn ({error}).") from error


def _masks() -> Any:
    # Borders of polygons drawn by anything else (PIL, say) differ, and so would the images.
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(
            "coco_object draws masks with COCO's own code: pip install 'cir_jax[coco]'"
        ) from error
    return mask
