"""Sets of images that show one class of objects, as PALAVRA trains on them (arXiv 2204.01694)."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np
from tqdm import tqdm

from cir_jax.errors import DataError
from cir_jax.input.records import Records
from cir_jax.input.text import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Objects:
    """Class -> words that may stand for it in a caption; the class's own name is one of them.

    A file is this dictionary in JSON; for COCO, its 80 names with Open Images classes that fit.
    """

    classes: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, path: str | Path) -> "Objects":
        """From a file, also relative to the repository. Raises DataError naming what is wrong."""
        from cir_jax.storage.places import places

        file = next((place for place in places(path) if place.is_file()), Path(path))
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            classes = {
                name: tuple(dict.fromkeys((name, *words))) for name, words in content.items()
            }
            wrong = [w for words in classes.values() for w in words if not w.strip()]
        except OSError as error:
            raise DataError(
                f"{file}: no classes of objects ({error.strerror}). Give a JSON file "
                '{"dog": ["puppy", "terrier"], ...}.'
            ) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(
                f"{file}: not a dictionary of classes ({error}); expected "
                '{"dog": ["puppy", "terrier"], ...}.'
            ) from error
        if wrong or not classes:
            raise DataError(f"{file}: {'an empty word' if classes else 'no classes'} in it.")
        return cls(classes)

    @functools.cached_property
    def words(self) -> list[str]:
        """All words once; their numbers are what examples carry."""
        return list(dict.fromkeys(word for words in self.classes.values() for word in words))

    @functools.cached_property
    def number(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    @functools.cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {
            name: re.compile(
                # captions are read in lower case, classes may be written otherwise
                rf"\b({'|'.join(map(re.escape, sorted(words, key=len)[::-1]))})\b",
                re.IGNORECASE,
            )
            for name, words in self.classes.items()
        }

    def named(self, caption: str) -> list[str]:
        """The classes that a caption names, as whole words."""
        return [name for name, pattern in self._patterns.items() if pattern.search(caption)]

    def renamed(self, caption: str, name: str, word: str) -> str:
        """The caption with `word` in place of each word that stands for the class."""
        return self._patterns[name].sub(lambda _: word, caption)


def members(source: Records, objects: Objects) -> dict[str, np.ndarray]:
    """Class -> records whose first caption names it. Raises DataError when there are none."""
    found: dict[str, list[int]] = {name: [] for name in objects.classes}
    for i in tqdm(range(len(source)), desc="classes of objects", delay=5):
        for name in objects.named(_caption(source.table[i])):
            found[name].append(i)
    kept = {name: np.asarray(rows, np.int32) for name, rows in found.items() if rows}
    if not kept:
        raise DataError(
            f"{source.table!r}: no first caption names one of the classes "
            f"{', '.join(list(objects.classes)[:5])} ..."
        )
    return kept


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectSets(grain.transforms.RandomMap):
    """A record -> a set of images of one of its classes; see `composers.palavra` for the arrays.

    The record itself and size - 1 others, drawn with replacement; of a record without a class, a
    random class's. suffix: "images" or "features", what the image field holds.
    """

    tokenizer: Tokenizer
    objects: Objects
    source: Records
    members: Mapping[str, np.ndarray]
    suffix: str
    size: int

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        named = [name for name in self.objects.named(_caption(element)) if name in self.members]
        names = named or list(self.members)
        name = names[rng.integers(len(names))]
        rows = rng.choice(self.members[name], self.size)
        records = [self.source[row] for row in rows]
        if named:
            records[0] = element
        words = self.objects.classes[name]
        word = words[rng.integers(len(words))]
        captions = [self.objects.renamed(_caption(record), name, word) for record in records]
        return {
            f"reference_{self.suffix}": np.stack([record["image"] for record in records]),
            "label": np.int32(self.objects.number[name]),
            "augmented": np.int32(self.objects.number[word]),
            "augmented_token_ids": self.tokenizer(captions, self.tokenizer.context_length),
        }


def _caption(record: Mapping[str, Any]) -> str:
    return record["captions"][0].decode().lower()
