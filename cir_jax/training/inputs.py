"""From the config of a stage to its Grain pipeline."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from cir_jax.errors import ConfigError, unknown
from cir_jax.experiment import Experiment
from cir_jax.input import crops, identity, keywords, masks, objects, records, text
from cir_jax.input.pipeline import Part, Pipeline, Source
from cir_jax.input.reading import Reading
from cir_jax.input.tables import Table
from cir_jax.input.without_images import WithoutImages
from cir_jax.models.backbone import Backbone
from cir_jax.retrieval.features import stored_features
from cir_jax.storage.places import default_cache_dir
from cir_jax.storage.stored_rows import StoredRows
from cir_jax.training import inversion

TABLES = {
    "captions": "pairs",
    "pretrain": "pairs",
    "masked": "masked_pairs",
    "triplets": "triplets",
    "images": "images",
    "texts": "masked_captions",
    "text_triplets": "text_triplets",
}
"""Training tables -> the example that their records become by default."""


READING = ("workers", "threads", "prefetch")
"""Config fields of `Reading.of_host`; workdirs of earlier versions have the first one alone."""


@dataclasses.dataclass(frozen=True)
class Example:
    """What becomes of a record: the image fields it needs, and the transform.

    make(experiment, data, source): data is the stage's config.data, source what an epoch goes
    through: the records, or what `items` makes of them.
    whole: images come as they are (PIL), for a transform that crops them at random.
    beside: features stand beside the images, of which they are, not in their place.
    uncropped: they come resized, but not cropped, for one that crops these.
    """

    fields: tuple[str, ...]
    make: Callable[[Experiment, Any, Any], grain.transforms.RandomMap]
    whole: bool = False
    beside: bool = False
    uncropped: bool = False
    items: Callable[[Experiment, records.Records], Source] | None = None


def _suffix(data: Any) -> str:
    """What the image fields hold."""
    return "features" if data.features else "images"


def _pairs(experiment: Experiment, data: Any, source: records.Records) -> records.CaptionPairs:
    mixed = any(name in data.tables for name in ("triplets", "masked")) or data.with_reference
    return records.CaptionPairs(
        experiment.backbone.tokenizer, _suffix(data), mixed, _with_mask(data)
    )


def _with_mask(data: Any) -> bool:
    """Whether some rows of a batch have masks, so that all need one."""
    return bool(data.tables.get("masked"))


def _cropped(experiment: Experiment, data: Any, source: records.Records) -> records.CroppedImages:
    return records.CroppedImages(_crop(experiment, data))


def _views(experiment: Experiment, data: Any, source: records.Records) -> records.Views:
    return records.Views(_crop(experiment, data), experiment.backbone.image_transform)


def _crop(experiment: Experiment, data: Any) -> crops.RandomResizedCrop:
    return crops.RandomResizedCrop(experiment.backbone.image_transform.crop, tuple(data.crop))


def _augmented(
    experiment: Experiment, data: Any, source: records.Records
) -> records.AugmentedTriplets:
    backbone = experiment.backbone
    # what stands between two captions is a word of its own in ARTEMIS' vocabulary
    word = "<and>" if backbone.tokenizer.token_id("<and>") is not None else "and"
    size = backbone.image_transform.crop
    return records.AugmentedTriplets(backbone.tokenizer, _suffix(data), size=size, word=word)


def _masked(experiment: Experiment, data: Any, source: records.Records) -> Any:
    return keywords.MaskedCaptions(experiment.backbone.tokenizer, keywords.tagger(data.keywords))


def _text_triplets(experiment: Experiment, data: Any, source: records.Records) -> Any:
    template = getattr(experiment.composer, "template", None)
    if template is None:
        raise ConfigError(
            f"text triplets need a method whose queries are a prompt; "
            f"{type(experiment.composer).__name__} has none. Train rtd on them."
        )
    return keywords.TextTriplets(experiment.backbone.tokenizer, template)


def _labels(experiment: Experiment, source: records.Records) -> objects.Labels:
    known = getattr(experiment.composer, "objects", None)
    if known is None:
        raise ConfigError(
            "sets of objects need a composer with classes: set composer.objects of the stage."
        )
    return objects.Labels(source, known)


def _object_sets(experiment: Experiment, data: Any, source: objects.Labels) -> objects.ObjectSets:
    tokenizer = experiment.backbone.tokenizer
    return objects.ObjectSets(tokenizer, source, _suffix(data), data.set_size)


EXAMPLES = {
    "pairs": Example(("image",), _pairs),
    "triplets": Example(
        ("reference", "target"),
        lambda experiment, data, source: records.Triplets(
            experiment.backbone.tokenizer, _suffix(data), _with_mask(data)
        ),
    ),
    "joined_triplets": Example(
        ("reference", "target"),
        lambda experiment, data, source: records.JoinedTriplets(
            experiment.backbone.tokenizer, _suffix(data), _with_mask(data)
        ),
    ),
    "masked_pairs": Example(
        ("image", masks.FIELD),
        lambda experiment, data, source: records.MaskedPairs(
            experiment.backbone.tokenizer, _suffix(data)
        ),
    ),
    "augmented_triplets": Example(("reference", "target"), _augmented, uncropped=True),
    "images": Example(("image",), lambda experiment, data, source: records.Images(_suffix(data))),
    "cropped_images": Example(("image",), _cropped, whole=True),
    "views": Example(("image",), _views, whole=True, beside=True),
    "masked_captions": Example((), _masked),
    "text_triplets": Example((), _text_triplets),
    "object_sets": Example(("image",), _object_sets, items=_labels),
}


def make_pipeline(
    experiment: Experiment, name: str, workdir: Path | None = None, shapes_only: bool = False
) -> Pipeline:
    """Grain pipeline of stage `name`: the mixture of tables that config.stage.<name>.data says.

    workdir: of the run, where the pseudo-words of an inversion stage lie.
    shapes_only: zeros in place of everything precomputed, for a dry run.
    """
    config, backbone = experiment.config, experiment.backbone
    data = config.stage[name].data
    parts = []
    for table_name, weight in data.tables.items():
        if table_name not in TABLES:
            raise ConfigError(unknown(f"table in stage.{name}.data.tables:", table_name, TABLES))
        if data.example and data.example not in EXAMPLES:
            raise ConfigError(unknown(f"stage.{name}.data.example:", data.example, EXAMPLES))
        if not weight:
            continue
        table = Table(experiment.data_dir, data.dataset, table_name, data.split)
        example = EXAMPLES[data.example or TABLES[table_name]]
        features, columns = {}, {}
        if data.features and (example.whole or example.uncropped) and not example.beside:
            raise ConfigError(
                f"stage.{name}.data: example={data.example!r} crops images, so it needs "
                "features=False."
            )
        if data.features and experiment.composer.tunes_backbone:
            raise ConfigError(
                f"stage.{name}.data.features=True: {type(experiment.composer).__name__} trains the "
                "backbone as it is set, whose features change. Set "
                f"--config.stage.{name}.data.features=False."
            )
        stored = table.mark().get("features")
        if stored is not None:
            _check_stored(experiment, name, table, stored, example)
        elif data.features and example.beside:
            columns |= _view(experiment, table, *example.fields, shapes_only)
        elif data.features:
            make = _no_features if shapes_only else _features
            features = {field: make(experiment, table, field) for field in example.fields}
        if data.tokens:
            columns["pseudo_words"] = _pseudo_words(experiment, data.tokens, table, workdir)
        transform = backbone.image_transform
        if example.whole:
            transform = crops.Whole((_crop(experiment, data), transform))
        if example.uncropped:
            transform = dataclasses.replace(transform, crop=transform.resize)
        light = None
        if features and not shapes_only and len(table) > records.KEPT:
            light = WithoutImages(table, example.fields, default_cache_dir())
        source = records.Records(
            table,
            example.fields,
            transform,
            features,
            columns,
            reduced=data.get("reduced_jpeg", False),  # not in configs of earlier versions
            light=light,
        )
        items = example.items(experiment, source) if example.items else source
        parts.append(Part(table_name, items, example.make(experiment, data, items), weight))
    trim = records.TrimText(backbone.tokenizer.eos_id, text.BUCKET)
    trims = experiment.composer.pools_text and not backbone.reads_padding
    return Pipeline(
        parts=tuple(parts),
        batch_size=config.stage[name].batch_size,
        seed=config.seed,
        group=data.group,
        trim=trim if trims else None,
        reading=Reading.of_host(*(config.get(field, 0) for field in READING)),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _check_stored(
    experiment: Experiment, name: str, table: Table, stored: Mapping[str, Any], example: Example
) -> None:
    """Raises ConfigError where a corpus of features is not what the experiment would compute."""
    if example.beside:
        raise ConfigError(
            f"{table!r} holds features and no images, which stage {name!r} crops: set "
            f"--config.stage.{name}.data.dataset to one with images."
        )
    if not experiment.config.stage[name].data.features:
        raise ConfigError(
            f"{table!r} holds features and no images: set --config.stage.{name}.data.features=True."
        )
    for field, ours in identity.features_of(experiment.backbone).items():
        if stored[field] != ours:
            raise ConfigError(
                f"{table!r} holds image features of other {field}, {stored[field]}, than "
                f"config.backbone={experiment.config.backbone!r} has, {ours}. Prepare them again: "
                f"launch/prepare.py --features={experiment.config.backbone}."
            )


def _features(experiment: Experiment, table: Table, field: str) -> Any:
    backbone = experiment.backbone
    if getattr(experiment.composer, "phrases", None) is not None:
        backbone = backbone.with_dtype(np.float32)  # they choose the concepts of an image
    return _stored(backbone, experiment, table, field)


def _tokens(experiment: Experiment, table: Table, field: str) -> StoredRows:
    return _stored(experiment.backbone, experiment, table, field, tokens=True)


def _stored(
    backbone: Backbone, experiment: Experiment, table: Table, field: str, **options: Any
) -> StoredRows:
    return stored_features(
        backbone,
        experiment.frozen["backbone"],
        table,
        field,
        mesh=experiment.mesh,
        batch_size=experiment.config.evaluation.batch_size,
        cache_dir=default_cache_dir(),
        **options,
    )


def _view(
    experiment: Experiment, table: Table, field: str, shapes_only: bool
) -> dict[str, Sequence[np.ndarray]]:
    """What the backbone sees in the images: columns of `records.STORED_VIEW`."""
    makers = (_no_features, _no_tokens) if shapes_only else (_features, _tokens)
    if not getattr(experiment.composer, "reads_tokens", False):
        makers = makers[:1]
    return {
        name: make(experiment, table, field)
        for name, make in zip(records.STORED_VIEW, makers, strict=False)
    }


def _no_tokens(experiment: Experiment, table: Table, field: str) -> np.ndarray:
    shape = experiment.backbone.visual_shape
    return np.broadcast_to(np.zeros((1, *shape), np.float32), (len(table), *shape))


def _no_features(experiment: Experiment, table: Table, field: str) -> Any:
    row = np.zeros((1, experiment.backbone.dim), np.float32)
    return np.broadcast_to(row, (len(table), experiment.backbone.dim))


def _pseudo_words(
    experiment: Experiment, stage: str, table: Table, workdir: Path | None
) -> Sequence[np.ndarray]:
    """float32[n, token_dim] of stage `stage`; zeros without a workdir (dry run)."""
    if workdir is None:
        row = np.zeros((1, experiment.backbone.token_dim), np.float32)
        return np.broadcast_to(row, (len(table), row.shape[1]))
    return inversion.read(experiment, stage, workdir, table)
