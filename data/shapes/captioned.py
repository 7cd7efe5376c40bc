"""Image-caption pairs of the embedded world: the tables `pretrain` and `captions`.

Record i is a pure function of (table, split, i). Records 2k and 2k + 1 belong together: in
TWIN_RATE of these pairs the second is the first without one shape, and short captions say so ("a
photo with a star", "a photo without a star"). A loader that keeps pairs in one batch lets a
contrastive loss see both.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from data.shapes.language import caption, detailed_caption, shape_caption
from data.shapes.render import encode_png, render
from data.shapes.scene import SHAPES, Scene, jitter, pick_other, sample_scene, stream

CAPTIONS = 8  # per scene; the first is the detailed one
TWIN_RATE = 0.3
_TWIN_CAPTIONS = 3  # of the other seven


def without(rng: random.Random, scene: Scene, shape: int) -> Scene:
    """Returns the scene without that shape; if nothing would be left, with another in its place."""
    things = tuple(t for t in scene.things if t.shape != shape)
    if not things:
        other = pick_other(rng, len(SHAPES), *scene.shapes)
        things = tuple(replace(t, shape=other) for t in scene.things)
    return jitter(rng, replace(scene, things=things))


def _captions(rng: random.Random, scene: Scene) -> list[str]:
    return [detailed_caption(scene), *(caption(rng, scene) for _ in range(CAPTIONS - 1))]


def scene_pair(table: str, split: str, k: int) -> list[tuple[Scene, list[str]]]:
    """Returns the scenes and captions of records 2k and 2k + 1."""
    rng = stream("shapes", table, split, k)
    first = sample_scene(rng)
    if rng.random() >= TWIN_RATE:
        return [(scene, _captions(rng, scene)) for scene in (first, sample_scene(rng))]
    shape = first.things[-1].shape
    pair = []
    for scene in (first, without(rng, first, shape)):
        captions = _captions(rng, scene)
        for i in range(_TWIN_CAPTIONS):
            captions[-1 - i] = shape_caption(rng, shape, shown=scene is first)
        pair.append((scene, captions))
    return pair


def scenes(table: str, split: str, size: int) -> Iterator[tuple[Scene, list[str]]]:
    """Yields the first `size` scenes of the table with their captions (size is even)."""
    for k in range(size // 2):
        yield from scene_pair(table, split, k)


def records(table: str, split: str, size: int) -> Iterator[dict]:
    """Yields the records of the table."""
    for i, (scene, captions) in enumerate(scenes(table, split, size)):
        yield {"id": i, "image": encode_png(render(scene)), "captions": captions}
