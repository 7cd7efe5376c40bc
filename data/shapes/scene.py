"""The scene model of the embedded world: what can be seen in an image, and how scenes are drawn.

Everything is a pure function of a named random stream. Only `Random.random()` is used, whose
sequence Python guarantees for a given seed: the world is the same everywhere.
"""

import dataclasses
import random
from collections.abc import Sequence
from typing import TypeVar

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("small", "large")
POSITIONS = ("top left", "top right", "bottom left", "bottom right", "middle")
BACKGROUNDS = ("black", "navy", "brown", "olive", "gray", "white")  # from dark to bright

MIDDLE = 4
QUADRANTS = (0, 1, 2, 3)
REGIONS = {
    "left": frozenset({0, 2}),
    "right": frozenset({1, 3}),
    "top": frozenset({0, 1}),
    "bottom": frozenset({2, 3}),
    "middle": frozenset({MIDDLE}),
}
MAX_THINGS = 3
_COUNT_CDF = (0.45, 0.85, 1.0)  # one, two or three things
_SAME_PAIR = 0.25  # of scenes with several things: the first two are of one kind

T = TypeVar("T")


def stream(*key: object) -> random.Random:
    """Returns the random stream of that name, e.g. `stream("pretrain", "train", 17)`."""
    return random.Random("/".join(map(str, key)))


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """Returns one item, each equally likely."""
    return items[int(rng.random() * len(items))]


def pick_other(rng: random.Random, n: int, *excluded: int) -> int:
    """Returns an index of range(n) that is not excluded, each equally likely."""
    return pick(rng, [i for i in range(n) if i not in excluded])


def draw(rng: random.Random, items: Sequence[T], k: int) -> list[T]:
    """Returns k different items in random order."""
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(k)]


@dataclasses.dataclass(frozen=True, slots=True)
class Thing:
    """One object. The first five fields are indices into the tuples above, the rest is nuisance."""

    shape: int
    colour: int
    texture: int
    size: int
    position: int
    dx: float = 0.0  # offset from the position's centre, in image widths
    dy: float = 0.0
    angle: float = 0.0  # radians
    tint: float = 0.0  # brightness, -1..1

    @property
    def kind(self) -> tuple[int, int, int]:
        """Shape, colour and texture: what makes two things "the same"."""
        return self.shape, self.colour, self.texture


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """One to three things at different positions on a background; things[0] is the subject."""

    things: tuple[Thing, ...]
    background: int
    light: tuple[float, float] = (0.0, 0.0)  # direction and strength of the light, each -1..1
    tint: float = 0.0  # brightness of the background, -1..1

    @property
    def subject(self) -> Thing:
        return self.things[0]

    @property
    def shapes(self) -> frozenset[int]:
        return frozenset(t.shape for t in self.things)

    @property
    def content(self) -> tuple:
        """The scene without its nuisance: equal for two photos of the same arrangement."""
        things = sorted((*t.kind, t.size, t.position) for t in self.things)
        return (self.background, *things)


def jitter_thing(rng: random.Random, thing: Thing) -> Thing:
    """Returns the thing with a new exact place, angle and brightness."""
    dx, dy, angle, tint = (2 * rng.random() - 1 for _ in range(4))
    spread = 0.1 if thing.position == MIDDLE else 0.022
    return dataclasses.replace(thing, dx=spread * dx, dy=spread * dy, angle=0.22 * angle, tint=tint)


def jitter(rng: random.Random, scene: Scene) -> Scene:
    """Returns the scene with all nuisance drawn anew: another photo of the same content."""
    light = (2 * rng.random() - 1, 2 * rng.random() - 1)
    things = tuple(jitter_thing(rng, t) for t in scene.things)
    return dataclasses.replace(scene, things=things, light=light, tint=2 * rng.random() - 1)


def sample_thing(rng: random.Random, position: int) -> Thing:
    """Draws a thing of any kind and size at the position (without jitter)."""
    u = rng.random
    return Thing(int(u() * 8), int(u() * 8), int(u() * 3), int(u() * 2), position)


def sample_scene(rng: random.Random) -> Scene:
    """Draws a scene: 1, 2 or 3 things with p = .45, .40, .15; in multiples often two of a kind."""
    u = rng.random()
    count = 1 + (u >= _COUNT_CDF[0]) + (u >= _COUNT_CDF[1])
    if count == 1:
        things = [sample_thing(rng, int(rng.random() * 5))]
    else:
        things = [sample_thing(rng, p) for p in draw(rng, QUADRANTS, count)]
        if rng.random() < _SAME_PAIR:
            first, second = things[:2]
            things[1] = dataclasses.replace(first, size=second.size, position=second.position)
    return jitter(rng, Scene(tuple(things), int(rng.random() * len(BACKGROUNDS))))
