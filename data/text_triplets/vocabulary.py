"""The keywords of a set of captions, and for each of them those that may take its place.

A keyword is a word whose part of speech is wanted (RTD: "keywords like nouns"; CompoDiff: "object
terms", of which some of its examples have two words), known by its lower case. Counts are of
captions. Alternatives of a keyword are of its part of speech and within a band of similarity.
"""

import dataclasses
import json
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cir_jax.errors import DataError
from cir_jax.input.keywords import Tagger
from cir_jax.storage.atomic import write_atomically

ALTERNATIVES = 64
"""Kept per keyword, drawn at random where there are more: a band may hold thousands."""

_KEPT = 1 << 16  # keywords whose alternatives are kept as words
_CELLS = 1 << 25  # similarities computed at once: 128 MB
_WORD = re.compile(r"[^\W\d_](?:[\w'-]*\w)?")  # LinCIR's and RTD's placeholder $ is no part of one

Key = tuple[str, str]
"""Part of speech and keyword: "orange" is two of them."""


class Keyword(NamedTuple):
    """A keyword of a caption. modifier: another one follows directly, as in "automobile model"."""

    part: str
    word: str
    modifier: bool

    @property
    def key(self) -> Key:
        return self.part, self.word


def keywords(caption: str, tag: Tagger, parts: Collection[str]) -> list[Keyword]:
    """The keywords of the caption, each once, in the order in which they begin to occur.

    One that occurs several times is a modifier if it is so everywhere.
    """
    tagged = [(word.lower(), part) for word, part in tag(caption)]
    wanted = [part in parts and _WORD.fullmatch(word) is not None for word, part in tagged]
    found: dict[Key, bool] = {}
    for i, (word, part) in enumerate(tagged):
        if wanted[i]:
            modifier = wanted[i + 1 : i + 2] == [True]
            found[part, word] = found.get((part, word), True) and modifier
    return [Keyword(part, word, modifier) for (part, word), modifier in found.items()]


def frequent(counts: Mapping[Key, int], least: int) -> list[Key]:
    """Those that occur in `least` captions or more, sorted. Raises DataError when none does."""
    kept = sorted(key for key, count in counts.items() if count >= least)
    if not kept:
        (_, word), count = max(counts.items(), key=lambda item: item[1], default=(("", ""), 0))
        seen = f"the commonest, {word!r}, is in {count:,}" if count else "there is none at all"
        raise DataError(
            f"no keyword is in {least:,} captions or more ({seen}). Give more captions, lower "
            "--min_count, or look at what --keywords and --parts take for a keyword."
        )
    return kept


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Alternatives of keys[i]: the words of keys[indices[starts[i] : starts[i + 1]]]."""

    keys: tuple[Key, ...]
    starts: np.ndarray
    indices: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", {key: i for i, key in enumerate(self.keys)})
        object.__setattr__(self, "_found", {})

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def alternatives(self, key: Key) -> tuple[str, ...]:
        """Lower-case words that may take the keyword's place; none for what is no keyword."""
        row = self._rows.get(key)
        if row is None:
            return ()
        if row not in self._found:
            there = self.indices[self.starts[row] : self.starts[row + 1]]
            if len(self._found) >= _KEPT:
                self._found.clear()
            self._found[row] = tuple(self.keys[i][1] for i in there)
        return self._found[row]

    def write(self, path: Path) -> None:
        """A .npz file, whole or not at all."""
        keys = np.frombuffer(json.dumps(self.keys).encode(), np.uint8)
        arrays = {"keys": keys, "starts": self.starts, "indices": self.indices}
        write_atomically(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Raises DataError for what `write` has not written."""
        try:
            with np.load(path, allow_pickle=False) as file:
                keys = tuple((part, word) for part, word in json.loads(file["keys"].tobytes()))
                return cls(keys, file["starts"], file["indices"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path}: damaged ({error}). Delete {path.parent} to begin again."
            ) from error

    @property
    def replaceable(self) -> int:
        """How many keywords have an alternative."""
        return int((np.diff(self.starts) > 0).sum())


def spread(features: np.ndarray, sample: int = 1000) -> tuple[float, float, float]:
    """Cosines that 10, 50 and 90 % of the pairs of (some of the) keywords are below."""
    unit = _unit(features[:: -(-len(features) // sample)])
    pairs = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    low, middle, high = np.quantile(pairs if len(pairs) else np.zeros(1), (0.1, 0.5, 0.9))
    return float(low), float(middle), float(high)


def _unit(features: np.ndarray) -> np.ndarray:
    norms = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return (features / norms).astype(np.float32)


def build(
    keys: Iterable[Key],
    features: np.ndarray,
    band: tuple[float, float],
    seed: int,
    limit: int = ALTERNATIVES,
) -> Vocabulary:
    """features: float32[keys, dim], whose cosines decide. band: least and greatest similarity.

    Similarities are computed for some keywords at a time, never for all. Which alternatives are
    kept where there are more than `limit` depends on the seed and the keyword alone.
    """
    keys = tuple(keys)
    unit = _unit(features)
    names = {part: i for i, part in enumerate(sorted({part for part, _ in keys}))}
    parts = np.asarray([names[part] for part, _ in keys])
    starts, rows = [0], []
    for start in range(0, len(keys), size := max(1, _CELLS // max(1, len(keys)))):
        block = unit[start : start + size] @ unit.T
        near = (block >= band[0]) & (block <= band[1])
        near &= parts[start : start + size, None] == parts
        near[np.arange(len(near)), np.arange(start, start + len(near))] = False
        for row, those in enumerate(near, start):
            found = np.flatnonzero(those)
            if len(found) > limit:
                rng = np.random.default_rng((seed, row))
                found = np.sort(rng.choice(found, limit, replace=False))
            rows.append(found.astype(np.int32))
            starts.append(starts[-1] + len(found))
    return Vocabulary(keys, np.asarray(starts), np.concatenate([np.zeros(0, np.int32), *rows]))
