"""The evaluation world of a split: one gallery, and queries in four published protocols.

Every query plants its own images in the gallery: right answers, and the wrong ones that each kind
of shortcut would return. Which images are right is then decided by rule over the whole gallery.
"""

import collections
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from data.shapes import words
from data.shapes.captioned import without
from data.shapes.edits import Goal, realise
from data.shapes.language import attribute_word, detailed_caption, statement
from data.shapes.queries import (
    EVAL_PARITY,
    Case,
    aspects_of,
    draw_case,
    lookalike,
    narrow_kinds,
    near_miss,
    subject_scene,
    training_kinds,
    words_only,
)
from data.shapes.render import encode_png, render
from data.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    MAX_THINGS,
    QUADRANTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    draw,
    jitter,
    pick,
    pick_other,
    sample_scene,
    sample_thing,
    stream,
)

BENCHMARKS = ("circo", "cirr", "fashioniq", "genecis")
CATEGORIES = {  # FashionIQ: of images with a single thing, by its shape
    "round": frozenset({0, 5, 7}),
    "straight": frozenset({1, 2, 3}),
    "pointed": frozenset({4, 6}),
}
TASKS = {  # GeneCIS: candidates of a query
    "focus_attribute": 10,
    "change_attribute": 15,
    "focus_object": 15,
    "change_object": 15,
}
MAX_TARGETS = 24  # a CIRCO query with more right answers says too little to be a query
_FASHION_KINDS = ("colour", "texture", "shape", "size", "background", "region")
_ATTRIBUTES = {"colour": COLOURS, "texture": TEXTURES, "size": SIZES}


@dataclasses.dataclass(frozen=True)
class BenchmarkSizes:
    """Queries per split; CIRR: sets of six images with two queries each; GeneCIS: per task."""

    circo: int = 300
    cirr_sets: int = 120
    fashioniq: int = 240
    genecis: int = 80


@dataclasses.dataclass
class Query:
    """A query whose images are still scenes. `targets[0]` is the planted single target."""

    reference: Scene
    texts: list[str]
    targets: list[Scene]
    candidates: list[Scene] = dataclasses.field(default_factory=list)
    category: str = ""
    aspects: list[str] = dataclasses.field(default_factory=list)
    goal: Goal | None = None


@dataclasses.dataclass(frozen=True)
class World:
    """The gallery of a split, and per benchmark the queries as records."""

    gallery: list[Scene]
    queries: dict[str, list[dict]]


def categories(scene: Scene) -> list[str]:
    """Returns the FashionIQ category of a scene with a single thing, else nothing."""
    if len(scene.things) > 1:
        return []
    return [name for name, shapes in CATEGORIES.items() if scene.subject.shape in shapes]


def _circo(rng: random.Random, gallery: list[Scene]) -> Query:
    case = draw_case(rng, EVAL_PARITY, narrow_kinds)
    targets = [case.target if rng.random() < 0.3 else realise(rng, case.goal)]
    targets += [realise(rng, case.goal) for _ in range(1 + int(rng.random() * 4))]
    wrong = [lookalike(rng, case) for _ in range(3)]
    other = draw_case(rng, EVAL_PARITY, narrow_kinds, case.reference).target
    wrong += [] if case.goal.reached_by(other) else [other]
    wrong += [near_miss(rng, case.goal) for _ in range(3)]
    wrong += [words_only(rng, case) for _ in range(2)]
    gallery += [case.reference, *targets, *wrong]
    text = statement(rng, case.edits)
    aspects = aspects_of(case.edits, text)
    return Query(case.reference, [text], targets, aspects=aspects, goal=case.goal)


