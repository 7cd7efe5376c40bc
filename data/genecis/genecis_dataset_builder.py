"""TFDS builder of GeneCIS (Vaze et al., arXiv 2306.07969)."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cir_jax.errors import DataError
from cir_jax.input import images
from data.benchmark import BenchmarkBuilder, Picture, Question, Raw, absent, located
from data.source import field, read_json

TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
DILATION = 0.7  # DILATION of the released datasets/vaw_dataset.py
WHOLE = (0, 0, 0, 0)  # `crop` of images that are used whole


class Genecis(BenchmarkBuilder):
    """GeneCIS: four tasks, one word per query, each query with 10 or 15 candidates of its own."""

    # Queries of the attribute tasks are not counted: their files could not be verified.
    OFFICIAL = {"val": {"queries focus_object": 1960, "queries change_object": 1960}}
    COUNTED = True
    GALLERY_FIELDS = {"crop": tfds.features.Tensor(shape=(4,), dtype=np.int32)}
    LICENSE = "Annotations: CC BY-NC 4.0; images: terms of COCO and Visual Genome"
    HELP = """
GeneCIS: annotations from github.com/facebookresearch/genecis, images of COCO's val2017
(cocodataset.org) and Visual Genome 1.2 (visualgenome.org; both parts). The folder holds
    genecis/{focus_attribute,change_attribute,focus_object,change_object}.json
    val2017/000000000139.jpg ...
    VG_100K_all/1.jpg ... (or VG_100K/ and VG_100K_2/)"""

    @classmethod
    def read(cls, source: Path, split: str) -> Raw:
        """See the base class."""
        root = source / "genecis" if (source / "genecis").is_dir() else source
        files = {task: root / f"{task}.json" for task in TASKS}
        missing = [file for file in files.values() if not file.is_file()]
        if len(missing) == len(TASKS):
            raise absent(missing)
        pictures: dict[str, Picture] = {}
        questions: list[Question] = []
        notes: dict[str, int] = {}
        for task, file in files.items():
            if file in missing:
                continue
            entries, unusual = _usual(file)
            if unusual:
                notes[f"records of {task} left out for their number of candidates"] = unusual
            for i, entry in entries:
                where = f"{file} record {i}"
                own = [
                    _picture(source, value, task.endswith("attribute"), where)
                    for value in (
                        field(entry, "reference", dict, where),
                        field(entry, "target", dict, where),
                        *field(entry, "gallery", list, where),
                    )
                ]
                pictures |= {picture.key: picture for picture in own if picture.key not in pictures}
                reference, *candidates = (picture.key for picture in own)
                questions.append(
                    Question(
                        where,
                        len(questions),
                        reference=reference,
                        texts=(field(entry, "condition", str, where),),
                        targets=(candidates[0],),
                        # one query of change_object lists its target as distractor, too; with ties
                        # for the first, the copy never changes the rank of the target
                        candidates=tuple(dict.fromkeys(candidates)),
                        category=task,
                    )
                )
        return Raw(list(pictures.values()), questions, root, missing, notes)

    @classmethod
    def of_bytes(cls, picture: Picture, image: bytes) -> dict[str, Any]:
        """`crop` of an attribute image: left, top, right, bottom in pixels, whole otherwise."""
        if picture.box is None:
            return {"crop": WHOLE}
        with images.reading(str(picture.path)):
            size = images.opened(image, str(picture.path)).size
        crop = dilated(picture.box, size)
        if crop[2] <= crop[0] or crop[3] <= crop[1]:
            raise DataError(
                f"{picture.path}: the box {picture.box} is empty or outside the image of "
                f"{size[0]} x {size[1]} pixels. Is it another image?"
            )
        return {"crop": crop}


def dilated(box: tuple[float, ...], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the official crop of the box [x, y, width, height].

    The margin is at the left and at the top only, unless they are cut by the image's border: right
    and bottom are counted from the moved corner. PIL rounds as here. From the released code.
    """
    x, y, width, height = box
    left, top = max(0, x - DILATION * width), max(0, y - DILATION * height)
    right = min(size[0], left + (1 + DILATION) * width)
    bottom = min(size[1], top + (1 + DILATION) * height)
    return round(left), round(top), round(right), round(bottom)


def _usual(file: Path) -> tuple[list[tuple[int, Any]], int]:
    """The records whose number of candidates is the most frequent one, as in the released code, and
    how many others there are."""
    entries = list(enumerate(read_json(file, list)))
    sizes = Counter(len(field(e, "gallery", list, f"{file} record {i}")) for i, e in entries)
    if not sizes:
        raise DataError(f"{file}: has no records. Get it again.")
    usual = max(sizes, key=lambda size: (sizes[size], -size))
    kept = [(i, entry) for i, entry in entries if len(entry["gallery"]) == usual]
    return kept, len(entries) - len(kept)


def _picture(source: Path, value: Any, attribute: bool, where: str) -> Picture:
    if not attribute:
        name = f"{field(value, 'val_image_id', int, where):012d}"
        folders = (source / "val2017", source / "coco" / "val2017")
        return located(name, name, [f / f"{name}.jpg" for f in folders])
    name = str(field(value, "image_id", int, where))
    box = field(value, "instance_bbox", list, where)
    if len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
        raise DataError(f"{where}: instance_bbox is {box!r:.80}, expected [x, y, width, height].")
    folders = (source / "VG_100K_all", source / "VG_100K", source / "VG_100K_2")
    return located(f"{name} {box}", name, [f / f"{name}.jpg" for f in folders], box=tuple(box))
