"""A folder of photos: indexed once, kept fresh, searched by every method on the same vectors.

Differences from `Searcher`, which reads images as the papers' code does: photos are turned as EXIF
says, grey levels of 16 bits are scaled, and vectors are kept in float16 of unit norm.
"""

import contextlib
import datetime
import hashlib
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from cir_jax import loading
from cir_jax.composers.base import Composer
from cir_jax.composers.conditions import Conditions
from cir_jax.errors import CirError, ConfigError, DataError, unknown
from cir_jax.input import images
from cir_jax.library import asking, photos
from cir_jax.library.explaining import Alone, Order
from cir_jax.library.indexes import ladder
from cir_jax.library.indexes.base import Index
from cir_jax.library.indexes.opened import Opened
from cir_jax.library.photos import File
from cir_jax.library.plan import Plan
from cir_jax.library.store import New, Store
from cir_jax.library.vectors import Kept, Vectors
from cir_jax.retrieval import encoders, features, ranking
from cir_jax.retrieval.composing import Picture
from cir_jax.retrieval.search import Searcher
from cir_jax.storage.places import default_library_dir

CONTROLS = tuple(
    name for name in Conditions.__dataclass_fields__ if name not in ("mask", "negative_text")
)
"""What `search` passes on to methods that take it: see `composers.conditions.Conditions`."""

EDITS = ("at night", "is red", "two of them", "seen from above", "a drawing of it")
"""What `Library.check` asks of photos."""


class Update(NamedTuple):
    """What an update found. problems: files (or folders) that could not be read, and why; of those
    that were so before, nothing is said again. left_out: what is no photo to us -> how many."""

    photos: int
    added: int
    changed: int
    renamed: int
    deleted: int
    decoded: int
    problems: list[tuple[Path, str]]
    left_out: dict[str, int]


class Results(list):
    """(path, score), best first. approximate: what of the query is vector arithmetic instead of the
    method's own way, "" = nothing. numbers: of the photos in the store. explained: by "image" and
    "text" what each alone would give, where a query of both was to be explained."""

    approximate: str = ""
    numbers: Sequence[int] = ()
    explained: Mapping[str, Alone] = types.MappingProxyType({})