def _cirr(rng: random.Random, gallery: list[Scene]) -> list[Query]:
    """Draws a set: a reference and five edits of it, equally many each, so looks say nothing."""
    count = 1 + (rng.random() < 0.6)

    def kinds(rng: random.Random) -> list[str]:
        while len(found := training_kinds(rng)) != count:
            pass
        return found

    cases = [draw_case(rng, EVAL_PARITY, kinds)]
    reference = cases[0].reference
    while len(cases) < 5:
        case = draw_case(rng, EVAL_PARITY, kinds, reference)
        if not any(c.goal.reached_by(case.target) or case.goal.reached_by(c.target) for c in cases):
            cases.append(case)
    members = draw(rng, [reference, *(c.target for c in cases)], 6)
    gallery += members
    return [
        Query(reference, [text := statement(rng, c.edits)], [c.target], members,
              aspects=aspects_of(c.edits, text))
        for c in draw(rng, cases, 2)
    ]  # fmt: skip


def _fashioniq(rng: random.Random, gallery: list[Scene]) -> Query:
    def kinds(rng: random.Random) -> list[str]:
        return draw(rng, _FASHION_KINDS, 2 + (rng.random() < 0.5))

    def within(reference: Scene | None) -> Case:
        while True:
            case = draw_case(rng, EVAL_PARITY, kinds, reference, single=True)
            if categories(case.reference) == categories(case.target):
                return case

    case = within(None)
    cut = 1 + int(rng.random() * (len(case.edits) - 1))
    texts = [statement(rng, case.edits[:cut]), statement(rng, case.edits[cut:])]
    wrong = [lookalike(rng, case), within(case.reference).target]
    gallery += [case.reference, case.target, *wrong]
    return Query(case.reference, texts, [case.target], category=categories(case.reference)[0])


def _with_subject(rng: random.Random, scene: Scene, **changes: int) -> Scene:
    subject = replace(scene.subject, **changes)
    return jitter(rng, replace(scene, things=(subject, *scene.things[1:])))


Draft = tuple[Scene, str, Scene, list[Scene], Callable[[Scene], bool]]  # see _genecis


def _focus_attribute(rng: random.Random) -> Draft:
    name = pick(rng, list(_ATTRIBUTES))
    reference = subject_scene(rng, EVAL_PARITY, single=True)
    shape, value = reference.subject.shape, getattr(reference.subject, name)
    others = {
        n: pick_other(rng, len(values), getattr(reference.subject, n))
        for n, values in _ATTRIBUTES.items()
        if n != name
    }
    target = _with_subject(rng, reference, **others)
    target = replace(target, background=pick_other(rng, len(BACKGROUNDS), reference.background))
    wrong = [
        _with_subject(rng, reference, **{name: pick_other(rng, len(_ATTRIBUTES[name]), value)})
        for _ in range(3)
    ]
    return (
        reference,
        words.FOCUS[name],
        target,
        wrong,
        lambda s: any(t.shape == shape and getattr(t, name) == value for t in s.things),
    )


def _change_attribute(rng: random.Random) -> Draft:
    name = pick(rng, ("colour", "texture"))
    reference = subject_scene(rng, EVAL_PARITY, single=True)
    shape, old = reference.subject.shape, getattr(reference.subject, name)
    value = pick_other(rng, len(_ATTRIBUTES[name]), old)
    wrong = [jitter(rng, reference)]
    wrong += [
        _with_subject(rng, reference, shape=pick_other(rng, len(SHAPES), shape), **{name: value})
        for _ in range(2)
    ]
    target = _with_subject(rng, reference, **{name: value})
    return (
        reference,
        attribute_word(rng, name, value),
        target,
        wrong,
        lambda s: any(t.shape == shape and getattr(t, name) == value for t in s.things),
    )


def _several(rng: random.Random) -> Scene:
    while True:
        scene = subject_scene(rng, EVAL_PARITY)
        if 1 < len(scene.things) == len(scene.shapes):
            return scene


def _focus_object(rng: random.Random) -> Draft:
    reference = _several(rng)
    thing = pick(rng, reference.things)
    while True:
        target = realise(rng, Goal(thing.kind))
        if target.shapes & reference.shapes == {thing.shape} and len(target.things) > 1:
            break
    wrong = [without(rng, reference, thing.shape) for _ in range(3)]
    text = attribute_word(rng, "shape", thing.shape)
    return reference, text, target, wrong, lambda s: thing.shape in s.shapes


