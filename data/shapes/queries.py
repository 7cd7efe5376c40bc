"""Composed queries: a reference, an edit in words, its goal; and the training triplets.

Subjects of training triplets and of benchmarks are disjoint: shape + colour is odd there and even
here, before and after the edit. The subject of a reference with several things is the large one.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from data.shapes.edits import KINDS, Edit, Goal, apply_edits, draw_edits, goal_of, realise
from data.shapes.language import goal_caption, instruction, statement
from data.shapes.render import encode_png, render
from data.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    draw,
    jitter,
    pick,
    pick_other,
    sample_scene,
    stream,
)

TRAIN_PARITY, EVAL_PARITY = 1, 0
ASPECTS = {  # CIRCO's names
    "colour": ("direct_addressing",),
    "texture": ("direct_addressing",),
    "shape": ("direct_addressing",),
    "background": ("spatial_relations_background",),
    "light": ("comparative_statement", "spatial_relations_background"),
    "add": ("addition",),
    "remove": ("negation",),
    "count": ("cardinality",),
    "more": ("cardinality", "comparative_statement"),
    "size": ("comparative_statement",),
    "region": ("spatial_relations_background",),
}
# A subject alone has dozens of right answers in a gallery; one of these makes them few.
_NARROW = ("background",) * 4 + ("add",) * 3 + ("count", "more", "light")
_INSTRUCTIONS = 0.6  # of the training texts, the rest are statements as in the benchmarks
_MINIMAL = 0.35  # of the training targets change nothing but the edit, the rest only reach the goal


@dataclasses.dataclass(frozen=True)
class Case:
    """A reference with edits; `target` is the reference changed as little as they allow."""

    reference: Scene
    edits: list[Edit]
    goal: Goal
    target: Scene


def aspects_of(edits: list[Edit], text: str) -> list[str]:
    """Returns the semantic aspects of a query, by CIRCO's names."""
    names = {a for e in edits for a in ASPECTS[e.kind]}
    if len(edits) > 1:
        names.add("statement_with_conjunction")
    if "instead" in text.split():
        names.add("compare_change")
    return sorted(names)


def parity(kind: tuple[int, int, int]) -> int:
    return (kind[0] + kind[1]) % 2


def subject_scene(rng: random.Random, wanted: int, single: bool = False) -> Scene:
    """Draws a scene fit to be a reference: its subject has that parity and stands out."""
    while True:
        scene = sample_scene(rng)
        subject, others = scene.subject, scene.things[1:]
        if parity(subject.kind) != wanted or any(t.kind == subject.kind for t in others):
            continue
        if not others:
            return scene
        if not single:
            small = tuple(replace(t, size=0) for t in others)
            return replace(scene, things=(replace(subject, size=1), *small))


def training_kinds(rng: random.Random) -> list[str]:
    """Draws the kinds of one to three edits, any of them."""
    u = rng.random()
    return draw(rng, KINDS, 1 + (u > 0.35) + (u > 0.8))


def narrow_kinds(rng: random.Random) -> list[str]:
    """Draws the kinds of one to three edits that leave few right answers."""
    if rng.random() < 0.3:  # few references allow it, and it needs the background to be narrow
        return draw(rng, ("remove", "background"), 2)
    u = rng.random()
    rest = 0 if u < 0.2 else 1 if u < 0.7 else 2
    kinds = [pick(rng, _NARROW)]
    kinds += draw(rng, [k for k in KINDS if k not in kinds], rest)
    return draw(rng, kinds, len(kinds))


def draw_case(
    rng: random.Random,
    wanted: int,
    kinds: Callable[[random.Random], list[str]],
    reference: Scene | None = None,
    single: bool = False,
) -> Case:
    """Draws a case whose subject keeps the parity; of the given reference if there is one."""
    while True:
        scene = reference or subject_scene(rng, wanted, single)
        edits = draw_edits(rng, scene, kinds(rng))
        if edits is None:
            continue
        goal = goal_of(scene, edits)
        if parity(goal.kind) != wanted or goal.reached_by(scene):
            continue
        target = apply_edits(rng, scene, edits)
        if target is not None:
            return Case(scene, edits, goal, target)


