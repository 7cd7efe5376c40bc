"""Scenes with captions of a part of them, and where that part is: the table `masked`.

Record i is a pure function of (split, i). The part is one thing, or the background; the mask is
exact, from the renderer: the pixels where the part is seen.
"""

import random
from collections.abc import Iterator

import numpy as np

from cir_jax.input import masks
from data.shapes.edits import Edit, Goal
from data.shapes.language import goal_caption, instruction, statement
from data.shapes.render import encode_png, object_mask, render
from data.shapes.scene import REGIONS, Scene, sample_scene, stream

CAPTIONS = 4
BACKGROUND_RATE = 0.15


def scenes(split: str, size: int) -> Iterator[tuple[Scene, np.ndarray, list[str]]]:
    """Yields the scenes, where the captions' part of each is seen, and the captions."""
    for i in range(size):
        rng = stream("shapes", "masked", split, i)
        scene = sample_scene(rng)
        yield scene, *_part(rng, scene)


def _part(rng: random.Random, scene: Scene) -> tuple[np.ndarray, list[str]]:
    if rng.random() < BACKGROUND_RATE:
        shown = [object_mask(scene, index) for index in range(len(scene.things))]
        told = [Edit("background", scene.background)]
        says = [(statement, instruction)[i % 2](rng, told) for i in range(CAPTIONS)]
        return ~np.any(shown, axis=0), says
    index = int(rng.random() * len(scene.things))
    return object_mask(scene, index), [_of_thing(rng, scene, index) for _ in range(CAPTIONS)]


def _of_thing(rng: random.Random, scene: Scene, index: int) -> str:
    thing = scene.things[index]
    regions = [places for places in REGIONS.values() if thing.position in places]
    positions = regions[int(rng.random() * len(regions))] if rng.random() < 0.3 else None
    size = thing.size if rng.random() < 0.3 else None
    return goal_caption(rng, Goal(thing.kind, size, positions))


def records(split: str, size: int) -> Iterator[dict]:
    """Yields the records of the table."""
    for i, (scene, mask, captions) in enumerate(scenes(split, size)):
        image = encode_png(render(scene))
        yield {"id": i, "image": image, "mask": masks.pack(mask), "captions": captions}