def _change_object(rng: random.Random) -> Draft:
    while len((reference := subject_scene(rng, EVAL_PARITY)).things) == MAX_THINGS:
        pass
    kept = {t.kind for t in reference.things}
    shape = pick_other(rng, len(SHAPES), *reference.shapes)

    def added(shape: int) -> Scene:
        things = [*reference.things, replace(sample_thing(rng, 0), shape=shape)]
        places = draw(rng, QUADRANTS, len(things))
        things = [replace(t, position=p) for t, p in zip(things, places, strict=True)]
        return jitter(rng, replace(reference, things=tuple(things)))

    wrong = [added(pick_other(rng, len(SHAPES), shape, *reference.shapes)), jitter(rng, reference)]
    while shape not in (stranger := sample_scene(rng)).shapes:
        pass
    wrong.append(stranger)
    text = attribute_word(rng, "shape", shape)
    return (
        reference,
        text,
        added(shape),
        wrong,
        lambda s: shape in s.shapes and kept <= {t.kind for t in s.things},
    )


_DRAFTS = {
    "focus_attribute": _focus_attribute,
    "change_attribute": _change_attribute,
    "focus_object": _focus_object,
    "change_object": _change_object,
}


def _genecis(rng: random.Random, gallery: list[Scene], task: str) -> Query:
    """Draws a query of a task; the candidates beside the planted ones come from the gallery."""
    while True:
        reference, text, target, wrong, right = _DRAFTS[task](rng)
        if right(target) and not any(map(right, wrong)):
            break
    fillers = []
    while len(fillers) + len(wrong) + 1 < TASKS[task]:
        scene = pick(rng, gallery)
        if not right(scene) and scene not in fillers:
            fillers.append(scene)
    gallery += [reference, target, *wrong]
    return Query(reference, [text], [target], [target, *wrong, *fillers], category=task)


def _record(i: int, query: Query, index: dict[Scene, int], targets: list[int]) -> dict:
    return {
        "id": i,
        "reference": index[query.reference],
        "texts": query.texts,
        "targets": targets,
        "candidates": [index[s] for s in query.candidates],
        "category": query.category,
        "aspects": query.aspects,
    }


@functools.lru_cache(maxsize=8)
def world(split: str, sizes: BenchmarkSizes) -> World:
    """Draws gallery and queries of a split. Indices in the records are gallery indices."""
    rng = stream("shapes", "world", split)
    gallery: list[Scene] = []
    drawn = {
        # A fifth more than asked for: some will have too many right answers.
        "circo": [_circo(rng, gallery) for _ in range(sizes.circo * 6 // 5 + 2)],
        "cirr": [q for _ in range(sizes.cirr_sets) for q in _cirr(rng, gallery)],
        "fashioniq": [_fashioniq(rng, gallery) for _ in range(sizes.fashioniq)],
        "genecis": [_genecis(rng, gallery, t) for t in TASKS for _ in range(sizes.genecis)],
    }
    gallery = draw(rng, gallery, len(gallery))
    index = {scene: i for i, scene in enumerate(gallery)}
    by_kind = collections.defaultdict(list)
    for i, scene in enumerate(gallery):
        for kind in {t.kind for t in scene.things}:
            by_kind[kind].append(i)

    records: dict[str, list[dict]] = {name: [] for name in BENCHMARKS}
    for name, queries in drawn.items():
        for query in queries:
            targets = [index[s] for s in query.targets]
            if query.goal is not None:
                near = by_kind[query.goal.kind]
                found = [i for i in near if query.goal.reached_by(gallery[i])]
                if len(found) > MAX_TARGETS or len(records[name]) == sizes.circo:
                    continue
                targets = targets[:1] + [i for i in found if i != targets[0]]
            records[name].append(_record(len(records[name]), query, index, targets))
    return World(gallery, records)


def gallery_records(world: World) -> Iterator[dict]:
    """Yields the records of the table `gallery`."""
    for i, scene in enumerate(world.gallery):
        yield {
            "id": i,
            "image": encode_png(render(scene)),
            "caption": detailed_caption(scene),
            "categories": categories(scene),
        }
