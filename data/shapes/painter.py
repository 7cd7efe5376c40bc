"""The renderer as a text-to-image model: a plain caption becomes a scene that it is true of.

It stands in for Stable Diffusion where `data/synthtriplets` is tried out. What a caption leaves
open is drawn from a named stream, so that two captions of one stream give images that differ in
nothing but what the captions say differently: what the same noise and Prompt-to-Prompt are for.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from data.shapes import words as w
from data.shapes.render import encode_png, render
from data.shapes.scene import (
    BACKGROUNDS,
    MAX_THINGS,
    MIDDLE,
    POSITIONS,
    QUADRANTS,
    Scene,
    draw,
    jitter_thing,
    sample_thing,
    stream,
)


def _numbered(table: tuple[tuple[str, ...], ...], field: str) -> dict[str, tuple[str, int]]:
    return {word: (field, value) for value, words in enumerate(table) for word in words}


_ATTRIBUTES = {
    **_numbered(w.COLOUR_WORDS, "colour"),
    **_numbered(w.TEXTURE_WORDS, "texture"),
    **_numbered(w.SIZE_WORDS, "size"),
}
_SHAPES = {word: value for word, (_, value) in _numbered(w.SHAPE_WORDS, "shape").items()}
_PLURALS = {w.plural(word): value for word, value in _SHAPES.items()}
_BACKGROUNDS = {word: value for word, (_, value) in _numbered(w.BACKGROUND_WORDS, "").items()}
_AFTER = {text: value for value, text in enumerate(w.WITH_TEXTURE)}
_PLACES = {place: i for i, place in enumerate(POSITIONS)} | {"center": MIDDLE}
_RELATIONS: dict[str, Callable[[int, int], bool]] = dict(
    zip(
        w.RELATIONS,  # left, right, above, below; quadrants are numbered by rows
        (
            lambda a, b: a // 2 == b // 2 and a < b,
            lambda a, b: a // 2 == b // 2 and a > b,
            lambda a, b: a % 2 == b % 2 and a < b,
            lambda a, b: a % 2 == b % 2 and a > b,
        ),
        strict=True,
    )
)
_PHRASES = sorted((*_AFTER, *_PLACES, *_RELATIONS), key=len, reverse=True)
_GLUE = {
    word
    for texts in (w.HEADS, w.PLACES, w.MIDDLE, w.ON, w.BETWEEN, ("an",))
    for word in " ".join(texts).split()
    if "{" not in word
}


@dataclasses.dataclass
class _Said:
    """things: of each the fields that are named; of "two stars" the same dictionary, twice.
    relations: (i, relation of thing i to thing i + 1)."""

    things: list[dict[str, int]]
    relations: list[tuple[int, str]]
    background: int | None


class Painter:
    """`data.synthtriplets.drawing.Painter`: pairs of the embedded world."""

    identity = {"model": "shapes"}

    def pair(self, reference: str, target: str, name: str) -> tuple[list[bytes], dict] | str:
        """PNGs of both captions, drawn from stream `name`; or why there are none."""
        scenes = [read(caption, name) for caption in (reference, target)]
        if any(scene is None for scene in scenes):
            return "unreadable"
        return [encode_png(render(scene)) for scene in scenes], {}


def read(caption: str, name: str) -> Scene | None:
    """A scene that the plain caption is true of; what it leaves open is drawn from stream `name`.

    None for what is no plain caption of the world: denials, orders, other words, too many things.
    """
    said = _parse(caption)
    if said is None or not 1 <= len(said.things) <= MAX_THINGS:
        return None
    rng = stream("shapes", "painter", name)
    background, *light, tint = (rng.random() for _ in range(4))
    order = draw(rng, QUADRANTS, len(QUADRANTS))
    alone = [int(rng.random() * len(POSITIONS))]
    fits = (p for p in _arrangements(order, alone, len(said.things)) if _fit(said, p))
    if (places := next(fits, None)) is None:
        return None
    things = []
    for i, (fields, place) in enumerate(zip(said.things, places, strict=True)):
        own = stream("shapes", "painter", name, i)
        thing = dataclasses.replace(sample_thing(own, place), **fields | {"position": place})
        if i and fields is said.things[i - 1]:
            like = things[-1]
            thing = dataclasses.replace(thing, colour=like.colour, texture=like.texture)
        things.append(jitter_thing(own, thing))
    chosen = int(background * len(BACKGROUNDS)) if said.background is None else said.background
    x, y = (2 * value - 1 for value in light)
    return Scene(tuple(things), chosen, (x, y), 2 * tint - 1)


def _parse(caption: str) -> _Said | None:
    said = _Said([], [], None)
    waiting: dict[str, int] = {}
    text, two, phrase = caption, False, ""
    while text:
        before = phrase
        phrase = next(
            (p for p in _PHRASES if f"{text} ".startswith(f"{p} ")), text.partition(" ")[0]
        )
        text = text[len(phrase) :].lstrip()
        if phrase in _ATTRIBUTES:
            waiting |= [_ATTRIBUTES[phrase]]
        elif phrase in (shapes := _PLURALS if two else _SHAPES):
            fields = waiting | {"shape": shapes[phrase]}
            said.things += [fields] * (1 + two)
            waiting, two = {}, False
        elif phrase == "two":
            two = True
        elif phrase in _BACKGROUNDS and (before == "on" or text.startswith("background")):
            said.background = _BACKGROUNDS[phrase]
        elif phrase in _AFTER and said.things:
            said.things[-1]["texture"] = _AFTER[phrase]
        elif phrase in _PLACES and said.things:
            said.things[-1]["position"] = _PLACES[phrase]
        elif phrase in _RELATIONS and said.things:
            said.relations.append((len(said.things) - 1, phrase))
        elif phrase not in _GLUE:
            return None
    return None if waiting or two else said


def _arrangements(order: list[int], alone: list[int], count: int) -> Iterator[tuple[int, ...]]:
    """Places of the things, those of the stream first."""
    if count == 1:
        yield from ((place,) for place in (*alone, *order, MIDDLE))
    else:
        yield from itertools.permutations(order, count)


def _fit(said: _Said, places: tuple[int, ...]) -> bool:
    named = zip(said.things, places, strict=True)
    return all(fields.get("position", place) == place for fields, place in named) and all(
        i + 1 < len(places) and _RELATIONS[r](places[i], places[i + 1]) for i, r in said.relations
    )
