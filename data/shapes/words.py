"""All words of the embedded world, as templates by use.

Fields: {x} a noun phrase, {s} a shape and {ss} its plural, {c} a colour, {t} a texture, {z} a size,
{b} a background, {p} a position, {r} a region, {it} the subject, {os} {oc} {ot} what was before.
Where a tuple lists a word twice, it is drawn twice as often.
"""

import functools

from data.shapes.scene import POSITIONS, REGIONS

SHAPE_WORDS = (
    ("circle", "circle", "disc"), ("square", "square", "box"), ("triangle",), ("diamond",),
    ("star",), ("heart",), ("cross", "cross", "plus"), ("ring", "ring", "hoop"),
)  # fmt: skip
PLURALS = {"box": "boxes", "cross": "crosses", "plus": "pluses"}
COLOUR_WORDS = (
    ("red", "red", "crimson"), ("green", "green", "emerald"), ("blue", "blue", "azure"),
    ("yellow", "yellow", "golden"), ("orange",), ("purple", "purple", "violet"), ("pink",),
    ("cyan", "cyan", "turquoise"),
)  # fmt: skip
TEXTURE_WORDS = (("solid", "plain"), ("striped", "stripy"), ("dotted", "spotted"))
WITH_TEXTURE = ("with a plain pattern", "with stripes", "with dots")
SIZE_WORDS = (("small", "little", "tiny"), ("large", "big", "huge"))
BACKGROUND_WORDS = (
    ("black",), ("navy",), ("brown",), ("olive",), ("gray", "gray", "grey"), ("white",),
)  # fmt: skip
COUNTED = ("one thing", "two things", "three things")
HEADS = (
    "{x}", "{x}", "{x}", "a photo of {x}", "a photo of {x}", "an image of {x}", "a picture of {x}",
    "a photo with {x}", "a view of {x}",
)  # fmt: skip
PLACES = ("at {p}", "in the {p}", "in the {p} corner", "at the {p}")
MIDDLE = ("in the middle", "in the center", "at the center")
ON = ("on a {b} background", "on a {b} background", "with a {b} background", "on {b}")
BETWEEN = ("and", "and", "next to", "beside", "with")
WITHOUT = (
    "without a {s}", "without any {ss}", "with no {s}", "and no {s}", "and no {ss}",
    "instead of a {s}",
)  # fmt: skip
NEGATED = (  # whole captions: a twin scene shows the {s}
    "a photo without a {s}", "a photo without a {s}", "a picture without any {ss}", "no {ss}",
    "no {s}", "there is no {s}", "an image that does not have a {s}", "without a {s}",
)  # fmt: skip
AFFIRMED = (
    "a photo with a {s}", "a picture with a {s}", "a {s}", "there is a {s}",
    "an image that has a {s}", "with a {s}",
)  # fmt: skip
STATEMENTS: dict[str, tuple[str, ...]] = {
    "colour": ("is {c}", "is {c}", "is {c} instead of {oc}", "has a {c} color"),
    "texture": ("is {t}", "is {t}", "has a {t} pattern", "is {t} instead of {ot}"),
    "shape": ("is a {s} instead of a {os}", "has a {s} instead of a {os}", "is a {s}"),
    "background": ("is on a {b} background", "is on a {b} background", "has a {b} background"),
    "brighter": ("has a brighter background", "is on a brighter background"),
    "darker": ("has a darker background", "is on a darker background"),
    "add": ("has a {x} next to it", "has a {x} too", "also has a {x}", "has a {x} added"),
    "remove": (
        "no longer has the {s}", "no longer has a {s}", "is without the {s}", "has no {s}",
        "does not have a {s}",
    ),
    "count": ("has two {ss}", "shows two {ss}", "has two {ss} instead of one"),
    "more": ("has more {ss}", "shows more {ss}", "has more than one {s}"),
    "smaller": ("is smaller", "is smaller in size", "is {z}"),
    "larger": ("is larger", "is bigger", "is {z}"),
    "region": ("is on the {r}", "is on the {r} side"),
    "region_y": ("is at the {r}", "is placed at the {r}"),
    "region_middle": ("is in the middle", "is in the center"),
}  # fmt: skip
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "colour": ("make {it} {c}", "turn {it} {c}", "paint {it} {c}", "change its color to {c}"),
    "texture": ("make {it} {t}", "change its pattern to {t}"),
    "shape": (
        "replace the {os} with a {s}", "change the {os} to a {s}", "turn the {os} into a {s}",
    ),
    "background": ("change the background to {b}", "make the background {b}", "put {it} on {b}"),
    "brighter": ("make the background brighter",),
    "darker": ("make the background darker",),
    "add": ("add a {x}", "put a {x} next to it"),
    "remove": ("remove the {s}", "take away the {s}", "delete the {s}"),
    "count": ("show two {ss}", "add another {s}"),
    "more": ("show more {ss}", "add more {ss}"),
    "smaller": ("make {it} smaller", "change its size to {z}"),
    "larger": ("make {it} larger", "make {it} bigger", "change its size to {z}"),
    "region": ("move {it} to the {r}",),
    "region_y": ("move {it} to the {r}",),
    "region_middle": ("move {it} to the middle", "move {it} to the center"),
}  # fmt: skip
RELATIONS = ("to the left of", "to the right of", "above", "below")
GLUE = "a an the and that only nothing else it two side"  # words of the code below
FOCUS = {"colour": "color", "texture": "pattern", "size": "size", "background": "background"}


def plural(word: str) -> str:
    return PLURALS.get(word) or word + "s"


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Returns all words the grammar can emit: sorted, lower-case, without the placeholder `$`."""
    tables = (
        HEADS, PLACES, MIDDLE, ON, BETWEEN, WITHOUT, NEGATED, AFFIRMED, WITH_TEXTURE,
        COUNTED, RELATIONS, (GLUE,), tuple(REGIONS), POSITIONS, tuple(FOCUS.values()),
        *STATEMENTS.values(), *INSTRUCTIONS.values(), *COLOUR_WORDS, *TEXTURE_WORDS,
        *SIZE_WORDS, *BACKGROUND_WORDS, *SHAPE_WORDS,
        tuple(plural(w) for words in SHAPE_WORDS for w in words),
    )  # fmt: skip
    words = " ".join(text for table in tables for text in table).split()
    return tuple(sorted({w for w in words if "{" not in w}))
