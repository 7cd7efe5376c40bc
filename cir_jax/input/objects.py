"""Sets of images that show one class of objects, as PALAVRA trains on them (arXiv 2204.01694)."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from cir_jax.errors import DataError
from cir_jax.input.records import Records
from cir_jax.input.text import Tokenizer
from cir_jax.progress import Progress


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
            if text := [name for name, words in content.items() if not isinstance(words, list)]:
                raise TypeError(f"the words of {text[0]!r} are no list")
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
    def identity(self) -> str:
        """Hash of the classes and their words, in order."""
        content = [(name, list(words)) for name, words in self.classes.items()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]

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
        return [name for name in self.classes if self.names(caption, name)]

    def names(self, caption: str, name: str) -> bool:
        """Whether the caption names this class."""
        return self._patterns[name].search(caption) is not None

    def renamed(self, caption: str, name: str, word: str) -> str:
        """The caption with `word` in place of each word that stands for the class."""
        return self._patterns[name].sub(lambda _: word, caption)


def members(source: Records, objects: Objects) -> dict[str, np.ndarray]:
    """Class -> records whose first caption names it. Raises DataError when there are none."""
    found: dict[str, list[int]] = {name: [] for name in objects.classes}
    for i in Progress(range(len(source)), desc="classes of objects", delay=5):
        for name in objects.named(_caption(source.parsed(i))):
            found[name].append(i)
    kept = {name: np.asarray(rows, np.int32) for name, rows in found.items() if rows}
    if not kept:
        raise DataError(
            f"{source.table!r}: no first caption names one of the classes "
            f"{', '.join(list(objects.classes)[:5])} ..."
        )
    return kept


class Labels:
    """The classes that a table's captions name, one after the other: an epoch has each once."""

    def __init__(self, records: Records, objects: Objects):
        """Reads all captions; raises DataError when none names a class."""
        self.records, self.objects = records, objects
        self.table = records.table
        self.members = members(records, objects)
        self.names = list(self.members)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> str:
        return self.names[int(index)]

    def __repr__(self) -> str:
        return f"Labels({len(self)} of {self.records!r})"


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectSets(grain.transforms.RandomMap):
    """A class -> a set of its images, drawn with replacement; arrays: see `composers.palavra`.

    The text of an image is a random one of its captions that name the class. suffix: "images" or
    "features", what the image field holds.
    """

    tokenizer: Tokenizer
    labels: Labels
    suffix: str
    size: int

    def random_map(self, element: str, rng: np.random.Generator) -> dict[str, Any]:
        objects, length = self.labels.objects, self.tokenizer.context_length
        rows = rng.choice(self.labels.members[element], self.size)
        records = [self.labels.records[row] for row in rows]
        words = objects.classes[element]
        word = words[rng.integers(len(words))]
        captions = [self._text(record, element, rng) for record in records]
        renamed = [objects.renamed(caption, element, word) for caption in captions]
        return {
            f"reference_{self.suffix}": np.stack([record["image"] for record in records]),
            "token_ids": self.tokenizer(captions, length),
            "label": np.int32(objects.number[element]),
            "augmented": np.int32(objects.number[word]),
            "augmented_token_ids": self.tokenizer(renamed, length),
        }

    def _text(self, record: Mapping[str, Any], name: str, rng: np.random.Generator) -> str:
        captions = [caption.decode().lower() for caption in record["captions"]]
        naming = [caption for caption in captions if self.labels.objects.names(caption, name)]
        # none: the record stands in for an unreadable one
        return naming[rng.integers(len(naming))] if naming else captions[0]


def _caption(record: Mapping[str, Any]) -> str:
    return record["captions"][0].decode().lower()
