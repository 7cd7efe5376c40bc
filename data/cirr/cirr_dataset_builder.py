"""TFDS builder of CIRR (Liu et al., arXiv 2108.04024)."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cir_jax.errors import DataError
from data.benchmark import POSITIONS, BenchmarkBuilder, Question, Raw, absent, located
from data.source import field, read_json, strings

FOLDERS = {"train": "train", "val": "dev", "test1": "test1"}  # of the images of a split


class Cirr(BenchmarkBuilder):
    """CIRR: everyday images of NLVR2, each query with a set of six similar ones."""

    OFFICIAL = {
        "train": {"queries": 28225, "gallery": 16939},
        "val": {"queries": 4181, "gallery": 2297},
        "test1": {"queries": 4148, "gallery": 2315},
    }
    QUERY_FIELDS = {
        "soft_targets": POSITIONS,
        "soft_weights": tfds.features.Sequence(np.float32),
    }
    LICENSE = "Annotations: MIT; images: terms of NLVR2"
    HELP = """
CIRR: annotations from github.com/Cuberick-Orion/CIRR (branch cirr_dataset), images by the form of
NLVR2 (lil.nlp.cornell.edu/nlvr), or from CIRR's authors by e-mail. The folder holds
    cirr/captions/cap.rc2.{train,val,test1}.json
    cirr/image_splits/split.rc2.{train,val,test1}.json
    train/34/train-11041-2-img0.png ..., dev/dev-244-0-img0.png ..., test1/test1-147-1-img1.png ...
    (these three also in img_raw or cirr/img_raw; or without the numbered folders)"""

    @classmethod
    def read(cls, source: Path, split: str) -> Raw:
        """See the base class."""
        root = source / "cirr" if (source / "cirr").is_dir() else source
        captions = root / "captions" / f"cap.rc2.{split}.json"
        names = root / "image_splits" / f"split.rc2.{split}.json"
        if missing := [file for file in (captions, names) if not file.is_file()]:
            raise absent(missing)
        pictures = [
            located(name, name, _paths(source, split, name, path, names))
            for name, path in read_json(names, dict).items()
        ]
        questions = [
            _question(entry, f"{captions} record {i}", labelled=split != "test1")
            for i, entry in enumerate(read_json(captions, list))
        ]
        return Raw(pictures, questions, names)


def _paths(source: Path, split: str, name: str, path: Any, file: Path) -> list[Path]:
    """Where the image may be: as the split file says, or flat in the folder of its split."""
    if not isinstance(path, str):
        raise DataError(f"{file}: the path of {name} is {path!r:.80}, expected a text.")
    flat = f"{FOLDERS[split]}/{Path(path).name}"
    roots = (source, source / "cirr" / "img_raw", source / "img_raw", source / "images")
    return [root / p for p in (path, flat, Path(path).name) for root in roots]


def _question(entry: Any, where: str, labelled: bool) -> Question:
    number = field(entry, "pairid", int, where)
    where = f"{where} (pairid {number})"
    soft: dict[str, float] = {}
    if labelled:
        for name, weight in field(entry, "target_soft", dict, where).items():
            soft[name] = field({name: weight}, name, (int, float), f"{where} target_soft")
    return Question(
        where,
        number,
        reference=field(entry, "reference", str, where),
        texts=(field(entry, "caption", str, where),),
        targets=(field(entry, "target_hard", str, where),) if labelled else (),
        candidates=strings(field(entry, "img_set", dict, where), "members", where),
        soft=soft,
    )
