"""A query as the page sends it, in JSON, and what it means for `Library.search`."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from cir_jax.library import photos
from cir_jax.library.library import Library
from cir_jax.library.serve.pictures import Pictures
from cir_jax.library.serve.refusal import Refusal

MOST_BYTES = 100_000
"""Of a query's JSON."""

MOST_FOUND, MOST_IMAGES, MOST_WEIGHT = 200, 8, 4.0
MOST_LETTERS = 2000
MEGAPIXELS = 128.0
"""Of several images together: all are decoded in memory."""


class Control(NamedTuple):
    """A slider (low, high, step) or a choice of few values, since each is another program."""

    label: str
    low: float = 0.0
    high: float = 1.0
    step: float = 0.05
    choices: tuple[int, ...] = ()

    def check(self, name: str, value: Any) -> float:
        """Raises Refusal for what the page cannot send."""
        value = number(name, value)
        if self.choices and value not in self.choices:
            raise Refusal(400, f"{name}={value:g}: expected one of {listed(self.choices)}.")
        if not self.choices and not self.low <= value <= self.high:
            raise Refusal(400, f"{name}={value:g}: expected {self.low:g} to {self.high:g}.")
        whole = bool(self.choices) or self.step == 1
        if whole and value != int(value):
            raise Refusal(400, f"{name}={value:g}: expected a whole number.")
        return int(value) if whole else round(round(value / self.step) * self.step, 6)


CONTROLS = {
    "alpha": Control("share of the text"),
    "image_weight": Control("weight of the image", 0, 10, 0.5),
    "text_weight": Control("weight of the text", 0, 15, 0.5),
    "source_mixing": Control("share of the reference in the result"),
    "noised_reference": Control("start from the reference", 0, 0.9, 0.1),
    "steps": Control("steps", choices=(1, 2, 3, 5, 10, 25, 50, 100)),
    "samples_per_query": Control("samples", choices=(1, 2, 4, 8)),
    "seed": Control("seed of the noise", 0, 9999, 1),
}
"""What the page may move, for methods that listen to it. Two make `guidance`."""

GUIDANCE = ("image_weight", "text_weight")


def controls(library: Library) -> dict[str, dict[str, Any]]:
    """Those of a method, each with its own value, as the page reads them."""
    own = dict(vars(library.composer)) | {"seed": library.searcher.seed}
    if "guidance" in library.takes:
        own |= dict(zip(GUIDANCE, own["guidance"], strict=True))
    found = {}
    for name, control in CONTROLS.items():
        if ("guidance" if name in GUIDANCE else name) in library.takes:
            choices = sorted({*control.choices, own[name]}) if control.choices else []
            found[name] = control._asdict() | {"default": own[name], "choices": choices}
    return found


class Question(NamedTuple):
    """asked: arguments of `Library.search`; method: of which library; pictures: their ids."""

    method: str
    asked: dict[str, Any]
    pictures: list[str]


FIELDS = {"method", "images", "text", "negative", "mask", "controls", "k", "under", "after",
          "min_score", "explain"}  # fmt: skip


def read(body: bytes, libraries: Mapping[str, Library], pictures: Pictures) -> Question:
    """Raises Refusal for what the page cannot have sent."""
    said = parsed(body)
    if unknown := sorted(set(said) - FIELDS):
        raise Refusal(400, f"a query has no {unknown[0][:40]!r}, but {listed(sorted(FIELDS))}.")
    method = said.get("method") or next(iter(libraries))
    if not isinstance(method, str) or method not in libraries:
        raise Refusal(400, f"method: expected one of {listed(libraries)}.")
    library = libraries[method]
    references = [_reference(one) for one in _listed(said, "images", MOST_IMAGES)]
    contents = [pictures.content(given) for given, _ in references]
    if len(contents) > 1:
        sizes = [photos.header(content, "the picture").size for content in contents]
        if (pixels := sum(width * height for width, height in sizes)) > 1e6 * MEGAPIXELS:
            raise Refusal(
                400, f"images: {pixels / 1e6:.4g} megapixels together; at most {MEGAPIXELS:g} are "
                "read. Take fewer, or smaller ones.",
            )  # fmt: skip
    asked = {
        "text": text(said, "text"),
        "negative": [text({"negative": one}, "negative") for one in _listed(said, "negative", 8)],
        "images": contents,
        "weights": [weight for _, weight in references] if len(references) > 1 else None,
        "under": text(said, "under"),
        "after": text(said, "after"),
        "k": int(Control("", 1, MOST_FOUND, 1).check("k", said.get("k", 24))),
    }
    if said.get("explain") is True:
        asked["explain"] = True
    if said.get("min_score") is not None:
        asked["min_score"] = number("min_score", said["min_score"])
    if said.get("mask") is not None:
        if len(references) != 1:
            raise Refusal(400, "mask: the region of one image. Give one.")
        where = references[0][0]
        asked["mask"] = mask(pictures, said["mask"], where, asked["images"][0])
    pictured = [given for given, _ in references]
    return Question(method, asked | _controls(said, library), pictured)


