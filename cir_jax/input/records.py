"""Training examples: records of prepared tables as named arrays, for Grain.

Sources decode their own images, because only the source knows which record takes the place of a
corrupt one. They are plain picklable objects without JAX and without flags: worker processes
re-import them.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from cir_jax.errors import DataError
from cir_jax.input import images, masks
from cir_jax.input.crops import RandomResizedCrop, Whole
from cir_jax.input.images import ImageTransform
from cir_jax.input.tables import Table
from cir_jax.input.text import Tokenizer

KEPT = 65_536
"""Records without their images that are kept in memory, about a kilobyte each: what is parsed once
is not parsed again in the next epoch."""


@dataclasses.dataclass
class Records:
    """Random access to a table, image fields decoded or replaced by precomputed features.

    images: fields to decode to uint8[height, width, 3].
    features: {field: float32[n, dim]} takes the place of decoding that field, as an array or as
        rows on disk (`StoredRows`). A field that is an array is of a corpus of features, and stays
        as it is.
    columns: {field: array[n, ...]}, likewise, is joined to the records (stored pseudo-words).
    max_corrupt: unreadable records (counted, logged, the next one is taken) before it is an error;
        in large tables 1 %.
    max_megapixels: larger images count as unreadable; worker processes get it with the records.
    reduced: JPEGs are decoded at a half, a quarter or an eighth of their size, where the transform
        enlarges nothing of that: faster, other pixels. Never with `masks.FIELD`, whose noise is of
        the image as it is stored.
    light: the records without their images, for a table that is too large to be kept.
    """

    table: Table
    images: tuple[str, ...]
    transform: ImageTransform | Whole
    features: Mapping[str, Sequence[np.ndarray]] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, Sequence[np.ndarray]] = dataclasses.field(default_factory=dict)
    max_corrupt: int = 16
    max_megapixels: float = dataclasses.field(default_factory=images.max_megapixels)
    reduced: bool = False
    light: Sequence[Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.corrupt: set[int] = set()
        self._parsed: dict[int, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:  # a worker process keeps what it reads itself
        return {**vars(self), "_parsed": {}}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        index = int(index) % len(self)
        while True:
            try:
                return self._read(index)
            except DataError as error:
                self._skip(index, error)
                index = (index + 1) % len(self)

    def _read(self, index: int) -> dict[str, Any]:
        record = self.parsed(index)
        for field, column in self.columns.items():
            record[field] = column[index]
            if np.isnan(record[field]).any():  # what inversion gives where it cannot
                raise DataError(f"{self.table!r}, record {index}: its {field} could not be made.")
        reduced = self.reduced and masks.FIELD not in self.images
        # the masked image first: it is made of the image as it is stored
        for field in sorted(self.images, key=lambda name: name != masks.FIELD):
            what = f"{self.table!r}, record {index}, field {field!r}"
            if field in self.features:
                record[field] = self.features[field][index]
            if field in self.features or isinstance(
                record.get(field), np.ndarray
            ):  # stored features
                if np.isnan(record[field][0]):  # what image_features gives for unreadable images
                    raise DataError(f"{what}: not a readable image.")
            else:
                stored = "image" if field == masks.FIELD else field
                with images.reading(what):
                    image = images.decode(
                        record[stored],
                        what,
                        max_megapixels=self.max_megapixels,
                        enough=self.transform.enough if reduced else None,
                    )
                    if field == masks.FIELD:
                        mask = masks.unpack(record["mask"], what)
                        record[field] = masks.noised(image, mask, self.transform, record["id"])
                    else:
                        record[field] = self.transform(image)
        return record

    def parsed(self, index: int) -> dict[str, Any]:
        """The record as it is stored, without images that nobody decodes."""
        if index in self._parsed:
            return dict(self._parsed[index])
        record = dict((self.table if self.light is None else self.light)[index])
        if all(field in self.features for field in self.images):
            record = {name: x for name, x in record.items() if name not in self.images}
            if len(self._parsed) < KEPT:
                self._parsed[index] = dict(record)
        return record

    def _skip(self, index: int, error: DataError) -> None:
        if index not in self.corrupt:
            self.corrupt.add(index)
            logging.warning("skipped (%d so far): %s", len(self.corrupt), error)
        limit = min(max(self.max_corrupt, len(self) // 100), len(self) - 1)
        if len(self.corrupt) > limit:
            raise DataError(
                f"{self.table!r}: more than {limit} unreadable records; the last: {error}"
            ) from error

    def __repr__(self) -> str:
        joined = f", columns={sorted(self.columns)}" if self.columns else ""
        features = sorted(self.features)
        return f"Records({self.table!r}, images={self.images}, features={features}{joined})"


@dataclasses.dataclass(frozen=True)
class CaptionPairs(grain.transforms.RandomMap):
    """Image-caption pair, a random one of the captions: target, token_ids, no reference.

    suffix: "images" or "features", what the image fields hold.
    with_reference: also a reference of zeros, to be mixed with triplets.
    with_mask: also a mask of zeros, to be mixed with masked pairs.
    """

    tokenizer: Tokenizer
    suffix: str
    with_reference: bool = False
    with_mask: bool = False

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        captions = element["captions"]
        text = captions[rng.integers(len(captions))].decode()
        example = {
            f"target_{self.suffix}": element["image"],
            "token_ids": _tokenise(self.tokenizer, text),
        }
        if self.with_reference:
            example[f"reference_{self.suffix}"] = np.zeros_like(element["image"])
            example["has_reference"] = np.bool_(False)
        return example | _no_mask(self.with_mask)


@dataclasses.dataclass(frozen=True)
class MaskedPairs(grain.transforms.RandomMap):
    """An image as the target, the same with noise in a region as the reference, the region, and a
    random one of the captions of what is there: CompoDiff's masked conversion."""

    tokenizer: Tokenizer
    suffix: str

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        captions = element["captions"]
        text = captions[rng.integers(len(captions))].decode()
        return {
            f"target_{self.suffix}": element["image"],
            "token_ids": _tokenise(self.tokenizer, text),
            f"reference_{self.suffix}": element[masks.FIELD],
            "has_reference": np.bool_(True),
            "mask": masks.unpack(element["mask"], f"record {element['id']}, field 'mask'"),
        }


