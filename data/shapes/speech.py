"""Parts of speech of the embedded world's words, in place of a tagger.

    python -m data.shapes.speech data/shapes/parts_of_speech.json

writes the committed file again. The names are those of Universal Dependencies.
"""

import json
import sys
from pathlib import Path

from data.shapes import words as w

DETERMINERS = "a an the any no another".split()
NOUNS = (
    "photo picture image view stripes dots pattern color size background corner middle center "
    "left right side top bottom thing things"
).split()
ADJECTIVES = "brighter darker bigger smaller larger more".split()


def parts_of_speech() -> dict[str, list[str]]:
    """Every word of the vocabulary once; function words and verbs are "X"."""
    shapes = {word for words in w.SHAPE_WORDS for word in words}
    tables = (w.COLOUR_WORDS, w.TEXTURE_WORDS, w.SIZE_WORDS, w.BACKGROUND_WORDS)
    groups = {
        "DET": set(DETERMINERS),
        "NOUN": shapes | {w.plural(word) for word in shapes} | set(NOUNS),
        "ADJ": {word for table in tables for words in table for word in words} | set(ADJECTIVES),
    }
    groups["X"] = set(w.vocabulary()) - set.union(*groups.values())
    return {tag: sorted(words) for tag, words in groups.items()}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(parts_of_speech(), indent=1) + "\n")
