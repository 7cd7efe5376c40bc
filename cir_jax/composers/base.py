"""The protocol every composed-retrieval method fulfils; all the rest is written once.

A composer holds no parameters: `params` (trainable, from `init`) and `frozen` (beside them, never
in the optimiser) are arguments of every function. Training and evaluation call the same `compose`.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cir_jax.models.backbone import Backbone
from cir_jax.sharding.constraints import split_rows

Params = Any
Query = dict[str, jax.Array]
"""One batch of queries, named arrays:

reference_images   uint8[batch, height, width, 3], or instead of them
reference_features float32[batch, dim], un-normalised image features (precomputed)
token_ids          int32[batch, length] of the modification text in the composer's prompt
query_index        int32[batch], optional: number of the query in its benchmark, so that the noise
                   of a query does not depend on its batch
word_row           int32[batch], for composers with `word_rows`: what it gives
"""


def normalise(x: jax.Array) -> jax.Array:
    """Unit L2 norm along the last axis; a zero vector stays zero instead of NaN."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def in_parts(function: Callable[..., Params], rows: tuple[Any, ...], parts: int) -> Params:
    """function(*rows), trees of arrays [rows, ...], so many parts one after the other.

    parts > 1 holds the activations of one part alone: each is computed again in the backward pass.
    """

    def run(rows: tuple[Any, ...]) -> Params:
        return split_rows(function(*split_rows(rows)))

    if parts == 1:
        return run(rows)

    def split(x: jax.Array) -> jax.Array:
        # part i takes every n-th row: each part lies on all devices, nothing moves
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def merge(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    found = jax.lax.map(jax.checkpoint(run), jax.tree.map(split, rows))
    return split_rows(jax.tree.map(merge, found))


class Composer:
    """One method. Subclasses are final; what the gallery becomes (`embed_features` of features, or
    `embed_gallery` of images) and `score` have defaults to replace. A method whose score is no dot
    product says with `joined` what several texts of one query are."""

    pretrained_backbone: bool = True
    """Whether `freeze` wants the weights of the backbone; False = it is trained from scratch."""

    tunes_backbone: bool = False
    """Whether `encoders` are others than the frozen ones, so that no features can be stored or
    shared: queries, galleries and training rows come as images."""

    reads_images: bool = False
    """Whether queries come as images although the backbone's features could be stored: the method
    sees them with an encoder of its own, or sees more than those."""

    word_rows: Callable[[Sequence[str]], np.ndarray] | None = None
    """Names of the reference images -> int32[batch], for composers that know images by their names;
    raises DataError for names that are not known. Evaluation alone has names."""

    edits_reference: bool = False
    """Whether `edit` changes the reference images before the backbone sees them: then the features
    of a query's reference are those of the edited image."""

    pools_text: bool = True
    """Whether text counts up to its end token only; False = padded positions count, too."""

    trained: bool = False
    """Whether the method has parameters to train; False = no workdir is needed."""

    alone: bool = False
    """Whether `compose` answers text without an image (`has_reference` False) and an image without
    text (the empty text) in its own way; other methods' such queries are answered by features."""

    conditions: tuple[str, ...] = ()
    """What a query may say beside image and text: fields of `composers.conditions.Conditions`."""

    inference_settings: tuple[str, ...] = ()
    """Arguments of the constructor that a trained workdir may be evaluated with other values of:
    they change how queries are composed, not what was learned."""

    speed_settings: tuple[str, ...] = ()
    """Arguments of the constructor that trade memory for speed: no result depends on them."""

    settings: Mapping[str, Any] = types.MappingProxyType({})
    """Its name and arguments of the constructor, as `composers.build` was given them."""

    official_format: str = ""
    """What checkpoints of the method's authors look like, for messages; "" = there are none."""

    official_files: tuple[str, ...] = ()
    """Names of the weights in the directory or hub repository of the method's authors, where they
    are published so."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def share(self) -> None:
        """Settings that all methods of a kind have; `composers.build` gives them."""

    def varied(self, **settings: Any) -> "Composer":
        """The same with other `inference_settings`, over the same parameters."""
        raise TypeError(f"{type(self).__name__} has no settings of a query")

    @classmethod
    def for_others(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a composer that answers alike with the trained parameters, and reads no
        file that only training needs. Raises ConfigError for what others cannot be given."""
        return dict(settings)

    def write_files(self, directory: Path) -> dict[str, str]:
        """Writes what every query needs beside parameters, for others: argument of the constructor
        ("word.phrases": of the method inside) -> name of its file in `directory`, which is there;
        "" = the argument is not needed."""
        del directory
        return {}

    def contents(self) -> dict[str, str]:
        """What was read beside the backbone's weights, by name: hashes of it. A run goes on with
        the same."""
        return {}

    def prompt(self, text: str) -> str:
        """The text that is tokenised for a modification text; plain by default."""
        return self.backbone.tokenizer.plain(text)

    def edit(self, image: Image.Image, text: str, stream: str) -> Image.Image:
        """The reference image after the modification text; all that is random from the stream of
        that name. For composers that `edits_reference`; on the host, not in parallel."""
        raise TypeError(f"{type(self).__name__} edits no images")

    def freeze(self, backbone_params: Params, shapes_only: bool = False) -> Params:
        """The tree `frozen`: parameters beside the trainable ones, never in the optimiser.

        shapes_only: zeros in place of what takes time to compute, for a dry run.
        """
        del shapes_only
        return {"backbone": backbone_params}

    def init(self, rng: jax.Array) -> Params:
        """Trainable parameters; an empty tree for training-free methods."""
        del rng
        return {}

    def start(self, rng: jax.Array, frozen: Params) -> Params:
        """What training begins with: `init`, unless a method trains what it finds in `frozen`."""
        del frozen
        return self.init(rng)

    def for_one_query(self, params: Params) -> Params:
        """Trainable parameters as `compose` reads them fastest for one query at a time on a CPU:
        the same numbers but for rounding. Not for training, nor for files."""
        return params

    def take_over(self, given: Params, frozen: Params) -> Params:
        """What training begins with where the stage before gave a result, or `read_official` did;
        methods that take over less than all say here how."""
        del frozen
        return given

    def read_official(self, path: Path, frozen: Params) -> Params:
        """Trainable parameters from a checkpoint of the authors; see `composers.official`."""
        raise TypeError(f"{type(self).__name__} has no official_format")

    def exports_by_torch(self, path: Path) -> bool:
        """Whether `write_official` needs PyTorch, which alone writes its files."""
        del path
        return True

    def write_official(self, path: Path, params: Params, frozen: Params) -> None:
        """The inverse of `read_official`; params and frozen are on the host."""
        raise TypeError(f"{type(self).__name__} has no official_format")

    def encode(
        self, params: Params, frozen: Params, batch: dict[str, jax.Array], rngs: jax.Array
    ) -> Params:
        """What each row contributes to the loss: a tree of arrays [batch, ...].

        rngs: one random key per row, so that nothing depends on how rows are grouped.
        """
        raise TypeError(f"{type(self).__name__} is training-free: it has no loss")

    def objective(self, params: Params, rows: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss and scalar metrics of all rows of the global batch (all negatives)."""
        raise TypeError(f"{type(self).__name__} is training-free: it has no loss")

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: dict[str, jax.Array],
        rng: jax.Array,
        microbatches: int = 1,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss and metrics of a global batch: `objective` of the encoded rows.

        microbatches > 1 encodes that many parts one after the other and again in the backward pass,
        so that only one part's activations are held; the objective still sees all negatives, and
        loss and gradients are those of the whole batch (GradCache, arXiv 2101.06983).
        """
        return self.objective(params, self.rows(params, frozen, batch, rng, microbatches))

    def rows(
        self,
        params: Params,
        frozen: Params,
        batch: dict[str, jax.Array],
        rng: jax.Array,
        microbatches: int,
    ) -> Params:
        """`encode` of a global batch, a key for each row."""
        rngs = jax.random.split(rng, len(next(iter(batch.values()))))
        return in_parts(
            lambda batch, rngs: self.encode(params, frozen, batch, rngs),
            (batch, rngs),
            microbatches,
        )

    def settled(self, params: Params, metrics: Params) -> tuple[Params, Params]:
        """After an update: parameters with what a step leaves in them beside the optimizer (running
        statistics), which came with the metrics; and the metrics, scalars alone."""
        return params, metrics

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        """What `score` compares with the gallery: float32[batch, dim] of unit norm by default."""
        raise TypeError(f"{type(self).__name__} does not say how to compose a query")

    def embed_gallery(self, params: Params, frozen: Params, images: jax.Array) -> jax.Array:
        """uint8[n, height, width, 3] -> what the gallery is ranked by: `embed_features` of the
        backbone's features."""
        raw = self.backbone.encode_image(self.encoders(params, frozen), images)
        return self.embed_features(params, frozen, raw)

    def encoders(self, params: Params, frozen: Params) -> Params:
        """Parameters of the backbone: the frozen ones, unless the method `tunes_backbone`."""
        del params
        return frozen["backbone"]

    def embed_features(self, params: Params, frozen: Params, features: jax.Array) -> jax.Array:
        """Un-normalised features of `encoders`, float32[n, dim] -> what the gallery is ranked by:
        themselves, of unit norm. Features are computed once and serve all methods."""
        del params, frozen
        return normalise(features)

    def score(self, params: Params, query: jax.Array, gallery: jax.Array) -> jax.Array:
        """float32[batch, dim], float32[n, dim] -> float32[batch, n]: cosine similarity.

        Called on blocks of the gallery. Scores of images that do not count, and queries of zeros,
        must be finite.
        """
        del params
        return query @ gallery.T

    def joined(self, queries: np.ndarray) -> np.ndarray:
        """Several texts of one query, composed: float32[queries, texts, width] -> [queries, ...].

        A query with fewer texts has zeros. By default the mean, of unit norm: its dot product ranks
        as the mean of the texts' scores does, which is what others are to give.
        """
        total = queries.sum(axis=1)
        square = np.sum(np.square(total), axis=-1, keepdims=True)
        return (total / np.sqrt(np.maximum(square, 1e-24))).astype(np.float32)

    def reference_features(self, frozen: Params, query: Query) -> jax.Array:
        """Un-normalised image features float32[batch, dim] of the reference images."""
        if "reference_features" in query:
            return query["reference_features"]
        return self.backbone.encode_image(frozen["backbone"], query["reference_images"])

    def target_features(self, frozen: Params, batch: dict[str, jax.Array]) -> jax.Array:
        """Likewise of the target images of a training batch."""
        if "target_features" in batch:
            return batch["target_features"]
        return self.backbone.encode_image(frozen["backbone"], batch["target_images"])