def parsed(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises Refusal for all else."""
    try:
        said = json.loads(body, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the query is no JSON.") from error
    if not isinstance(said, dict):
        raise Refusal(400, "the query is no JSON object.")
    return said


def _refused(name: str) -> None:
    raise ValueError(name)


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
        raise Refusal(400, f"{name}: expected a number.")
    if not math.isfinite(value):
        raise Refusal(400, f"{name}: expected a finite number.")
    return float(value)


def text(said: Mapping[str, Any], name: str) -> str:
    value = said.get(name) or ""
    if not isinstance(value, str):
        raise Refusal(400, f"{name}: expected a text.")
    if len(value) > MOST_LETTERS:
        raise Refusal(400, f"{name}: {len(value)} letters; at most {MOST_LETTERS} are read.")
    # half of a surrogate pair is no letter, and nothing that could be encoded
    return value.encode("utf-8", "replace").decode().replace("\0", " ")


def listed(names: Any) -> str:
    return ", ".join(map(str, names))


def _listed(said: Mapping[str, Any], name: str, most: int) -> Sequence[Any]:
    value = said.get(name) or []
    if not isinstance(value, list):
        raise Refusal(400, f"{name}: expected a list.")
    if len(value) > most:
        raise Refusal(400, f"{name}: {len(value)} are too many; at most {most}.")
    return value


def _reference(given: Any) -> tuple[str, float]:
    """{"id", "weight"}: nothing else names a picture."""
    if not isinstance(given, dict) or not isinstance(given.get("id"), str):
        raise Refusal(400, 'images: expected {"id": "p1"}: pictures are given by id alone.')
    weight = number("weight", given.get("weight", 1))
    if abs(weight) > MOST_WEIGHT:
        raise Refusal(400, f"weight={weight:g}: expected {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}.")
    return given["id"], weight


def _controls(said: Mapping[str, Any], library: Library) -> dict[str, Any]:
    given = said.get("controls") or {}
    if not isinstance(given, dict):
        raise Refusal(400, "controls: expected an object.")
    found = {}
    for name, value in given.items():
        if name not in CONTROLS:
            raise Refusal(400, f"there is no control {name[:40]!r}, but {listed(CONTROLS)}.")
        found[name] = CONTROLS[name].check(name, value)
    if set(found) & set(GUIDANCE):
        own = getattr(library.composer, "guidance", (1.0, 1.0))
        pairs = zip(GUIDANCE, own, strict=True)
        found["guidance"] = tuple(found.pop(name, mine) for name, mine in pairs)
    return found


def mask(pictures: Pictures, given: Any, of: str, content: bytes) -> Image.Image:
    """An upload that was drawn on the large thumbnail of a picture, of the picture's own size."""
    if not isinstance(given, str) or not given.startswith("u"):
        raise Refusal(400, "mask: expected the id of an upload.")
    drawn = photos.opened(pictures.content(given), "mask")[0].convert("L")
    expected = pictures.size(of, "large")
    if drawn.size != expected:
        raise Refusal(
            400, f"mask: of {drawn.size[0]} x {drawn.size[1]} pixels; the picture it is drawn on "
            f"has {expected[0]} x {expected[1]}. Draw it again.",
        )  # fmt: skip
    whole = drawn.resize(photos.size(content, "the picture"), Image.Resampling.NEAREST)
    return whole.point(lambda value: 255 * (value > 127))  # brushes have smooth edges
