"""Concepts and phrases about them: the files, and the rule which concepts can be used.

A phrase book is `{"templates": [...], "concepts": {name: [phrases]}}` in JSON, or SEARLE's
`concept_to_phrases.pkl`. Phrases come from a causal language model (`launch/phrases.py`) or from a
grammar (the embedded world). A concept in a phrase is what a pseudo-word stands in for.
"""

import csv
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError
from cir_jax.input import pickles
from cir_jax.storage.atomic import write_atomically

PLACEHOLDER = "$"

TEMPLATES = (
    "This is a photo of a {}", "This photo contains a {}", "A photo of a {}",
    "This is an illustration of a {}", "This illustration contains a {}",
    "An illustrations of a {}", "This is a sketch of a {}", "This sketch contains a {}",
    "A sketch of a {}", "This is a diagram of a {}", "This diagram contains a {}",
    "A diagram of a {}", "A {}", "We see a {}", "{}", "We see a {} in this photo",
    "We see a {} in this image", "We see a {} in this illustration", "We see a {} photo",
    "We see a {} image", "We see a {} illustration", "{} photo", "{} image", "{} illustration",
)  # fmt: skip
"""The 24 of PALAVRA in SEARLE's wording (the typo is official)."""


@dataclasses.dataclass(frozen=True, eq=False)
class PhraseBook:
    """Templates with one `{}` each, and the phrases about each concept (names stripped).

    rows: the concepts as a file of names lists them, where it lists some more than once; else ().
    """

    templates: tuple[str, ...]
    concepts: Mapping[str, tuple[str, ...]]
    rows: tuple[str, ...] = ()

    @functools.cached_property
    def discarded(self) -> frozenset[str]:
        """Concepts that one of their own phrases does not contain, so that nothing is replaced.

        The rule of the released code: replacing the first occurrence leaves no `$` in the phrase.
        """
        return frozenset(
            name
            for name, phrases in self.concepts.items()
            if any(PLACEHOLDER not in with_placeholder(p, name) for p in phrases)
        )

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the whole content, in order."""
        digest = hashlib.sha256()
        texts = (t for n, p in self.concepts.items() for t in (n, *p))
        for text in (*self.templates, *texts, *self.rows):
            digest.update(len(text).to_bytes(4, "little") + text.encode())
        return digest.hexdigest()[:24]

    def without_suffix(self) -> "PhraseBook":
        """One phrase per concept, "a photo of {concept}": SEARLE's ablation without GPT."""
        names = {name: (f"a photo of {name}",) for name in self.concepts}
        return dataclasses.replace(self, concepts=names)

    def only(self, names: list[str], source: str) -> "PhraseBook":
        """The book of these concepts. Raises DataError naming those it has no phrases for."""
        chosen = dict.fromkeys(names)
        if missing := [name for name in chosen if name not in self.concepts]:
            raise DataError(
                f"{source}: {len(missing)} of its {len(chosen)} concepts have no phrases, such as "
                f"{', '.join(map(repr, missing[:3]))}. Generate them (launch/phrases.py continues "
                "an unfinished file), or leave these concepts out."
            )
        rows = tuple(names) if len(chosen) < len(names) else ()
        return PhraseBook(self.templates, {name: self.concepts[name] for name in chosen}, rows)


def with_placeholder(phrase: str, concept: str, every: bool = False, words: int = 1) -> str:
    """The phrase with `placeholders` in place of the first occurrence of the concept, or of every
    one."""
    return phrase.replace(concept, placeholders(words), -1 if every else 1)


def placeholders(words: int) -> str:
    """ " $ ", and so on: what the words of an image replace."""
    return f" {' '.join([PLACEHOLDER] * words)} "


def read(path: str | Path) -> PhraseBook:
    """A phrase book: *.pkl is SEARLE's form, anything else JSON.

    Raises DataError naming the file and entry that is missing, unreadable or of another form.
    """
    path = Path(path).expanduser()
    try:
        if path.suffix == ".pkl":
            content: Any = {"concepts": pickles.load(path.read_bytes())}
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: no phrases ({error.strerror}). Give a concept_to_phrases.pkl, or make a JSON "
            "file with launch/phrases.py."
        ) from error
    except Exception as error:  # garbled pickles raise whatever their opcodes run into
        raise DataError(f"{path}: not a phrase book ({type(error).__name__}: {error}).") from error
    return _checked(content, path)


def _checked(content: Any, path: Path) -> PhraseBook:
    def strings(value: Any, what: str) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
            raise DataError(f"{path}: {what} must be a list of strings.")
        return tuple(value)

    concepts = content.get("concepts") if isinstance(content, dict) else None
    if not isinstance(concepts, dict) or not concepts:
        raise DataError(
            f"{path}: expected a dictionary of concepts, each with a list of phrases (in JSON "
            'under the key "concepts").'
        )
    templates = strings(content.get("templates", list(TEMPLATES)), '"templates"')
    if wrong := [text for text in templates if text.count("{}") != 1]:
        raise DataError(f"{path}: template {wrong[0]!r} must contain {{}} exactly once.")
    if not templates:
        raise DataError(f"{path}: no templates. Leave the key out for SEARLE's.")
    checked: dict[str, tuple[str, ...]] = {}
    for name, phrases in concepts.items():
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{path}: a concept's name is {name!r}; expected text.")
        phrases = strings(phrases, f"concept {name!r}:")
        if not phrases:
            raise DataError(f"{path}: concept {name!r} has no phrases.")
        checked.setdefault(name.strip(), phrases)  # duplicates count once, as in the release
    return PhraseBook(templates, checked)


def write(path: Path, book: PhraseBook) -> None:
    """As JSON, whole or not at all."""
    content = {"templates": book.templates, "concepts": book.concepts}
    text = json.dumps(content, ensure_ascii=False, indent=1)
    write_atomically(path, lambda file: file.write(text.encode() + b"\n"))


def read_names(path: str | Path) -> list[str]:
    """Stripped concept names: a CSV with a column DisplayName (Open Images), or lines.

    As often as they are listed, which is once in the released file of Open Images.
    Raises DataError when the file is missing or holds no names.
    """
    path = Path(path).expanduser()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                rows = csv.DictReader(file)
                if "DisplayName" not in (rows.fieldnames or ()):
                    raise DataError(f"{path}: no column DisplayName in its header.")
                names = [(row["DisplayName"] or "").strip() for row in rows]
            else:
                names = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: unreadable list of concepts ({error}).") from error
    names = [name for name in names if name]
    if not names:
        raise DataError(f"{path}: no concept names.")
    return names
