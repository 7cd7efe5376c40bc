"""An in-memory benchmark of coloured tiles, and a composer whose answers are known."""

import io

import jax
import numpy as np
from PIL import Image

from cir_jax.composers.base import Composer, normalise
from cir_jax.evaluation import protocols
from cir_jax.evaluation.benchmarks import Benchmark, Query

COLOURS = ("red", "green", "blue")


def tile(rng, channel, size=16):
    """An encoded image, mostly of one colour."""
    pixels = rng.integers(0, 60, (size, size, 3), np.uint8)
    pixels[..., channel] += 180
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def gallery(count=45, seed=0):
    """Image i is of colour i % 3."""
    rng = np.random.default_rng(seed)
    return [{"id": i, "image": tile(rng, i % 3), "caption": COLOURS[i % 3]} for i in range(count)]


def queries(protocol, count=14, size=45):
    """ "make it {colour}": the single target has the colour, so have the other ground truths."""
    rng = np.random.default_rng(1)
    made = []
    for i in range(count):
        colour = i % 3
        same = [int(x) for x in rng.permutation(np.arange(colour, size, 3))]
        reference = int(rng.choice(np.arange((colour + 1) % 3, size, 3)))
        others = [int(x) for x in rng.permutation(size) if x % 3 != colour and x != reference]
        targets = same[: 1 + i % 4] if protocol.precision else same[:1]
        made.append(
            Query(
                id=100 + i,
                reference=reference,
                texts=(f"make it {COLOURS[colour]}",)
                if protocol.captions == "single"
                else (f"make it {COLOURS[colour]}.", "has no star"),
                targets=tuple(targets),
                candidates=(targets[0], *others[:4])
                + ((reference,) if protocol.remove_reference else ()),
                category="even" if targets[0] % 2 == 0 else "odd",
                aspects=("addition",) if i % 2 else ("negation", "addition"),
            )
        )
    return tuple(made)


def benchmark(protocol=protocols.CIRCO, **changes):
    """The world under one protocol; categories are the parity of the gallery position."""
    size = 45
    arguments = dict(
        name=f"tiles/{protocol.name}",
        split="val",
        protocol=protocol,
        gallery=gallery(size),
        queries=queries(protocol),
        categories=tuple(frozenset({"even" if i % 2 == 0 else "odd"}) for i in range(size)),
        source="tiles.json",
    )
    return Benchmark(**(arguments | changes))


class ColourOracle(Composer):
    """Knows the world: gallery features are mean colours, a query is the colour the text names."""

    calls = 0

    def compose(self, params, frozen, query, rng):
        type(self).calls += 1  # counts traces
        names = [self.backbone.tokenizer.id_of(colour) for colour in COLOURS]
        ids = query["token_ids"][:, :, None] == np.asarray(names)[None, None, :]
        return normalise(ids.any(axis=1).astype(np.float32))

    def embed_gallery(self, params, frozen, images):
        return normalise(images.astype(np.float32).mean(axis=(1, 2)))


def mesh(devices):
    from cir_jax.sharding.mesh import make_mesh

    return make_mesh({"data": -1}, jax.devices()[:devices])
