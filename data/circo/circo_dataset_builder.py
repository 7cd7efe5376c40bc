"""TFDS builder of CIRCO (SEARLE, arXiv 2303.15247)."""

from collections import Counter
from pathlib import Path
from typing import Any

from data.benchmark import TEXT, BenchmarkBuilder, Picture, Question, Raw, absent, located
from data.source import field, first_file, read_json, strings

INFO = "image_info_unlabeled2017.json"


class Circo(BenchmarkBuilder):
    """CIRCO: several right answers per query, among COCO's 123,403 unlabeled images."""

    OFFICIAL = {
        "val": {"queries": 220, "gallery": 123403},
        "test": {"queries": 800, "gallery": 123403},
    }
    GALLERY_SPLIT = "unlabeled"
    QUERY_FIELDS = {"shared_concept": TEXT}
    LICENSE = "Annotations: CC BY-NC 4.0; images: terms of COCO and Flickr"
    HELP = """
CIRCO: annotations from github.com/miccunifi/CIRCO, images (2017 Unlabeled, 19 GB, and their image
info) from cocodataset.org. The folder holds
    annotations/val.json, annotations/test.json
    COCO2017_unlabeled/annotations/image_info_unlabeled2017.json
    COCO2017_unlabeled/unlabeled2017/000000000008.jpg ..."""

    @classmethod
    def read(cls, source: Path, split: str) -> Raw:
        """See the base class."""
        questions = cls.questions(source, split)
        info, images = cls.image_list(source), source / "COCO2017_unlabeled" / "unlabeled2017"
        pictures = [
            _picture(images, entry, f"{info} image {i}")
            for i, entry in enumerate(field(read_json(info, dict), "images", list, str(info)))
        ]
        return Raw(pictures, questions, info)

    @classmethod
    def image_list(cls, source: Path) -> Path:
        """The list of the images, or where it should be."""
        folders = (source / "COCO2017_unlabeled" / "annotations", source / "annotations", source)
        return first_file(*(folder / INFO for folder in folders))

    @classmethod
    def questions(cls, source: Path, split: str) -> list[Question]:
        """The queries alone, for which the list of images is not needed."""
        file = first_file(source / "annotations" / f"{split}.json", source / f"{split}.json")
        if not file.is_file():
            raise absent([file])
        return [
            _question(entry, f"{file} record {i}", labelled=split == "val")
            for i, entry in enumerate(read_json(file, list))
        ]


def _picture(folder: Path, entry: Any, where: str) -> Picture:
    name = str(field(entry, "id", int, where))
    return located(name, name, [folder / field(entry, "file_name", str, where)])


def _question(entry: Any, where: str, labelled: bool) -> Question:
    number = field(entry, "id", int, where)
    where = f"{where} (id {number})"
    targets: list[str] = []
    remarks = []
    if labelled:
        single = field(entry, "target_img_id", int, where)
        others = field(entry, "gt_img_ids", list, where)
        if single not in others:
            remarks.append(f"target_img_id {single} is not among its gt_img_ids")
        remarks += [
            f"gt_img_ids has {x} {n} times" for x, n in Counter(map(str, others)).items() if n > 1
        ]
        targets = list(dict.fromkeys(map(str, [single, *others])))
    return Question(
        where,
        number,
        reference=str(field(entry, "reference_img_id", int, where)),
        texts=(field(entry, "relative_caption", str, where),),
        targets=tuple(targets),
        aspects=strings(entry, "semantic_aspects", where) if labelled else (),
        remarks=tuple(remarks),
        fields={"shared_concept": field(entry, "shared_concept", str, where)},
    )
