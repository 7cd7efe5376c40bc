"""Features of images and of composed queries, over a mesh, images computed once and stored.

They are of the backbone's dtype; float32 is float32 on GPUs and TPUs, too, not TF32 or bfloat16
(`Backbone.full_precision`).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from PIL import Image

from cir_jax.composers.base import Composer, Params
from cir_jax.errors import DataError
from cir_jax.input import images, masks
from cir_jax.input.identity import CROP, source_identity
from cir_jax.input.images import ImageTransform
from cir_jax.models.backbone import Backbone
from cir_jax.retrieval import encoders
from cir_jax.retrieval.encoders import Encoder, preprocessing
from cir_jax.sharding.constraints import rows_over
from cir_jax.sharding.mesh import replicated
from cir_jax.sharding.placement import on_mesh
from cir_jax.sharding.rows import map_rows
from cir_jax.sharding.together import Together
from cir_jax.storage.chunk_store import ChunkStore
from cir_jax.storage.stored_rows import StoredRows
from cir_jax.weights import finite

Records = Sequence[Mapping[str, Any]]
"""Random access to records with an encoded image: a `Table`, or any list of dictionaries."""


class Rows(Sequence):
    """Some records of a source, in the given order."""

    def __init__(self, source: Records, rows: Sequence[int]):
        self.source, self.rows = source, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.source[self.rows[index]]


def unit(x: np.ndarray) -> np.ndarray:
    """Unit L2 norm along the last axis, as `composers.base.normalise`: zero stays zero."""
    square = np.sum(np.square(x), axis=-1, keepdims=True)
    return (x / np.sqrt(np.maximum(square, 1e-24))).astype(np.float32)


def image_features(
    backbone: Backbone,
    params: Params,
    source: Records,
    field: str = "image",
    *,
    mesh: Mesh,
    batch_size: int = 256,
    cache_dir: Path | None = None,
    normalise: bool = False,
    skip_unreadable: bool = False,
    transform: ImageTransform | None = None,
    label: str = "image features",
) -> np.ndarray:
    """The backbone's image features of all records: float32[n, dim], un-normalised by default.

    `stored_features` are the same for a corpus that no host holds.

    params: of the backbone, on the host or sharded over the mesh. batch_size: global, rounded up to
        what the mesh needs. cache_dir: None = not stored; else see `places.default_cache_dir`.
    skip_unreadable: rows of NaN for images that do not decode, instead of DataError naming them.
    transform: None = the backbone's. label: of the progress bar, "" = none.
    Raises WeightsError naming weights, dtype and images for features that are not finite.
    """
    features = _embed(
        encoders.of_backbone(backbone, params, mesh, identified=cache_dir is not None),
        source,
        field,
        transform,
        mesh=mesh,
        batch_size=batch_size,
        cache_dir=cache_dir,
        skip_unreadable=skip_unreadable,
        label=label,
    )
    return unit(features) if normalise else features


def stored_features(
    backbone: Backbone,
    params: Params,
    source: Records,
    field: str = "image",
    *,
    mesh: Mesh,
    cache_dir: Path,
    batch_size: int = 256,
    tokens: bool = False,
) -> StoredRows:
    """The backbone's image features, un-normalised, of all records, float32[n, dim], computed once
    and stored. Rows are read when they are asked for: training takes a few of millions at a time.

    Rows of NaN for images that do not decode; see `image_features`.
    tokens: those of a ViT's last layer instead, float32[n, tokens, width]: 605 kB of an image for
        BLIP's ViT-B/16 at 224.
    """
    what = encoders.TOKENS if tokens else encoders.PLAIN
    encoder = encoders.of_backbone(backbone, params, mesh, what)
    images_are = (encoder, source, field, backbone.image_transform)
    store = _store(*images_are, cache_dir, skip_unreadable=True)
    done = store.done()
    options = dict(first=done, mesh=mesh, batch_size=batch_size)
    pieces = _pieces(*images_are, skip_unreadable=True, **options)
    for _ in _written(pieces, store, done):
        pass  # no more than a chunk is held
    rows = store.stored()
    return rows.of_shape(backbone.visual_shape) if tokens else rows


def uses_backbone_gallery(composer: Composer) -> bool:
    """Whether the gallery is made of features of the backbone, which all such methods share."""
    own = type(composer).embed_gallery is not Composer.embed_gallery
    return not (own or composer.tunes_backbone)


def gallery_features(
    composer: Composer,
    params: Params,
    frozen: Params,
    gallery: Records,
    *,
    mesh: Mesh,
    batch_size: int = 256,
    cache_dir: Path | None = None,
    skip_unreadable: bool = False,
    raw: np.ndarray | None = None,
) -> np.ndarray:
    """`composer.embed_gallery` of all gallery images: float32[n, dim], of unit norm by default.

    raw: the images' `image_features`, un-normalised, if the caller has them; for composers that
        `uses_backbone_gallery` means.
    """
    backbone = composer.backbone
    options = dict(
        mesh=mesh, batch_size=batch_size, cache_dir=cache_dir, skip_unreadable=skip_unreadable
    )
    if uses_backbone_gallery(composer):
        if raw is None:
            raw = image_features(backbone, frozen["backbone"], gallery, "image", **options)
        return embedded(composer, params, frozen, raw, mesh=mesh, batch_size=batch_size)
    identified = cache_dir is not None
    encoder = encoders.of_composer(composer, params, frozen, mesh, identified)
    return _embed(encoder, gallery, "image", **options)


def embedded(
    composer: Composer,
    params: Params,
    frozen: Params,
    raw: np.ndarray,
    *,
    mesh: Mesh,
    batch_size: int = 256,
) -> np.ndarray:
    """`composer.embed_features` of float32[n, dim]; rows of NaN, of unreadable images, stay.

    Raises WeightsError for rows that are finite before and not after it.
    """
    if type(composer).embed_features is Composer.embed_features:
        return unit(raw)
    readable = np.flatnonzero(~np.isnan(raw[:, 0]))
    if not len(readable):
        return raw
    params, frozen = on_mesh(mesh, params), on_mesh(mesh, frozen)
    pieces = map_rows(
        lambda batch: _embed_features(composer, mesh, params, frozen, batch["features"]),
        lambda row: {"features": raw[readable[row]]},
        len(readable),
        mesh=mesh,
        batch_size=batch_size,
    )
    what = f"gallery features of {type(composer).__name__}"
    name = lambda row: f"image {readable[row]}"  # noqa: E731
    rows = np.concatenate(list(finite.checked(pieces, 0, what, composer.backbone, name)))
    out = np.full((len(raw), rows.shape[1]), np.nan, np.float32)
    out[readable] = rows
    return out


def query_features(
    composer: Composer,
    params: Params,
    frozen: Params,
    token_ids: np.ndarray,
    query_index: np.ndarray,
    *,
    reference_features: np.ndarray | None = None,
    reference_images: Callable[[int], Any] | None = None,
    has_reference: bool = True,
    word_row: np.ndarray | None = None,
    fields: Mapping[str, np.ndarray] | None = None,
    mesh: Mesh,
    batch_size: int = 256,
    seed: int = 0,
    description: str = "",
) -> np.ndarray:
    """`composer.compose` of n queries: float32[n, dim], of unit norm by default.

    token_ids: int32[n, length]. query_index: int32[n], passed on, so that a method that draws noise
        can draw the same for a query whatever the batch size.
    reference_features: float32[n, dim] un-normalised, or reference_images: row -> uint8[h, w, 3],
        or this and the row's mask.
    has_reference: False = the queries are texts, and the reference is a placeholder.
    word_row: int32[n], for composers with `word_rows`. fields: what else `compose` reads, [n, ...].
    Raises WeightsError naming weights, dtype and queries for features that are not finite.
    """
    params, frozen = on_mesh(mesh, params), on_mesh(mesh, frozen)

    def load(row: int) -> dict[str, np.ndarray]:
        query = {
            "token_ids": np.asarray(token_ids[row], np.int32),
            "query_index": np.asarray(query_index[row], np.int32),
        }
        if not has_reference:
            query["has_reference"] = np.bool_(False)
        if word_row is not None:
            query["word_row"] = np.int32(word_row[row])
        query |= {name: values[row] for name, values in (fields or {}).items()}
        if reference_images is not None:
            given = reference_images(row)
            if isinstance(given, tuple):
                return query | dict(zip(("reference_images", "mask"), given, strict=True))
            return query | {"reference_images": given}
        assert reference_features is not None
        return query | {"reference_features": reference_features[row]}

    pieces = map_rows(
        lambda batch: _compose(composer, mesh, params, frozen, batch, np.uint32(seed)),
        load,
        len(token_ids),
        mesh=mesh,
        batch_size=batch_size,
        description=description,
        unit="query",
    )
    what = f"{description or 'queries'}, composed by {type(composer).__name__}"
    name = lambda row: f"query {int(query_index[row])}"  # noqa: E731
    return np.concatenate(list(finite.checked(pieces, 0, what, composer.backbone, name)))


def read_image(source: Records, row: int, field: str, transform: Any) -> np.ndarray:
    """Decoded and transformed: uint8[height, width, 3]. Raises DataError naming the record.

    field "masked": the record's image with noise in its mask.
    """
    record = source[row]
    what = _what(source, row, record)
    with images.reading(what):
        if field == masks.FIELD:
            mask = masks.unpack(record["mask"], what)
            image = open_image(record, "image", what)
            return masks.noised(image, mask, transform, int(record["id"]))
        return transform(open_image(record, field, what))


def open_image(record: Mapping[str, Any], field: str, what: str) -> Image.Image:
    """The image of a record; only the part in its box `crop`, if that is not all zeros.

    crop: left, top, right, bottom in pixels. A part is padded to a black square, itself in the
    middle (rounded down), before any other transform: GeneCIS's attribute tasks, released code.
    """
    image = images.decode(bytes(record[field]), what)
    box = tuple(int(x) for x in record.get(CROP, ()))
    if not any(box):
        return image
    left, top, right, bottom = box
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise DataError(
            f"{what}: crop {box} is not inside the image of {image.width} x {image.height} pixels. "
            "Prepare the dataset again."
        )
    part = image.crop(box).convert("RGB")
    side = max(part.size)
    images.check_size((side, side), f"{what}: its part as a square")
    square = Image.new("RGB", (side, side))
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return square


def _embed(
    encoder: Encoder,
    source: Records,
    field: str,
    transform: Any = None,
    *,
    cache_dir: Path | None = None,
    skip_unreadable: bool = False,
    **options: Any,
) -> np.ndarray:
    """float32[n, dim]. options: of `_pieces`."""
    transform = encoder.backbone.image_transform if transform is None else transform
    store, parts = None, []
    if cache_dir is not None:
        store = _store(encoder, source, field, transform, cache_dir, skip_unreadable)
        stored = store.load(lambda rows: finite.stored_whole(rows, skip_unreadable))
        parts = [] if stored is None else [stored]
    done = sum(map(len, parts))
    pieces = _pieces(encoder, source, field, transform, skip_unreadable, done, **options)
    parts += list(pieces if store is None else _written(pieces, store, done))
    features = np.concatenate(parts)
    assert len(features) == len(source), (len(features), len(source))
    return features


def _store(
    encoder: Encoder,
    source: Records,
    field: str,
    transform: Any,
    cache_dir: Path,
    skip_unreadable: bool,
) -> ChunkStore:
    images_are = f"{source_identity(source, field)} {field}"
    made_of = {"preprocessing": preprocessing(transform), "images": images_are}
    unreadable = {"unreadable": _unreadable() if skip_unreadable else "error"}
    return ChunkStore(cache_dir, {**encoder.description, **made_of, **unreadable}, len(source))


def _pieces(
    encoder: Encoder,
    source: Records,
    field: str,
    transform: Any,
    skip_unreadable: bool,
    first: int,
    *,
    mesh: Mesh,
    batch_size: int = 256,
    label: str = "image features",
) -> Iterator[np.ndarray]:
    """Rows of features from number `first` on, as they are computed."""
    if not len(source):
        raise DataError(f"{source!r} holds no images; expected at least one.")
    if first == len(source):
        return iter(())
    return encoder.rows(
        functools.partial(_load, source, field, transform, skip_unreadable),
        len(source),
        lambda row: _what(source, row, source[row]),
        first=first,
        mesh=mesh,
        batch_size=batch_size,
        label=label,
    )


def _written(pieces: Iterator[np.ndarray], store: ChunkStore, done: int) -> Iterator[np.ndarray]:
    """Cuts pieces of any length into chunks, and writes each as soon as it is complete."""
    waiting, held = [], 0
    for piece in pieces:
        waiting.append(piece)
        held += len(piece)
        while held >= store.chunk_rows or (held and done + held == store.rows):
            rows = np.concatenate(waiting)
            chunk, rest = rows[: store.chunk_rows], rows[store.chunk_rows :]
            store.write(done // store.chunk_rows, chunk)
            done, waiting, held = done + len(chunk), [rest], len(rest)
            yield chunk


def _load(
    source: Records, field: str, transform: Any, skip_unreadable: bool, row: int
) -> dict[str, np.ndarray]:
    unreadable = False  # the device marks the row with NaN, so that all processes see it
    try:
        image = read_image(source, row, field, transform)
    except DataError as error:
        if not skip_unreadable:
            raise
        logging.warning("unreadable: %s", error)
        image, unreadable = np.zeros((transform.crop, transform.crop, 3), np.uint8), True
    return {"image": image, "unreadable": np.bool_(unreadable)}


def _unreadable() -> str:
    """What becomes of images that are not read, and of which ones; for the identity of a store."""
    return f"NaN, over {images.max_megapixels():g} megapixels, too"


def _name(source: Records, row: int) -> str:
    if isinstance(source, Rows):
        return _name(source.source, source.rows[row])
    name = getattr(source, "name", None)
    if callable(name):
        return name(row)
    kind = "images" if isinstance(source, list | tuple) else repr(source)
    return f"{kind}, record {row}"


def _what(source: Records, row: int, record: Mapping[str, Any]) -> str:
    """What error messages call an image: where it is, and its official name where it has one."""
    name = record.get("name", "")
    name = name.decode() if isinstance(name, bytes) else name
    return f"{_name(source, row)} ({name})" if name else _name(source, row)


@Together
@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_features(
    composer: Composer, mesh: Mesh, params: Params, frozen: Params, raw: jax.Array
) -> jax.Array:
    with rows_over(mesh), composer.backbone.full_precision():
        features = composer.embed_features(params, frozen, raw)
    return jax.lax.with_sharding_constraint(finite.marked(features), replicated(mesh))


@Together
@functools.partial(jax.jit, static_argnums=(0, 1))
def _compose(
    composer: Composer,
    mesh: Mesh,
    params: Params,
    frozen: Params,
    query: dict[str, jax.Array],
    seed: jax.Array,
) -> jax.Array:
    # the key is made here: a host's key array would have to be placed on every mesh
    with rows_over(mesh), composer.backbone.full_precision():
        features = composer.compose(params, frozen, query, jax.random.key(seed))
    return jax.lax.with_sharding_constraint(finite.marked(features), replicated(mesh))
