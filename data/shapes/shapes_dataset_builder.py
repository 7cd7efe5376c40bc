"""TFDS builder of the embedded world: one config per table, written as ArrayRecord."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from data import progress
from data.shapes import benchmarks, captioned, masked, queries
from data.shapes.benchmarks import BENCHMARKS, BenchmarkSizes

VERSION = "1.0.0"  # of the generator: raise it with every change of what is generated
EVAL_SPLITS = ("val", "test_0", "test_1", "test_2")
TABLES = ("pretrain", "captions", "masked", "triplets", "text_triplets", "gallery", *BENCHMARKS)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Records per training table, and what the benchmarks of each evaluation split consist of."""

    pretrain: int = 131072
    pretrain_val: int = 1000
    captions: int = 16384
    masked: int = 8192
    triplets: int = 12288
    benchmarks: BenchmarkSizes = BenchmarkSizes()


def _features(table: str) -> dict[str, object]:
    text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
    # Images are PNG files kept as bytes: TFDS needs TensorFlow to write its own Image feature from
    # bytes, and readers decode with PIL.
    image = tfds.features.Text()
    indices = tfds.features.Sequence(np.int32)
    match table:
        case "pretrain" | "captions":
            own = {"image": image, "captions": texts}
        case "masked":
            own = {"image": image, "mask": tfds.features.Text(), "captions": texts}
        case "triplets":
            own = {"reference": image, "target": image, "text": text}
            own |= {"reference_caption": text, "target_caption": text}
        case "text_triplets":
            own = {"reference_caption": text, "target_caption": text, "text": text}
        case "gallery":
            own = {"image": image, "caption": text, "categories": texts}
        case _:
            own = {"reference": np.int32, "texts": texts, "targets": indices}
            own |= {"candidates": indices, "category": text, "aspects": texts}
    return {"id": np.int64, **own}


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Scenes of coloured, textured shapes with captions, edits and retrieval benchmarks."""

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=t, version=VERSION) for t in TABLES]
    SIZES = Sizes()
    APART = ("captions", "masked", "triplets", "pretrain")  # long, and not of the benchmarks' world
    url_infos = None  # nothing is downloaded; looking for checksums needs a package TFDS omits

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The embedded world of cir_jax; see data/shapes/README.md.",
            features=tfds.features.FeaturesDict(_features(self.builder_config.name)),
            license="Apache-2.0",
            disable_shuffling=True,  # record i is example i
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        table, sizes = self.builder_config.name, self.SIZES
        match table:
            case "pretrain":
                splits = {"train": sizes.pretrain, "val": sizes.pretrain_val}
            case "captions" | "text_triplets":  # at most one of each caption's record
                splits = {"train": sizes.captions}
            case "masked" | "triplets":
                splits = {"train": getattr(sizes, table)}
            case _:
                splits = dict.fromkeys(EVAL_SPLITS)
        return {split: self._generate_examples(split, size) for split, size in splits.items()}

    def _generate_examples(self, split: str, size: int | None) -> Iterator[tuple[int, dict]]:
        table = self.builder_config.name
        records: Iterable[dict]
        match table:
            case "pretrain" | "captions":
                records = captioned.records(table, split, size)
            case "masked":
                records = masked.records(split, size)
            case "triplets":
                records = queries.triplet_records(split, size)
            case "text_triplets":
                # only here, as it loads JAX and the small CLIP
                from data.shapes import text_triplets

                records, size = text_triplets.records(split, size), None
            case _:
                world = benchmarks.world(split, self.SIZES.benchmarks)
                if table == "gallery":
                    records, size = benchmarks.gallery_records(world), len(world.gallery)
                else:
                    records, size = world.queries[table], len(world.queries[table])
        yield from enumerate(progress(records, size, f"{self.name}/{table}/{split}"))


_LONG = ("captions", "masked", "triplets")


class ShapesLong(Shapes):
    """More triplets, for a longer training; the rest of the world is that of `shapes`."""

    BUILDER_CONFIGS = [c for c in Shapes.BUILDER_CONFIGS if c.name in _LONG]
    SIZES = Sizes(triplets=36864)


class ShapesTiny(Shapes):
    """The same world in the size of a test."""

    BUILDER_CONFIGS = Shapes.BUILDER_CONFIGS
    APART = ()
    SIZES = Sizes(
        256, 64, 256, 96, 128, BenchmarkSizes(circo=12, cirr_sets=8, fashioniq=15, genecis=4)
    )
