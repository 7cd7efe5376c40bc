"""RTD's filter: whether a caption survives its own inversion (arXiv 2406.09188, appendix A.2).

    cos(text(caption), text("a photo of $", $ = phi(text(caption) + u n)))  >=  0.75,
    u ~ Unif(0, 1), n ~ N(0, I), phi of a trained LinCIR

for both captions of a triplet.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cir_jax.composers.base import normalise
from cir_jax.composers.lincir import LinCir
from cir_jax.errors import ConfigError
from cir_jax.input.keywords import clean
from cir_jax.loading import load
from cir_jax.sharding.constraints import rows_over
from cir_jax.sharding.mesh import replicated
from cir_jax.sharding.rows import map_rows
from cir_jax.weights import finite
from cir_jax.weights.fingerprint import fingerprint

THRESHOLD = 0.75
BATCH = 256


class InversionFilter:
    """what, weights: as `cir_jax.load`'s: a workdir of LinCIR, or a preset with official weights.

    Raises ConfigError for another method.
    """

    def __init__(self, what: str, weights: str | None = None):
        loaded = load(what, weights=weights)
        self.composer = loaded.composer
        if not isinstance(self.composer, LinCir):
            raise ConfigError(
                f"--filter={what}: a {type(self.composer).__name__}, expected a LinCIR, whose "
                "network inverts text features: a workdir of experiments/lincir.py, or "
                "--filter=lincir:vit_l14 --filter_weights=lincir_large.pt."
            )
        self.mesh, self.params, self.frozen = loaded.mesh, loaded.params, loaded.frozen
        phi = fingerprint(self.params)
        self.identity = {**self.composer.backbone.identity, "phi": phi}

    def similarities(self, captions: Sequence[str], streams: Sequence[str]) -> np.ndarray:
        """float32[captions]: cosines. streams: names of the noise of each caption."""
        backbone = self.composer.backbone
        token_ids = backbone.tokenizer([clean(c, backbone.tokenizer) for c in captions])
        prompt = backbone.tokenizer([self.composer.prompt("")])[0]

        def row(i: int) -> dict[str, np.ndarray]:
            seed = hashlib.sha256(streams[i].encode()).digest()
            rng = np.random.default_rng(int.from_bytes(seed[:8], "little"))
            noise = rng.random() * rng.standard_normal(backbone.dim)
            return {"token_ids": token_ids[i], "noise": noise.astype(np.float32), "prompt": prompt}

        pieces = map_rows(
            lambda batch: _cosines(self.composer, self.mesh, self.params, self.frozen, batch),
            row,
            len(captions),
            mesh=self.mesh,
            batch_size=BATCH,
        )
        what = "text features of captions and of their inversions"
        pieces = finite.checked(pieces, 0, what, backbone, lambda i: repr(captions[i]))
        return np.concatenate([np.zeros((0, 1), np.float32), *pieces])[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cosines(
    composer: LinCir, mesh: Mesh, params: Any, frozen: Any, batch: dict[str, jax.Array]
) -> jax.Array:
    with rows_over(mesh), composer.backbone.full_precision():
        tower = frozen["backbone"]
        caption = composer.backbone.encode_text(tower, batch["token_ids"])
        words = composer.words(params, composer.network_input(caption + batch["noise"]))
        inverted = composer.text_features(tower, batch["prompt"], words)
        cosine = jnp.sum(normalise(caption) * normalise(inverted), axis=-1, keepdims=True)
    return jax.lax.with_sharding_constraint(finite.marked(cosine), replicated(mesh))