class Library:
    """The photos below a folder. `update` brings it up to date, `search` asks it.

    composer: what `cir_jax.load` gives; or what it takes, a workdir or a method's name, with the
    backbone that its config names, which without a preset is the embedded world's.
    store: its file; None = one of the folder's name in `places.default_library_dir()`.
    index: what it is searched with, `ladder.NAMES`; "" = an exact scan up to 2 million photos.
    beside: another method's library of this folder: they share the store and the open indexes.
    say: is told of an index that is made anew.
    Raises DataError as `Store`, ConfigError for an index that is none, lacks its package or cannot
    rank as the method does, and what `cir_jax.load` raises.
    """

    def __init__(
        self,
        folder: str | Path,
        composer: Searcher | str | Path,
        *,
        store: Path | None = None,
        index: str = "",
        beside: "Library | None" = None,
        say: Callable[[str], None] = logging.warning,
    ):
        ladder.check_name(index)
        self.folder = Path(folder).expanduser().resolve()
        if beside is None:
            file = store_of(self.folder) if store is None else Path(store).expanduser()
            self.store = Store(file)
            self._indexes = Opened(self.store)
        else:
            self.store, self._indexes = beside.store, beside._indexes
        searcher = composer if isinstance(composer, Searcher) else loading.load(composer)
        self.searcher, self.composer = searcher, searcher.composer
        method = type(self.composer)
        shared = features.uses_backbone_gallery(self.composer)
        self._plain = Kept(
            self.store,
            encoders.of_backbone(
                self.composer.backbone, searcher.frozen["backbone"], searcher.mesh
            ),
        )
        self._own = self._plain
        if not shared:
            made = (self.composer, searcher.params, searcher.frozen, searcher.mesh)
            self._own = Kept(self.store, encoders.of_composer(*made))
        self._embeds = shared and method.embed_features is not Composer.embed_features
        self._by_cosine = method.score is Composer.score
        self._scoring = {}
        if not self._by_cosine:
            self._scoring = ranking.scoring(self.composer, searcher.params)
        self._rung, self._say = index, say
        self._ask = asking.Asking(searcher, self._by_cosine, self._gallery_is_its_own)

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._indexes.close()
        self.store.close()

    def __len__(self) -> int:
        """Photos that are found by image or by text alone."""
        return len(self._index(own=False))

    def update(
        self, *, retry: bool = False, max_megapixels: float | None = None, label: str = ""
    ) -> Update:
        """Brings the store up to date with the folder; stopped anywhere, it goes on from there.

        A file whose size and time are known is not opened. A new one of a size that is known is
        read, and decoded if no known one has its content. All else is decoded, and kept batch by
        batch. retry: files that could not be read before, too. max_megapixels: photos above are not
        decoded, None = 200. label: of the progress bar, "" = none.
        Raises DataError where the store cannot be written or another process indexes, where there
        is no folder, and where all of its photos are gone at once: a disk may be missing.
        """
        if self.store.reads_only:
            raise DataError(f"{self.store.reads_only}: what is in it can be searched as it is.")
        with self.store.indexing() as alone:
            if not alone:
                raise Busy(f"{self.folder}: another process is indexing it.")
            if retry or max_megapixels is not None:
                self.store.forget_problems()
            try:
                with images.limited(max_megapixels):
                    return self._update(label)
            finally:
                self._indexes.outdated()

    def _update(self, label: str) -> Update:
        found = photos.walk(self.folder)
        known = self.store.photos()
        if known and not found.files and not found.closed:
            raise DataError(
                f"{self.folder}: no photo is left of {len(known)}. Is a disk not there? If they "
                f"are really gone, delete {self.store.path}."
            )
        plan = Plan(self.folder, found, known)
        if plan.gone or plan.touched or plan.moved or plan.copied:
            self.store.rearrange(plan.gone, plan.touched, plan.moved, plan.copied)
        problems = [(self.folder / os.fsdecode(p), why) for p, why in found.closed.items()]
        decoded = self._encode(self._plain, plan.unknown, problems, label)
        for kept in dict.fromkeys((self._plain, self._own)):
            lacking = [File(*photo[1:4]) for photo in self.store.lacking(kept.number)]
            there = [file for file in lacking if file.path in found.files]
            decoded += self._encode(kept, there, problems, label)
        return Update(
            photos=len(found.files),
            added=plan.added,
            changed=plan.changed,
            renamed=len(plan.moved),
            deleted=plan.deleted,
            decoded=decoded,
            problems=problems,
            left_out=found.left_out,
        )

    def _encode(
        self, kept: Kept, files: Sequence[File], problems: list[tuple[Path, str]], label: str
    ) -> int:
        """Reads these files and keeps a vector of each, or its problem; how many were decoded."""
        if not files:
            return 0
        transform = self.composer.backbone.image_transform
        read: dict[int, photos.Read | OSError] = {}
        blank = np.zeros((transform.crop, transform.crop, 3), np.uint8)

        def load(row: int) -> dict[str, np.ndarray]:
            try:
                read[row] = photos.read(self._path(files[row].path), transform)
            except OSError as error:
                read[row] = error
            pixels = getattr(read[row], "pixels", None)
            return {"image": blank if pixels is None else pixels, "unreadable": pixels is None}

        rows = kept.encoder.rows(
            load,
            len(files),
            lambda row: str(self._path(files[row].path)),
            mesh=self.searcher.mesh,
            batch_size=self.searcher.batch_size,
            label=label,
        )
        first, decoded = 0, 0
        with contextlib.closing(rows):  # its threads end with it, whoever raises
            for piece in rows:
                news, known = [], []
                for row in range(first, first + len(piece)):
                    one = read.pop(row)
                    where = self._path(files[row].path)
                    if isinstance(one, OSError):  # says nothing of the photo: tried again next time
                        problems.append((where, one.strerror or str(one)))
                        continue
                    if one.problem:
                        problems.append((where, one.problem))
                    news.append(New(files[row], one.digest, one.taken, one.problem))
                    known.append(row - first)
                    decoded += not one.problem
                self.store.add(kept.number, news, piece[known])
                first += len(piece)
        return decoded

    @property
    def takes(self) -> frozenset[str]:
        """What `search` takes with this method, beside an image and a text: of `CONTROLS`, and of
        "images", "mask" and "negative"."""
        taken = set(self.composer.conditions) - {"negative_text"}
        if self._by_cosine:
            taken.add("images")
        if "negative_text" in self.composer.conditions or not self._gallery_is_its_own:
            taken.add("negative")
        return frozenset(taken)

    def search(
        self,
        image: Picture | bytes | None = None,
        text: str | None = None,
        *,
        negative: str | Sequence[str] = (),
        images: Sequence[Picture | bytes] = (),
        weights: Sequence[float] | None = None,
        mask: Picture | None = None,
        k: int = 10,
        under: str | Path = "",
        after: str | datetime.date = "",
        min_score: float | None = None,
        dedup: float | None = None,
        concept: str = "",
        explain: bool = False,
        **controls: Any,
    ) -> Results:
        """The k best photos with their scores, best first: cosine similarity for most methods.

        image: the reference, as `Searcher.search` takes it, or a file's bytes; images: several,
        with their `weights`, 1 each by default, below 0 = unlike it. Of a file, all photos with its
        content are left out. text: what should differ; without an image, what to find. negative:
        what should not be seen.
        mask: the region of the image to edit, as it is seen. under: a folder of these photos.
        after: the day they were taken, or later: "2024", "2024-05", "2024-05-17". min_score: of
        what is found. dedup: of photos whose cosine is above this, the best alone. concept: what
        the image and what is looked for share, beside a text; in the prompt as CIRCO's annotators
        had it, "a photo of {concept} $ that {text}". explain: fills `Results.explained`. controls:
        what some methods take, `CONTROLS`.
        Several images are composed one by one and added, and so are negatives but for CompoDiff:
        `Results.approximate` says so.
        Raises CirError without a query, ConfigError for what the method does not take, DataError
        for what cannot be read.
        """
        if wrong := sorted(set(controls) - set(CONTROLS)):
            raise ConfigError(unknown("control of a search", wrong[0], CONTROLS))
        if k < 1:
            raise CirError(f"k={k}: ask for at least one photo.")
        references = asking.references(image, images, weights)
        negatives = [negative] if isinstance(negative, str) else list(negative)
        negatives = [said.strip() for said in negatives if said.strip()]
        opened, left_out = [], []
        for given, weight in references:
            picture, digest = photos.query(given)
            opened.append((picture, weight))
            left_out += self.store.with_digest(digest) if digest else []
        query, own, approximate = self._ask(opened, text, negatives, mask, controls, concept)
        ranked = {"only": self._only(under, after), "without": left_out}
        found = list(self._found(query, self._index(own), ranked, k, min_score, dedup))
        results = Results((path, score) for _, path, score in found)
        results.approximate, results.numbers = approximate, [number for number, *_ in found]
        if explain and opened and (text or "").strip():
            whole = Order.of(query, self._index(own), ranked)
            for name, part in (("image", (opened, None)), ("text", ([], text))):
                query, own, _ = self._ask(*part)
                order = Order.of(query, self._index(own), ranked)
                alone = Alone.of(order, whole, results.numbers, k)
                results.explained = {**results.explained, name: alone}
        return results

    def check(self, k: int = 10, queries: int = 50) -> ladder.Checked:
        """How many of the k best by an exact scan the index finds, and how fast: for photos of the
        library, drawn at random, each with one of EDITS.

        Raises DataError where there is no photo, ConfigError for a method with a score of its own.
        """
        if not self._by_cosine:
            method = type(self.composer).__name__
            raise ConfigError(f"check: {method} ranks by a score of its own, always exactly.")
        known = [photo.path for photo in self.store.photos() if not photo.problem]
        if not known:
            raise DataError(f"{self.folder}: nothing is indexed yet.")
        asked = []
        for i, row in enumerate(np.random.default_rng(0).permutation(len(known))[:queries]):
            picture, _ = photos.query(self._path(known[row]))
            asked.append(self._ask([(picture, 1.0)], EDITS[i % len(EDITS)]).query)
        vectors = self._vectors(self._gallery_is_its_own)
        return ladder.checked(self._index(own=True), vectors, np.concatenate(asked), k)

    @property
    def _gallery_is_its_own(self) -> bool:
        return self._own is not self._plain or self._embeds or not self._by_cosine

    def _found(
        self,
        query: np.ndarray,
        index: Index,
        ranked: dict[str, Any],
        k: int,
        min_score: float | None,
        dedup: float | None,
    ) -> Iterator[tuple[int, Path, float]]:
        # few different numbers, so that few programs are compiled
        most = max(64, 1 << (4 * k if dedup is not None else k).bit_length())
        while True:
            top = index.search(query, most, **ranked)
            ids = top.ids[0][top.ids[0] >= 0]
            there, scores = len(ids), top.scores[0][: len(ids)]
            if min_score is not None:
                ids = ids[scores >= min_score]
            kept = range(len(ids)) if dedup is None else self._distinct(ids, k, dedup)
            if len(kept) >= k or len(ids) < there or there < most:  # enough, or all there are
                break
            most *= 4
        chosen = [(int(ids[i]), float(scores[i])) for i in kept[:k]]
        paths = self.store.paths(photo for photo, _ in chosen)
        for path, (photo, score) in zip(paths, chosen, strict=True):
            if path is not None:  # it went since the index was brought up to date
                yield photo, self._path(path), score

    def _distinct(self, ids: np.ndarray, k: int, most: float) -> list[int]:
        """Positions in `ids` of at most k photos no two of which are more alike than that."""
        vectors = self._vectors(other=False).of(ids)
        kept: list[int] = []
        for i, vector in enumerate(vectors):
            if len(kept) < k and not (vectors[kept] @ vector > most).any():
                kept.append(i)
        return kept

    def _only(self, under: str | Path, after: Any) -> np.ndarray | None:
        """The photos that may be found; None = all."""
        if not (under or after):
            return None
        folder, day = self._below(under), _day(after)
        return self.store.chosen(folder, day)

    def _below(self, under: str | Path) -> bytes:
        """A folder below ours, as paths in the store have it. Raises DataError for any other."""
        where = Path(os.path.normpath(self.folder / Path(under).expanduser()))
        if where == self.folder:
            return b""
        if where.is_relative_to(self.folder):
            below = os.fsencode(where.relative_to(self.folder))
            if where.is_dir() or len(self.store.chosen(below)):
                return below
        raise DataError(f"under={str(under)!r}: no folder of {self.folder}.")

    def _index(self, own: bool) -> Index:
        """What a query is ranked by, up to date."""
        other = own and self._gallery_is_its_own
        vectors = self._vectors(other)

        def make() -> Index:
            return ladder.opened(
                self._rung,
                vectors,
                space=lambda: self._space(other),
                scoring=self._scoring if other else {},
                method=type(self.composer).__name__,
                mesh=self.searcher.mesh,
                say=self._say,
            )

        return self._indexes.get(self if other else self._plain.identity, vectors, make)

    def _space(self, other: bool) -> str:
        """Names what vectors are of."""
        if not (other and self._embeds):
            return (self._own if other else self._plain).identity
        made = (self.composer, self.searcher.params, self.searcher.frozen, self.searcher.mesh)
        return encoders.of_composer(*made).identity

    def _vectors(self, other: bool) -> Vectors:
        """Of the backbone, or the method's own."""
        if other and (self._own is not self._plain or self._embeds):
            return Vectors(self.store, self._own.number, self._embedded)
        return Vectors(self.store, self._plain.number)

    def _embedded(self, raw: np.ndarray) -> np.ndarray:
        """What the method ranks by, of rows of its encoder."""
        if not self._embeds:
            return raw
        made = (self.composer, self.searcher.params, self.searcher.frozen)
        return features.embedded(*made, raw, mesh=self.searcher.mesh)

    def _path(self, below: bytes) -> Path:
        return self.folder / os.fsdecode(below)


class Busy(DataError):
    """Another process is indexing the folder."""


def _day(after: Any) -> str:
    """As the store compares it. Raises ConfigError for what is no date."""
    said = after.isoformat() if isinstance(after, datetime.date) else str(after)
    for form in ("%Y", "%Y-%m", "%Y-%m-%d"):
        try:
            datetime.datetime.strptime(said[:10], form)
        except ValueError:
            continue
        return said
    if not said:
        return ""
    raise ConfigError(f"after={said!r}: expected a day such as 2024-05-17, 2024-05 or 2024.")


def store_of(folder: Path) -> Path:
    """Where the store of a folder lies, if nobody says."""
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return default_library_dir() / f"{folder.name or 'root'}-{name}.sqlite"