def near_miss(rng: random.Random, goal: Goal) -> Scene:
    """Draws a scene that breaks exactly one thing the goal asks for."""
    shape, colour, texture = goal.kind
    broken = [
        replace(goal, kind=(shape, pick_other(rng, len(COLOURS), colour), texture)),
        replace(goal, kind=(shape, colour, pick_other(rng, len(TEXTURES), texture))),
        replace(goal, kind=(pick_other(rng, len(SHAPES), shape, goal.absent), colour, texture)),
    ]
    if goal.backgrounds:
        others = frozenset(range(len(BACKGROUNDS))) - goal.backgrounds
        broken.append(replace(goal, backgrounds=others))
    if goal.extra:
        extra = (goal.extra[0], pick_other(rng, len(COLOURS), goal.extra[1]))
        broken.append(replace(goal, extra=extra))
    if goal.counts:
        broken.append(replace(goal, counts=frozenset({1})))
    if goal.absent is not None:
        extra = (goal.absent, int(rng.random() * len(COLOURS)))
        broken += 2 * [replace(goal, absent=None, extra=extra)]
    return _miss(rng, goal, broken)


def words_only(rng: random.Random, case: Case) -> Scene:
    """Draws a scene that fits the text but not the reference: another subject."""
    edited = {e.kind for e in case.edits}
    kind = list(case.goal.kind)
    for i, (name, values) in enumerate((("shape", SHAPES), ("colour", COLOURS))):
        if name not in edited:
            excluded = (kind[i], case.goal.absent) if name == "shape" else (kind[i],)
            kind[i] = pick_other(rng, len(values), *excluded)
    if "texture" not in edited:
        kind[2] = int(rng.random() * len(TEXTURES))
    if tuple(kind) == case.goal.kind:  # the text names all of the subject
        return near_miss(rng, case.goal)
    return _miss(rng, case.goal, [replace(case.goal, kind=tuple(kind))])


def _miss(rng: random.Random, goal: Goal, broken: list[Goal]) -> Scene:
    while True:
        scene = realise(rng, pick(rng, broken))
        if not goal.reached_by(scene):
            return scene


def lookalike(rng: random.Random, case: Case) -> Scene:
    """Draws another photo of the reference: the same content, at times in another size."""
    scene = jitter(rng, case.reference)
    if rng.random() < 0.5:
        changed = replace(scene.subject, size=1 - scene.subject.size)
        changed = replace(scene, things=(changed, *scene.things[1:]))
        if not case.goal.reached_by(changed):
            return changed
    return scene


def _before(case: Case) -> Goal:
    """Returns what the reference shows of the things the edits are about."""
    kinds = {e.kind for e in case.edits}
    scene, thing = case.reference, case.reference.subject
    gone = next((t for t in scene.things[1:] if t.shape == case.goal.absent), None)
    return Goal(
        thing.kind,
        size=thing.size if "size" in kinds else None,
        backgrounds=frozenset({scene.background}) if kinds & {"background", "light"} else None,
        extra=(gone.shape, gone.colour) if isinstance(gone, Thing) else None,
    )


def triplet(split: str, i: int) -> tuple[Case, dict]:
    """Returns the i-th training case, and its texts as in the table (`target` is a Scene)."""
    rng = stream("shapes", "triplets", split, i)
    case = draw_case(rng, TRAIN_PARITY, training_kinds)
    target = case.target if rng.random() < _MINIMAL else realise(rng, case.goal)
    say = instruction if rng.random() < _INSTRUCTIONS else statement
    return case, {
        "target": target,
        "text": say(rng, case.edits),
        "reference_caption": goal_caption(rng, _before(case)),
        "target_caption": goal_caption(rng, case.goal),
    }


def triplet_records(split: str, size: int) -> Iterator[dict]:
    """Yields the records of the table `triplets`."""
    for i in range(size):
        case, record = triplet(split, i)
        record["target"] = encode_png(render(record["target"]))
        yield {"id": i, "reference": encode_png(render(case.reference)), **record}
