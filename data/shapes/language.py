"""The language of the embedded world: captions and modification texts from one grammar.

Texts are lower-case words separated by spaces, at most MAX_WORDS of them. Captions make use of the
edits' phrases too ("a star that no longer has a ring", "make the background navy and add a heart"),
because a word that only queries use would keep an untrained embedding.
"""

import random
import re
from collections.abc import Sequence

from data.shapes import words as w
from data.shapes.edits import Edit, Goal, facts
from data.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    REGIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    pick,
    pick_other,
)

MAX_WORDS = 22
_BEFORE_VOWEL = re.compile(r"\ba (?=[aeio])")


def _finish(text: str) -> str:
    """Puts "an" for "a" before a vowel."""
    return _BEFORE_VOWEL.sub("an ", text)


def _noun(
    rng: random.Random,
    thing: Thing,
    colour: float = 0.8,
    texture: float = 0.55,
    size: float = 0.35,
    plural: bool = False,
) -> str:
    """Returns e.g. "small red star with dots"; each attribute is named with its probability."""
    u = rng.random
    words = []
    if u() < size:
        words.append(pick(rng, w.SIZE_WORDS[thing.size]))
    shown = u() < texture
    after = shown and u() < 0.15
    if shown and not after:
        words.append(pick(rng, w.TEXTURE_WORDS[thing.texture]))
    if u() < colour:
        words.append(pick(rng, w.COLOUR_WORDS[thing.colour]))
    shape = pick(rng, w.SHAPE_WORDS[thing.shape])
    words.append(w.plural(shape) if plural else shape)
    if after:
        words.append(w.WITH_TEXTURE[thing.texture])
    return " ".join(words)


def _place(rng: random.Random, thing: Thing) -> str:
    if POSITIONS[thing.position] == "middle":
        return pick(rng, w.MIDDLE)
    return pick(rng, w.PLACES).format(p=POSITIONS[thing.position])


def _on(rng: random.Random, background: int) -> str:
    return pick(rng, w.ON).format(b=pick(rng, w.BACKGROUND_WORDS[background]))


def _relation(first: Thing, second: Thing) -> str | None:
    """Returns how the first lies to the second, if they share a row or column of the grid."""
    (row, column), (other_row, other_column) = divmod(first.position, 2), divmod(second.position, 2)
    if row == other_row:
        return w.RELATIONS[column > other_column]
    return w.RELATIONS[2 + (row > other_row)] if column == other_column else None


def detailed_caption(scene: Scene) -> str:
    """Returns the one caption that tells everything that fits into MAX_WORDS words."""
    things, count = [], len(scene.things)
    for i, t in enumerate(scene.things):
        text = f"a {SIZES[t.size]} {TEXTURES[t.texture]} {COLOURS[t.colour]} {SHAPES[t.shape]}"
        if count == 1:
            text += f" in the {POSITIONS[t.position]}"
        elif count == 2 or i == 0:
            text += f" at {POSITIONS[t.position]}"
        things.append(text)
    joined = " and ".join(things) if count < 3 else f"{things[0]} {things[1]} and {things[2]}"
    on = "on a {b} background" if count == 1 else "on {b}"
    return _finish(f"{joined} {on}".format(b=BACKGROUNDS[scene.background]))


def _edit_phrase(
    rng: random.Random, table: dict[str, tuple[str, ...]], edit: Edit, it: str = "it"
) -> str:
    kind, value, other = edit.kind, edit.value, edit.other
    fields = {"it": it}
    match kind:
        case "colour":
            fields["c"] = pick(rng, w.COLOUR_WORDS[value])
            fields["oc"] = pick(rng, w.COLOUR_WORDS[other])
        case "texture":
            fields["t"] = pick(rng, w.TEXTURE_WORDS[value])
            fields["ot"] = pick(rng, w.TEXTURE_WORDS[other])
        case "shape" | "remove" | "count" | "more":
            fields["s"] = pick(rng, w.SHAPE_WORDS[value])
            fields["ss"] = w.plural(fields["s"])
            fields["os"] = pick(rng, w.SHAPE_WORDS[other])
        case "background":
            fields["b"] = pick(rng, w.BACKGROUND_WORDS[value])
        case "light":
            kind = "brighter" if value > 0 else "darker"
        case "add":
            fields["x"] = f"{pick(rng, w.COLOUR_WORDS[other])} {pick(rng, w.SHAPE_WORDS[value])}"
        case "size":
            kind = "larger" if value else "smaller"
            fields["z"] = pick(rng, w.SIZE_WORDS[value])
        case "region":
            fields["r"] = list(REGIONS)[value]
            kind = ("region", "region", "region_y", "region_y", "region_middle")[value]
    return pick(rng, table[kind]).format(**fields)


def statement(rng: random.Random, edits: Sequence[Edit]) -> str:
    """Returns the edits as in CIRCO, what the target is or has: "is golden and has two stars"."""
    phrases: list[str] = []
    for edit in edits:
        phrase = _edit_phrase(rng, w.STATEMENTS, edit)
        words = phrase.split()
        # "is golden and dotted" rather than "is golden and is dotted".
        if phrases and len(words) == 2 and words[0] == "is" and rng.random() < 0.7:
            if phrases[-1].startswith("is ") or " " not in phrases[-1]:
                phrase = words[1]
        phrases.append(phrase)
    return _finish(" and ".join(phrases))


def instruction(rng: random.Random, edits: Sequence[Edit], it: str = "it") -> str:
    """Returns the edits as orders: "make it red and change the background to navy"."""
    return _finish(" and ".join(_edit_phrase(rng, w.INSTRUCTIONS, e, it) for e in edits))


