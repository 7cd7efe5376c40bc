"""Edits of a scene, the goal they set, and the rule that says which scenes reach it.

An edit is about the subject (things[0]) or the background. A `Goal` holds what a right answer must
show: the subject's kind after the edits, and whatever else the edits mention. All the rest (size,
place, background, other things) is free unless mentioned, as in CIRCO's ground truths.
"""

import dataclasses
import random
from dataclasses import replace

from data.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    MAX_THINGS,
    MIDDLE,
    QUADRANTS,
    REGIONS,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    jitter,
    pick,
    pick_other,
    sample_thing,
)

KINDS = (
    "colour", "texture", "shape", "background", "light", "add", "remove", "count", "more", "size",
    "region",
)  # fmt: skip
BRIGHT, DARK = frozenset({4, 5}), frozenset({0, 1})  # backgrounds nobody would argue about


@dataclasses.dataclass(frozen=True, slots=True)
class Edit:
    """One change. `value` and `other` by kind:

    colour, texture, shape: the new index and the old one; background: new index; light: 1 brighter,
    -1 darker; add: shape and colour of a new thing; remove: the shape that goes; count, more: a
    second subject (value = its shape); size: the new size; region: index into REGIONS.
    """

    kind: str
    value: int
    other: int = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """What a scene must show. None: free."""

    kind: tuple[int, int, int]
    size: int | None = None
    positions: frozenset[int] | None = None
    backgrounds: frozenset[int] | None = None
    counts: frozenset[int] | None = None  # how many things of the subject's kind
    extra: tuple[int, int] | None = None  # shape and colour of another thing
    absent: int | None = None  # a shape that must not be seen

    def reached_by(self, scene: Scene) -> bool:
        """Whether the scene is a right answer."""
        same = [t for t in scene.things if t.kind == self.kind]
        return (
            any(
                (self.size is None or t.size == self.size)
                and (self.positions is None or t.position in self.positions)
                for t in same
            )
            and (self.backgrounds is None or scene.background in self.backgrounds)
            and (self.counts is None or len(same) in self.counts)
            and (self.extra is None or any((t.shape, t.colour) == self.extra for t in scene.things))
            and (self.absent is None or self.absent not in scene.shapes)
        )


def goal_of(scene: Scene, edits: list[Edit]) -> Goal:
    """Returns what the edits of the scene ask for."""
    shape, colour, texture = scene.subject.kind
    asked: dict[str, object] = {}
    for e in edits:
        match e.kind:
            case "colour":
                colour = e.value
            case "texture":
                texture = e.value
            case "shape":
                shape = e.value
            case "background":
                asked["backgrounds"] = frozenset({e.value})
            case "light":
                asked["backgrounds"] = BRIGHT if e.value > 0 else DARK
            case "add":
                asked["extra"] = (e.value, e.other)
            case "remove":
                asked["absent"] = e.value
            case "count":
                asked["counts"] = frozenset({2})
            case "more":
                asked["counts"] = frozenset({2, 3})
            case "size":
                asked["size"] = e.value
            case "region":
                asked["positions"] = list(REGIONS.values())[e.value]
    return Goal((shape, colour, texture), **asked)


def apply_edits(rng: random.Random, scene: Scene, edits: list[Edit]) -> Scene | None:
    """Returns the scene changed as little as the edits allow; None if there is no room for them."""
    goal = goal_of(scene, edits)
    subject = replace(
        scene.subject, **dict(zip(("shape", "colour", "texture"), goal.kind, strict=True))
    )
    if goal.size is not None:
        subject = replace(subject, size=goal.size)
    others = [t for t in scene.things[1:] if t.shape != goal.absent]
    new = []
    if goal.counts:
        new.append(subject)
    if goal.extra:
        new.append(replace(sample_thing(rng, 0), shape=goal.extra[0], colour=goal.extra[1]))
    if 1 + len(others) + len(new) > MAX_THINGS:
        return None
    if goal.positions and subject.position not in goal.positions:
        old, position = subject.position, pick(rng, sorted(goal.positions))
        others = [replace(t, position=old) if t.position == position else t for t in others]
        subject = replace(subject, position=position)
    if others or new:
        taken = {t.position for t in others}
        free = [p for p in QUADRANTS if p not in taken]
        if subject.position == MIDDLE:
            subject = replace(subject, position=free.pop(int(rng.random() * len(free))))
        else:
            free.remove(subject.position)
        new = [replace(t, position=free.pop(int(rng.random() * len(free)))) for t in new]
    background = scene.background
    if goal.backgrounds and background not in goal.backgrounds:
        background = pick(rng, sorted(goal.backgrounds))
    changed = replace(scene, things=(subject, *others, *new), background=background)
    return jitter(rng, changed) if goal.reached_by(changed) else None