@dataclasses.dataclass(frozen=True)
class Triplets(grain.transforms.RandomMap):
    """Reference, modification text and target of a record.

    with_mask: also a mask of zeros, to be mixed with masked pairs.
    """

    tokenizer: Tokenizer
    suffix: str
    with_mask: bool = False

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        example = {
            f"target_{self.suffix}": element["target"],
            "token_ids": _tokenise(self.tokenizer, element["text"].decode()),
            f"reference_{self.suffix}": element["reference"],
            "has_reference": np.bool_(True),
        }
        return example | _no_mask(self.with_mask)


@dataclasses.dataclass(frozen=True)
class JoinedTriplets(Triplets):
    """As `Triplets`; of records with two texts "A and b", "B and a", "A" or "B", drawn anew each
    time, as CLIP4Cir trains on FashionIQ."""

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        texts = [text.decode() for text in element.get("texts", ())]
        if len(texts) == 2:
            one, other = (text.strip(".?, ") for text in texts)
            first, last = one.capitalize(), other.capitalize()
            joined = (f"{first} and {other}", f"{last} and {one}", first, last)
            element = element | {"text": joined[rng.integers(4)].encode()}
        return super().random_map(element, rng)


@dataclasses.dataclass(frozen=True)
class AugmentedTriplets(Triplets):
    """As `Triplets`, of images that are larger than what the backbone takes: each is cropped to
    size x size at random, and mirrored half of the time. Of two texts either order is drawn, with
    `word` between them: as ARTEMIS is trained, where both orders are triplets of an epoch."""

    size: int = 224
    word: str = "and"

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        element = dict(element)
        texts = [text.decode() for text in element.get("texts", ())]
        if len(texts) == 2:
            first, second = texts if rng.integers(2) else reversed(texts)
            element["text"] = f"{first} {self.word} {second}".encode()
        for field in ("reference", "target"):
            image = element[field]
            top, left = (int(rng.integers(side - self.size + 1)) for side in image.shape[:2])
            image = image[top : top + self.size, left : left + self.size]
            element[field] = np.ascontiguousarray(image[:, ::-1] if rng.integers(2) else image)
        return super().random_map(element, rng)


@dataclasses.dataclass(frozen=True)
class Images(grain.transforms.RandomMap):
    """An image alone, as the reference it will be, with its stored pseudo-word if there is one."""

    suffix: str

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        del rng
        example = {f"reference_{self.suffix}": element["image"]}
        if "pseudo_words" in element:
            example["pseudo_words"] = element["pseudo_words"]
        return example


@dataclasses.dataclass(frozen=True)
class CroppedImages(grain.transforms.RandomMap):
    """A random crop of an image that was read whole: reference_images."""

    crop: RandomResizedCrop

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {"reference_images": self.crop(element["image"], rng)}


@dataclasses.dataclass(frozen=True)
class Views(grain.transforms.RandomMap):
    """A random crop of an image that was read whole, reference_images, and the image itself: as
    target_images, or what is stored of it, target_features and target_tokens."""

    crop: RandomResizedCrop
    transform: ImageTransform

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        example = {"reference_images": self.crop(element["image"], rng)}
        stored = {name: element[name] for name in STORED_VIEW if name in element}
        return example | (stored or {"target_images": self.transform(element["image"])})


STORED_VIEW = ("target_features", "target_tokens")
"""What takes the place of the image itself in `Views`."""


def _no_mask(wanted: bool) -> dict[str, np.ndarray]:
    return {"mask": np.zeros((masks.SIZE, masks.SIZE), bool)} if wanted else {}


def _tokenise(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer([tokenizer.plain(text)], length=tokenizer.context_length)[0]


@dataclasses.dataclass(frozen=True)
class TrimText(grain.transforms.Map):
    """Cuts the padding columns that no text of the batch needs, in buckets: the same features.

    Nothing behind the end token counts: a causal tower (CLIP) is pooled there, and a bidirectional
    one (BLIP) masks the padding.
    """

    eos_id: int
    bucket: int

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        return self.cut(element, self.needs(element))

    def needs(self, element: dict[str, Any]) -> int:
        """Columns, rounded up to a bucket; 0 where there are no texts."""
        ends = [(ids == self.eos_id).argmax(axis=-1).max() for ids in _texts(element).values()]
        longest = int(max(ends)) + 1 if ends else 0
        return -(-longest // self.bucket) * self.bucket

    def cut(self, element: dict[str, Any], length: int) -> dict[str, Any]:
        """length: of `needs`, of this batch or of one with longer texts."""
        return element | {name: ids[..., :length] for name, ids in _texts(element).items()}


def _texts(element: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: ids for name, ids in element.items() if name.endswith("token_ids")}