def _things(rng: random.Random, scene: Scene, short: bool = False) -> str:
    """Returns the things of the scene with articles: all of them, or at times one fewer."""
    things = list(scene.things)
    if len(things) > 1 and rng.random() < (0.7 if short else 0.25):
        things.pop()
    pair = len(things) > 1 and things[0].kind == things[1].kind and rng.random() < 0.7
    if pair:
        text = f"two {_noun(rng, things[0], size=0, plural=True)}"
        things = things[1:]
    else:
        if len(things) > 1 and rng.random() < 0.4:
            things = things[1:] + things[:1]
        text = "a " + _noun(rng, things[0])
    for before, thing in zip(things, things[1:], strict=False):
        relation = None if pair or rng.random() < 0.7 else _relation(before, thing)
        detail = 1.0 if len(things) < 3 else 0.6  # three things in full would be too long
        other = _noun(rng, thing, texture=0.5 * detail, size=0.3 * detail)
        text += f" {relation or pick(rng, w.BETWEEN)} a {other}"
    return text


def _plain(rng: random.Random, scene: Scene) -> str:
    if rng.random() < 0.03:
        text = w.COUNTED[len(scene.things) - 1]
    else:
        text = pick(rng, w.HEADS).format(x=_things(rng, scene))
        if len(scene.things) == 1 and rng.random() < 0.35:
            text += " " + _place(rng, scene.subject)
    return f"{text} {_on(rng, scene.background)}" if rng.random() < 0.5 else text


def _absent_shape(rng: random.Random, scene: Scene) -> str:
    return pick(rng, w.SHAPE_WORDS[pick_other(rng, len(SHAPES), *scene.shapes)])


def _negative(rng: random.Random, scene: Scene) -> str:
    if rng.random() < 0.2:
        nouns = [f"a {_noun(rng, t, texture=0.4, size=0.2)}" for t in scene.things]
        return f"only {' and '.join(nouns)} and nothing else"
    gone = _absent_shape(rng, scene)
    text = pick(rng, w.HEADS).format(x=_things(rng, scene, short=True))
    return f"{text} {pick(rng, w.WITHOUT).format(s=gone, ss=w.plural(gone))}"


def _relative(rng: random.Random, scene: Scene) -> str:
    """Returns "a photo of a star that is red and has a ring next to it": the queries' grammar."""
    told = facts(rng, scene)[: 1 + (rng.random() < 0.7) + (rng.random() < 0.2)]
    kinds = {e.kind for e in told}
    if "shape" in kinds:
        head = pick(rng, ("a photo", "a picture", "an image"))
    else:
        rates = {k: 0.0 if k in kinds else p for k, p in (("colour", 0.6), ("texture", 0.3))}
        noun = _noun(rng, scene.subject, size=0.0 if "size" in kinds else 0.2, **rates)
        head = pick(rng, w.HEADS).format(x="a " + noun)
    return f"{head} that {statement(rng, told)}"


def _ordered(rng: random.Random, scene: Scene) -> str:
    """Returns the instruction that could have led to the scene."""
    it = "the " + _noun(rng, scene.subject, texture=0.2, size=0.1, colour=0.4)
    told = facts(rng, scene)[: 1 + (rng.random() < 0.8)]
    if any(e.kind == "colour" for e in told):
        it = "the " + pick(rng, w.SHAPE_WORDS[scene.subject.shape])
    return instruction(rng, told, it if rng.random() < 0.7 else "it")


def caption(rng: random.Random, scene: Scene) -> str:
    """Returns a true, partial caption: plain, with relative clauses, negated or as an order."""
    while True:
        u = rng.random()
        if u < 0.1:
            text = _negative(rng, scene)
        elif u < 0.4:
            text = _relative(rng, scene)
        elif u < 0.48:
            text = _ordered(rng, scene)
        else:
            text = _plain(rng, scene)
        if text.count(" ") < MAX_WORDS:
            return _finish(text)


def shape_caption(rng: random.Random, shape: int, shown: bool) -> str:
    """Returns a short caption about one shape: "a photo with a star", "a photo without a star"."""
    word = pick(rng, w.SHAPE_WORDS[shape])
    return pick(rng, w.AFFIRMED if shown else w.NEGATED).format(s=word, ss=w.plural(word))


def attribute_word(rng: random.Random, kind: str, value: int) -> str:
    """Returns a word for one attribute's value, e.g. "golden" or "dotted"."""
    tables = {
        "colour": w.COLOUR_WORDS, "texture": w.TEXTURE_WORDS, "size": w.SIZE_WORDS,
        "shape": w.SHAPE_WORDS, "background": w.BACKGROUND_WORDS,
    }  # fmt: skip
    return pick(rng, tables[kind][value])


def goal_caption(rng: random.Random, goal: Goal) -> str:
    """Returns a caption of what a right answer must show, and no more."""
    thing = Thing(*goal.kind, goal.size or 0, 0)
    size = 0.0 if goal.size is None else 1.0
    plural = goal.counts is not None
    noun = _noun(rng, thing, 1.0, 1.0, size, plural)
    text = pick(rng, w.HEADS).format(x=f"{'two' if plural else 'a'} {noun}")
    if goal.positions:
        region = next(name for name, places in REGIONS.items() if places == goal.positions)
        text += f" {'on' if region in ('left', 'right') else 'at'} the {region}"
    if goal.extra:
        shape, colour = goal.extra
        other = f"{pick(rng, w.COLOUR_WORDS[colour])} {pick(rng, w.SHAPE_WORDS[shape])}"
        text += f" {pick(rng, w.BETWEEN)} a {other}"
    if goal.absent is not None:
        gone = pick(rng, w.SHAPE_WORDS[goal.absent])
        text += f" without a {gone}"
    if goal.backgrounds:
        text += " " + _on(rng, pick(rng, sorted(goal.backgrounds)))
    return _finish(text)
