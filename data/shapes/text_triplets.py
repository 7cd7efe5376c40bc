"""Text triplets of the embedded world: RTD's recipe (`data.text_triplets`) on the world's captions.

Two things are the world's own:
* Parts of speech. RTD exchanges nouns. Here colours, sizes, backgrounds and shapes are exchanged,
  each for one of its own kind: by noun and adjective alone, stars would be on small backgrounds.
  Textures and places are left alone, as the small CLIP's texts hardly tell them apart (cosines of
  0.99 and more).
* Templates. Those of RTD whose words the world has, and the world's own sentences about a change.
"""

from collections.abc import Iterator, Mapping, Sequence

from cir_jax.input.keywords import DictionaryTagger
from data.shapes import captioned
from data.shapes import words as w
from data.shapes.scene import POSITIONS, pick, stream
from data.text_triplets import editing, embedders, templates, vocabulary

CLIP = "data/shapes/clip"
BAND = (0.5, 0.9)
"""Of cosines between the small CLIP's features of two words. RTD's is (0.5, 0.7) of SBERT; here
different colours, backgrounds, sizes and shapes have 0.62 to 0.87, synonyms 0.995 and more."""

PARTS = {
    "COLOUR": {word for words in w.COLOUR_WORDS for word in words},
    "SIZE": {word for words in w.SIZE_WORDS for word in words},
    "BACKGROUND": {word for words in w.BACKGROUND_WORDS for word in words},
    "SHAPE": {word for words in w.SHAPE_WORDS for word in words},
    "SHAPES": {w.plural(word) for words in w.SHAPE_WORDS for word in words},
}
_FIELDS = {  # part of speech: edits whose sentences name it, its fields there and here
    "COLOUR": (("colour",), {"c": "{target}", "oc": "{source}"}),
    "SIZE": (("smaller", "larger"), {"z": "{target}"}),
    "BACKGROUND": (("background",), {"b": "{target}"}),
    "SHAPE": (("shape",), {"s": "{target}", "os": "{source}"}),
}


_PART_OF = {word: part for part, words in PARTS.items() for word in words}
_PART_OF |= {word: "TEXTURE" for words in w.TEXTURE_WORDS for word in words}
_GLUE = {
    word
    for texts in (w.HEADS, w.PLACES, w.MIDDLE, w.ON, w.BETWEEN, w.WITH_TEXTURE, w.RELATIONS)
    for word in " ".join((*texts, *POSITIONS, "an two")).split()
}


def records(split: str, size: int) -> Iterator[dict[str, object]]:
    """Triplets of the first `size` records of the table `captions`, one of each.

    Of the captions of a record one is drawn that says what there is: denials and orders, which are
    captions in this world, too, would not stay true.
    """
    tag, known, how, number = DictionaryTagger(_PART_OF), _vocabulary(), rules(), 0
    for i, (_, captions) in enumerate(captioned.scenes("captions", split, size)):
        rng = stream("shapes", "text_triplets", split, i)
        caption = pick(rng, [caption for caption in captions if _is_plain(caption)])
        keywords = vocabulary.keywords(caption, tag, PARTS)
        for triplet in editing.triplets(caption, keywords, known, how, rng):
            both = {"reference_caption": caption, "target_caption": triplet.target}
            yield {"id": number, **both, "text": triplet.text}
            number += 1


def _vocabulary() -> vocabulary.Vocabulary:
    """Of all words; there is no rare one to leave out."""
    keys = sorted((part, word) for part, words in PARTS.items() for word in words)
    features = embedders.text_tower(CLIP).encode([word for _, word in keys])
    return vocabulary.build(keys, features, BAND, seed=0)


def _is_plain(caption: str) -> bool:
    return all(word in _GLUE or word in _PART_OF for word in caption.split())


def rules() -> editing.Rules:
    """Deletions take modifiers only, so that a caption stays one of the world's.

    "add {target}" is left out: in this world nothing goes when something is added.
    """
    known = set(w.vocabulary()) - {"add"}
    fields = {"source": "", "target": ""}
    sayable = [t for t in templates.RTD if set(t.format(**fields).split()) <= known]
    own = {
        part: [*sayable, *_own(*_FIELDS[part])] if part in _FIELDS else sayable for part in PARTS
    }
    return editing.Rules(own, deletions="modifiers")


def _own(kinds: Sequence[str], fields: Mapping[str, str]) -> list[str]:
    """The world's sentences about these edits, as templates: "is {target} instead of {source}"."""
    found = [t for kind in kinds for t in (*w.STATEMENTS[kind], *w.INSTRUCTIONS[kind])]
    named = [t for t in found if any(f"{{{field}}}" in t for field in fields)]
    return [t.format(**fields, it="it") for t in dict.fromkeys(named)]
