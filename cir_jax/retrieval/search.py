"""Composed search in one's own images: index a folder once, then one call per query."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from cir_jax.composers.base import Composer, Params
from cir_jax.composers.conditions import Conditions
from cir_jax.errors import CirError, DataError
from cir_jax.input import images
from cir_jax.retrieval import features, ranking
from cir_jax.retrieval.composing import Composing, Picture
from cir_jax.sharding.mesh import make_mesh
from cir_jax.sharding.placement import on_mesh
from cir_jax.storage.places import default_cache_dir


class Files(Sequence):
    """Image files as records {"image": bytes}, read when asked for."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        try:
            return {"image": self.paths[index].read_bytes()}
        except OSError as error:
            raise DataError(f"{self.paths[index]}: cannot be read ({error.strerror}).") from error

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def identity(self) -> str:
        """Paths, sizes and times: a changed file is another list."""
        digest = hashlib.sha256()
        for path in self.paths:
            try:
                stat = path.stat()
                digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(f"{path} missing\n".encode())
        return f"files {digest.hexdigest()}"


class Searcher:
    """Finds images by an image, a text, or both.

    mesh: None = all devices. cache_dir: where features are stored; None = the user's cache.
    batch_size: global. seed: of methods that draw noise.
    """

    def __init__(
        self,
        composer: Composer,
        params: Params,
        frozen: Params,
        *,
        mesh: Mesh | None = None,
        cache_dir: Path | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ):
        self.composer, self.seed, self.batch_size = composer, seed, batch_size
        self.mesh = make_mesh({"data": -1}) if mesh is None else mesh
        self.params, self.frozen = on_mesh(self.mesh, params), on_mesh(self.mesh, frozen)
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
        self.composing = Composing(composer, self.params, self.frozen, self.mesh, seed)
        self._scoring = ranking.scoring(composer, params)
        self.paths: list[Path] = []
        self.unreadable: list[Path] = []
        self._gallery: np.ndarray | None = None
        self._plain: np.ndarray | None = None

    def index(
        self, where: str | Path | Sequence[str | Path], max_megapixels: float | None = None
    ) -> int:
        """Indexes a folder (with its subfolders) or a list of files; returns how many images.

        Features are stored: an interrupted or repeated call goes on where it stood. Files that do
        not decode are skipped, logged by name and kept in `unreadable`; so are images of more than
        max_megapixels (None = 200).
        Raises DataError when there is no folder, or no readable image in it.
        """
        paths = find(where)
        source = Files(paths)
        options = dict(
            mesh=self.mesh,
            batch_size=self.batch_size,
            cache_dir=self.cache_dir,
            skip_unreadable=True,
        )
        with images.limited(max_megapixels):
            gallery, plain = self._features(source, options)
        good = ~np.isnan(gallery[:, 0])
        unreadable = [path for path, fine in zip(paths, good, strict=True) if not fine]
        for path in unreadable:
            logging.warning("skipped, not a readable image, or too large: %s", path)
        if unreadable:
            logging.warning("skipped %d of %d files", len(unreadable), len(paths))
        if not good.any():
            raise DataError(f"none of the {len(paths)} files is a readable image: {paths[0]}, ...")
        self.paths = [path for path, fine in zip(paths, good, strict=True) if fine]
        self.unreadable = unreadable
        self._gallery, self._plain = gallery[good], plain[good]
        return len(self.paths)

    def search(
        self,
        image: Picture | None = None,
        text: str | None = None,
        k: int = 10,
        max_megapixels: float | None = None,
        *,
        guidance: tuple[float, float] | None = None,
        negative_text: str | None = None,
        mask: Picture | None = None,
        steps: int | None = None,
        samples_per_query: int | None = None,
        seed: int | None = None,
        source_mixing: float | None = None,
        noised_reference: float | None = None,
        alpha: float | None = None,
    ) -> list[tuple[Path, float]]:
        """The k best images with their scores, best first (cosine similarity for most methods).

        image: the reference: a file, a PIL image, or an array [height, width, 3] of uint8, or of
        floats in [0, 1]. text: what to change. One of them may be None: then the search is by the
        other alone. max_megapixels: of the reference, None = 200.
        The others are conditions that some methods take, CompoDiff all but the last; None = as the
        method is set. guidance: weights of image and text. negative_text: what the results should
        not show. mask: the region of the reference to edit, a black and white PNG of its size,
        white = edit. steps: of denoising. samples_per_query: that are averaged. seed: of the noise.
        source_mixing: share of the reference in the result. noised_reference: share of the
        diffusion that the reference is spared, from which it then starts. alpha: share of the text
        in an interpolation (Slerp, TAT).
        Raises CirError without an index or a query and for a condition that the method does not
        take, DataError for an image or a mask that cannot be read.
        """
        conditions = Conditions(
            guidance=guidance,
            negative_text=negative_text,
            mask=mask,
            steps=steps,
            samples_per_query=samples_per_query,
            seed=seed,
            source_mixing=source_mixing,
            noised_reference=noised_reference,
            alpha=alpha,
        )
        if self._gallery is None or self._plain is None:
            raise CirError("nothing is indexed yet: call index(folder) first.")
        if k < 1:
            raise CirError(f"k={k}: ask for at least one image.")
        query, own = self.composing.compose(image, text, conditions, max_megapixels)
        # few different k, so that few programs are compiled
        most = max(64, 1 << (k - 1).bit_length())
        if own:
            ranked = ranking.rank(query, self._gallery, k=most, **self._scoring)
        else:
            ranked = ranking.rank(query, self._plain, k=most)
        found = zip(ranked.top[0][:k], ranked.scores[0][:k], strict=True)
        return [(self.paths[i], float(score)) for i, score in found if i >= 0]

    def query(self, image: Picture, text: str) -> np.ndarray:
        """What the gallery is ranked by for an image, as `search` takes it, and a text:
        float32[1, dim], of unit norm for most methods. Needs no index."""
        return self.composing.compose(image, text).features

    def _features(self, source: Files, options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Of the gallery, as the method embeds it and as the backbone does."""
        composer = self.composer
        # queries of one modality live in the backbone's own space
        raw = features.image_features(composer.backbone, self.frozen["backbone"], source, **options)
        own = features.gallery_features(
            composer, self.params, self.frozen, source, raw=raw, **options
        )
        return own, features.unit(raw)


def find(where: str | Path | Sequence[str | Path]) -> list[Path]:
    """The image files of a folder and its subfolders, in the order of their names; a list as it is.

    Raises DataError where there is no such folder, or no such file in it.
    """
    if not isinstance(where, str | Path):
        found = [Path(path) for path in where]
    else:
        folder = Path(where).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder. Give a folder of images, or a list of files."
            )
        # sorted: the order decides ties, and the name of the cache
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in images.SUFFIXES and path.is_file()
        )
    if not found:
        raise DataError(
            f"{where}: no images. Give a folder that holds files ending in "
            f"{', '.join(sorted(images.SUFFIXES))}, or a list of files."
        )
    return found
