"""TFDS builder of the table `triplets`: reference image, modification text, target image."""

from typing import Any

import tensorflow_datasets as tfds

from data import corpus, formats
from data.corpus import CorpusBuilder
from data.image_triplets import readers
from data.source import Options, Survey, tables


class ImageTriplets(CorpusBuilder):
    """Image triplets: SynthTriplets18M, the training splits of FashionIQ and CIRR, your own."""

    BUILDER_CONFIGS = tables("triplets")
    HELP = "A folder of .parquet or .tar files, or of FashionIQ or CIRR with their training split."
    HUB = True

    @classmethod
    def features(cls, table: str) -> dict[str, Any]:
        fields = dict.fromkeys(readers.FIELDS, tfds.features.Text())
        return fields | {"texts": tfds.features.Sequence(tfds.features.Text())}

    @classmethod
    def survey(cls, source: formats.Source, options: Options) -> Survey:
        found = readers.find(source, options.columns)
        return corpus.survey(found, "triplets", "triplets", options)
