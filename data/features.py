"""Corpora of features: a prepared dataset's training tables again, images replaced by features.

    python launch/prepare.py --dataset=cc3m --features=openai/clip-vit-large-patch14 --name=cc3m_l14

A table then holds its texts, and where an image was float32[dim], un-normalised, as the backbone
gives it (of a masked pair also `masked`, those of the image with noise in its region); NaN where an
image does not decode. Training reads such tables as it reads images, with `features=True`; which
weights they are of stands in `source.json`, under "features".
"""

import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cir_jax import weights
from cir_jax.errors import DataError, unknown
from cir_jax.input import masks
from cir_jax.input.identity import features_of
from cir_jax.input.tables import Table, is_prepared
from cir_jax.models.backbone import Backbone
from cir_jax.retrieval.features import Rows, image_features
from cir_jax.sharding.mesh import make_mesh
from cir_jax.storage.buckets import place
from cir_jax.storage.places import default_data_dir
from data import build, claims, progress, shards
from data.source import SourceBuilder, Split, stamp

FIELDS = {
    "captions": ("image",),
    "pretrain": ("image",),
    "images": ("image",),
    "masked": ("image", masks.FIELD),
    "triplets": ("reference", "target"),
}
"""Training tables -> what of them becomes features."""

VERSION = "1.0.0"
SPLIT = "train"
TOGETHER = 1024
"""Records whose features are computed before they are written."""


class Features(SourceBuilder, skip_registration=True):
    """TFDS builder of one table, whose fields are those of the table it is made of."""

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=table, version=VERSION) for table in FIELDS]
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, fields: Mapping[str, Any], **kwargs: Any):
        self.fields = dict(fields)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Features in the place of images; see data/features.py of cir_jax.",
            features=tfds.features.FeaturesDict(self.fields),
            disable_shuffling=True,  # record i is example i
        )


def prepare(
    dataset: str,
    backbone: str,
    name: str | None,
    tables: Sequence[str] | None = None,
    data_dir: str | os.PathLike | None = None,
    *,
    preprocessing: str = "",
    batch_size: int = 256,
) -> dict[str, Path]:
    """Builds the tables of features that are not there yet; returns the folders of all.

    tables: default all training tables that the dataset has. preprocessing: as
    `config.preprocessing`. A killed build goes on behind its last finished shard.
    Raises DataError when a table is missing, or there and made of others or by other weights;
    WeightsError as `weights.load`.
    """
    root = place(data_dir) if data_dir else default_data_dir()
    if not name or name == dataset or not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(
            f"--name={name}: what the features are called beside {dataset}, of letters, digits, "
            f"'_', '-' and '.': --name={dataset}_features."
        )
    for table in tables or ():
        if table not in FIELDS:
            raise DataError(unknown("table with images:", table, FIELDS))
    wanted = tables or [table for table in FIELDS if is_prepared(root, dataset, table)]
    if not wanted:
        raise DataError(
            f"{root / dataset}: none of the tables {', '.join(FIELDS)} is prepared. Run "
            "launch/prepare.py without --features first."
        )
    sources = {table: Table(root, dataset, table, SPLIT) for table in wanted}
    model, params = weights.load(backbone)
    if preprocessing:
        model = model.with_preprocessing(preprocessing)
    folders = {}
    for table, source in sources.items():
        folders[table] = folder = root / name / table / VERSION
        made = _made_of(source, model)
        with claims.building(folder, functools.partial(_refuse_other, made=made)) as here:
            if here is not None:
                _build(source, model, params, here, made, batch_size)
    return folders


def _made_of(source: Table, backbone: Backbone) -> dict[str, Any]:
    features = {**features_of(backbone), "dim": backbone.dim, "dtype": backbone.dtype.name}
    return {"features": features, "stamp": {SPLIT: stamp(source.contents(), features, masks.NOISE)}}


def _refuse_other(folder: Path, made: Mapping[str, Any]) -> None:
    there = json.loads((folder / build.MARK).read_text())
    if there["stamp"] != made["stamp"]:
        raise DataError(
            f"{folder} is there already, of {there['features']['weights']} and another table or "
            f"preprocessing than now (weights {made['features']['weights']}). Choose another "
            "--name, or delete it."
        )


def _build(
    source: Table,
    backbone: Backbone,
    params: Any,
    folder: Path,
    made: Mapping[str, Any],
    batch_size: int,
) -> None:
    scratch = folder.parent / ".building"
    print(f"building {folder}", file=sys.stderr, flush=True)
    fields = FIELDS[source.table]
    original = tfds.builder_from_directory(
        str(source.data_dir / source.dataset / source.table / source.version)
    ).info.features
    vector = tfds.features.Tensor(shape=(backbone.dim,), dtype=np.float32)
    stored = {**dict(original.items()), **dict.fromkeys(fields, vector)}

    def records(start: int) -> Iterator[dict[str, Any]]:
        rows = _records(source, fields, backbone, params, start, batch_size)
        label = f"{folder.parent.parent.name}/{source.table}"
        return progress(rows, len(source), label, start)

    splits = {SPLIT: Split(records, made["stamp"][SPLIT], len(source))}
    with build.quiet_tfds():
        builder = Features(config=source.table, data_dir=scratch, fields=stored, splits=splits)
    whole = {"complete": True, "counts": {"records": len(source)}}
    mark = {**made, "source": str(source.data_dir / source.dataset)}
    mark["splits"] = source.mark().get("splits") or {SPLIT: whole}
    try:
        build.write_table(builder, splits, scratch, folder, lambda: mark)
    finally:
        if not shards.finished_shards(scratch):
            shutil.rmtree(scratch, ignore_errors=True)


def _records(
    source: Table,
    fields: Sequence[str],
    backbone: Backbone,
    params: Any,
    start: int,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    """The records from number `start` on."""
    mesh = make_mesh({"data": -1})
    for first in range(start, len(source), TOGETHER):
        rows = range(first, min(first + TOGETHER, len(source)))
        features = {
            field: image_features(
                backbone,
                params,
                Rows(source, rows),
                field,
                mesh=mesh,
                batch_size=batch_size,
                skip_unreadable=True,
                label="",
            )
            for field in fields
        }
        for number, row in enumerate(rows):
            record = dict(source[row])
            yield record | {field: values[number] for field, values in features.items()}
