"""Concepts and phrases of the embedded world, in place of Open Images' names and GPT's phrases.

    python -m data.shapes.phrases data/shapes/phrases.json

writes the committed file again. Concepts are noun phrases with their article ("a red star"), as it
is these that `$` stands for in "a photo of $ that ...".
"""

import random
import sys
from dataclasses import replace
from pathlib import Path

from cir_jax.input.phrases import PhraseBook, write
from data.shapes.edits import facts
from data.shapes.language import statement
from data.shapes.scene import COLOURS, SHAPES, sample_scene, stream

TEMPLATES = (
    "a photo of {}", "an image of {}", "a picture of {}", "a view of {}", "{}",
)  # fmt: skip
PHRASES = 16
MAX_WORDS = 14  # with start and end 16 tokens


def phrase_book() -> PhraseBook:
    """One concept per colour and shape; a pure function of the grammar."""
    concepts = {}
    for shape in range(len(SHAPES)):
        for colour in range(len(COLOURS)):
            article = "an" if COLOURS[colour][0] in "aeio" else "a"
            name = f"{article} {COLOURS[colour]} {SHAPES[shape]}"
            rng = stream("shapes", "phrases", name)
            concepts[name] = tuple(_phrase(rng, name, shape, colour) for _ in range(PHRASES))
    return PhraseBook(TEMPLATES, concepts)


def _phrase(rng: random.Random, name: str, shape: int, colour: int) -> str:
    """ "a photo of a red star that has a ring next to it": what a continuation would be."""
    while True:
        scene = sample_scene(rng)
        subject = replace(scene.subject, shape=shape, colour=colour)
        scene = replace(scene, things=(subject, *scene.things[1:]))
        told = [f for f in facts(rng, scene) if f.kind not in ("shape", "colour")]
        text = f"a photo of {name} that {statement(rng, told[: 1 + (rng.random() < 0.5)])}"
        if len(text.split()) <= MAX_WORDS:
            return text


if __name__ == "__main__":
    write(Path(sys.argv[1]), phrase_book())