def realise(rng: random.Random, goal: Goal) -> Scene:
    """Draws a scene that reaches the goal and is otherwise free."""
    while True:
        count = min(goal.counts) if goal.counts else 1
        size = int(rng.random() * 2) if goal.size is None else goal.size
        things = [Thing(*goal.kind, size, 0) for _ in range(count)]
        if goal.extra:
            things.append(replace(sample_thing(rng, 0), shape=goal.extra[0], colour=goal.extra[1]))
        only = goal.positions == REGIONS["middle"]
        while len(things) < MAX_THINGS and not only and rng.random() < 0.35:
            things.append(sample_thing(rng, 0))
        if len(things) == 1:
            places = [pick(rng, sorted(goal.positions or (*QUADRANTS, MIDDLE)))]
        else:
            places = list(QUADRANTS)
            places = [places.pop(int(rng.random() * len(places))) for _ in things]
        things = [replace(t, position=p) for t, p in zip(things, places, strict=True)]
        background = pick(rng, sorted(goal.backgrounds or range(len(BACKGROUNDS))))
        scene = jitter(rng, Scene(tuple(things), background))
        if goal.reached_by(scene):
            return scene


def _draw_edit(rng: random.Random, scene: Scene, kind: str) -> Edit | None:
    """Draws an edit of that kind, or None where the scene does not allow one."""
    subject, others = scene.subject, scene.things[1:]
    alone = sum(t.kind == subject.kind for t in scene.things) == 1
    match kind:
        case "colour":
            return Edit(kind, pick_other(rng, len(COLOURS), subject.colour), subject.colour)
        case "texture":
            return Edit(kind, pick_other(rng, len(TEXTURES), subject.texture), subject.texture)
        case "shape":
            return Edit(kind, pick_other(rng, len(SHAPES), subject.shape), subject.shape)
        case "background":
            return Edit(kind, pick_other(rng, len(BACKGROUNDS), scene.background))
        case "light" if scene.background in DARK | BRIGHT:
            return Edit(kind, 1 if scene.background in DARK else -1)
        case "light":
            return Edit(kind, pick(rng, (1, -1)))
        case "add":
            shape = pick_other(rng, len(SHAPES), *scene.shapes)
            return Edit(kind, shape, int(rng.random() * len(COLOURS)))
        case "remove":
            gone = [t.shape for t in others if t.shape != subject.shape]
            return Edit(kind, pick(rng, gone)) if gone else None
        case "count" | "more":
            return Edit(kind, subject.shape) if alone and len(others) <= 1 else None
        case "size":
            return Edit(kind, 1 - subject.size)
        case "region":
            regions = list(REGIONS.values())
            away = [i for i, r in enumerate(regions) if subject.position not in r]
            return Edit(kind, pick(rng, away[:-1] if others else away))
    raise ValueError(f"unknown edit kind {kind!r}")


# Of these a text mentions at most one each, or it would contradict itself.
_EXCLUSIVE = (
    {"background", "light"},
    {"count", "more", "add", "remove"},
    {"count", "more", "shape"},
)


def draw_edits(rng: random.Random, scene: Scene, kinds: list[str]) -> list[Edit] | None:
    """Draws one edit of each kind; None if the scene or their combination does not allow them."""
    if any(len(group.intersection(kinds)) > 1 for group in _EXCLUSIVE):
        return None
    edits = [_draw_edit(rng, scene, kind) for kind in kinds]
    return None if None in edits else edits


def facts(rng: random.Random, scene: Scene) -> list[Edit]:
    """Returns edits whose outcome the scene shows, in random order: what captions may claim.

    The "before" (an old colour, a thing that is gone) is made up, as nobody can see it.
    """
    subject = scene.subject
    absent = pick_other(rng, len(SHAPES), *scene.shapes)
    found = [
        Edit("colour", subject.colour, pick_other(rng, len(COLOURS), subject.colour)),
        Edit("texture", subject.texture, pick_other(rng, len(TEXTURES), subject.texture)),
        Edit("shape", subject.shape, absent),
        Edit("background", scene.background),
        Edit("remove", absent),
        Edit("size", subject.size),
    ]
    if scene.background in DARK | BRIGHT:
        found.append(Edit("light", 1 if scene.background in BRIGHT else -1))
    for thing in scene.things[1:]:
        if thing.kind == subject.kind:
            found.append(Edit(pick(rng, ("count", "more")), subject.shape))
        else:
            found.append(Edit("add", thing.shape, thing.colour))
    regions = [i for i, r in enumerate(REGIONS.values()) if subject.position in r]
    found.append(Edit("region", pick(rng, regions)))
    return [found.pop(int(rng.random() * len(found))) for _ in range(len(found))]
