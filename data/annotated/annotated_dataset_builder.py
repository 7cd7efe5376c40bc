"""TFDS builder of benchmarks that `cir annotate` made of one's own photos."""

from data.circo.circo_dataset_builder import Circo


class Annotated(Circo):
    """Several right answers per query, among the photos of a folder; the files are CIRCO's."""

    OFFICIAL = {"val": {}}  # as many as were annotated
    LICENSE = "Whoever annotated it says"
    HELP = """
What `cir annotate PHOTOS --out DIR` exported: the folder DIR, which holds
    annotations/val.json
    COCO2017_unlabeled/annotations/image_info_unlabeled2017.json
    COCO2017_unlabeled/unlabeled2017 -> PHOTOS"""
