"""Text triplets of any captions, by templates: the recipe of RTD and CompoDiff, at any size.

1. Keywords of all captions, and in how many captions each occurs.
2. Of those that are frequent enough, the alternatives: other keywords whose similarity is within a
   band (`vocabulary`).
3. Of each caption triplets (`editing`), and of these those that pass the filter, if there is one.

Several processes share the work: shard i of n has every n-th block of records, and writes a file of
its own. What one shard needs of the others (2. needs the counts of all; shard 0 does it) they find
in OUTPUT.parts, which must be on a disk that all can see. All that is drawn is a function of the
seed, the number of the record and that of the caption in it, so neither kills nor the number of
shards change a line.
"""

import dataclasses
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cir_jax.errors import ConfigError, DataError
from cir_jax.input.keywords import Tagger
from cir_jax.progress import Progress
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.places import default_cache_dir
from data.sharing import Shard, alone, same_run
from data.source import stamp
from data.text_triplets import editing, embedders, vocabulary
from data.text_triplets.captions import Captions, blocks
from data.text_triplets.embedders import Embedder
from data.text_triplets.inversion_filter import InversionFilter
from data.text_triplets.parts import Growing
from data.text_triplets.templates import KINDS
from data.text_triplets.vocabulary import Keyword, Vocabulary

BLOCK = 1024
"""Records that are done, stored and lost to a kill at once."""

NAMES = {"reference": "reference_caption", "target": "target_caption"}
POLL = 2.0  # seconds between looks for what other shards write


@dataclasses.dataclass(frozen=True)
class Recipe:
    """parts: parts of speech that are keywords. least: captions that a keyword must occur in.
    band: least and greatest similarity of an alternative. threshold: of the filter.

    Raises ConfigError for values that cannot work.
    """

    rules: editing.Rules
    parts: Sequence[str] = ("NOUN",)
    least: int = 101
    band: tuple[float, float] = (0.5, 0.7)
    threshold: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.band
        if not -1 <= low < high <= 1:
            raise ConfigError(
                f"--similarity={low},{high}: expected two cosines, the smaller first."
            )
        for flag, value in (("min_count", self.least), ("per_caption", self.rules.per_caption)):
            if value < 1:
                raise ConfigError(f"--{flag}={value}: expected 1 or more.")


def read_band(values: Sequence[str]) -> tuple[float, float]:
    """The flag --similarity. Raises ConfigError."""
    try:
        low, high = map(float, values)
    except ValueError:
        raise ConfigError(
            f"--similarity={','.join(values)}: expected two numbers, such as 0.5,0.7."
        ) from None
    return low, high


def generate(
    captions: Captions,
    output: Path,
    recipe: Recipe,
    tag: Tagger,
    embedder: Callable[[], Embedder],
    *,
    names: Mapping[str, str],
    keep: InversionFilter | None = None,
    shard: Shard | None = None,
    wait: bool = True,
) -> dict[str, int] | None:
    """Writes the triplets as JSON lines; returns statistics, None if other shards are waited for.

    embedder: called in shard 0 alone. names: what tells the tagger ("keywords") and the embedder
    ("embedder") from others. wait: False comes back where other shards have to go on first.
    Keywords that are counted serve all recipes of the same parts.
    Raises DataError when OUTPUT.parts is of other captions or keywords or in use, when no keyword
    is frequent or similar enough, and as the captions do.
    """
    shard = shard or Shard()
    if output.suffix != ".jsonl":
        raise ConfigError(f"--output={output}: expected a name that ends in .jsonl.")
    folder = output.with_name(output.name + ".parts")
    settings = {**dataclasses.asdict(recipe), "embedder": names["embedder"]}
    first = {"captions": captions.identity, "parts": list(settings.pop("parts"))}
    first |= {"keywords": names["keywords"], "shards": shard.count}
    if keep:
        settings["filter"] = keep.identity
    else:
        del settings["threshold"]
    same_run(folder, first, "other captions or keywords", "--output")
    with alone(folder / f"lock-{shard.index:05d}"):
        key = stamp(settings)[:8]
        run = _Run(captions, output, recipe, tag, embedder, keep, shard, folder, key)
        run.check()
        run.count_keywords()
        everyone = [folder / f"counts-{i:05d}.json" for i in range(shard.count)]
        if not _there(everyone, "keywords", wait):
            return None
        if shard.index == 0:
            run.find_alternatives(everyone)
        elif not _there([run.vocabulary], "alternatives", wait):
            return None
        return run.write_triplets()


def _there(files: Sequence[Path], what: str, wait: bool) -> bool:
    """Whether the files of other shards are there, waiting for them if so told."""
    said = False
    while missing := [file for file in files if not file.is_file()]:
        if not said:
            names = ", ".join(file.name for file in missing[:5])
            more = (
                "waiting (they must have the same flags)"
                if wait
                else "run those, then this one again"
            )
            _say(f"{what} of other shards are not there yet ({names}): {more}")
            said = True
        if not wait:
            return False
        time.sleep(POLL)
    return True


@dataclasses.dataclass
class _Run:
    captions: Captions
    output: Path
    recipe: Recipe
    tag: Tagger
    embedder: Callable[[], Embedder]
    keep: InversionFilter | None
    shard: Shard
    folder: Path
    key: str  # of the settings that the keywords do not depend on

    def __post_init__(self) -> None:
        name = f"{self.shard.index:05d}"
        self.keywords = Growing(self.folder / f"keywords-{name}.jsonl")
        self.counts = self.folder / f"counts-{name}.json"
        self.triplets = Growing(self.folder / f"triplets-{self.key}-{name}.jsonl")
        self.vocabulary = self.folder / f"vocabulary-{self.key}.npz"

    def check(self) -> None:
        """A model that cannot be had shows before hours of work."""
        if self.shard.index == 0 and not self.vocabulary.is_file():
            made = self.embedder()
            self.embedder = lambda: made

    def count_keywords(self) -> None:
        """All keywords of this shard's captions, and how many captions each is in."""
        if self.counts.is_file():
            return
        if not self.keywords.finished:
            stored = self.keywords.blocks
            done = stored[-1]["done"] if stored else 0
            for behind, block in blocks(
                self.captions, self.shard, BLOCK, len(stored), done, "keywords"
            ):
                lines, empty = [], 0
                for number, caption in block:
                    if caption.strip():
                        found = vocabulary.keywords(caption, self.tag, self.recipe.parts)
                        lines.append(json.dumps([number, caption, found]))
                    else:
                        empty += 1
                self.keywords.add(lines, {"captions": len(lines), "empty": empty, "done": behind})
            self.keywords.finish()
        counts: Counter[vocabulary.Key] = Counter()
        for i in range(len(self.keywords.blocks)):
            for _, _, words in map(json.loads, self.keywords.read(i)):
                counts.update((part, word) for part, word, _ in words)
        text = json.dumps([[*key, count] for key, count in sorted(counts.items())])
        write_atomically(self.counts, lambda file: file.write(text.encode()))

    def find_alternatives(self, everyone: Iterable[Path]) -> None:
        """The vocabulary of all shards, for all of them."""
        if self.vocabulary.is_file():
            return
        counts: Counter[vocabulary.Key] = Counter()
        for each in everyone:
            counts.update({(p, word): count for p, word, count in json.loads(each.read_bytes())})
        keys = vocabulary.frequent(counts, self.recipe.least)
        texts = [word for _, word in keys]
        features = embedders.stored_features(self.embedder(), texts, default_cache_dir())
        made = vocabulary.build(keys, features, self.recipe.band, self.recipe.seed)
        likeness = "similarities: {:.2f}, {:.2f}, {:.2f} (10, 50, 90 % of the pairs are below)"
        likeness = likeness.format(*vocabulary.spread(features))
        if not made.replaceable:
            low, high = self.recipe.band
            raise DataError(
                f"none of {len(keys):,} keywords has another of its part of speech with a "
                f"similarity of {low} to {high}. Their {likeness}. Choose another --similarity or "
                "--embedder."
            )
        _say(
            f"{len(counts):,} keywords, {len(keys):,} of them in {self.recipe.least:,} captions or "
            f"more, {made.replaceable:,} of these with an alternative; {likeness}"
        )
        made.write(self.vocabulary)

    def write_triplets(self) -> dict[str, int]:
        """The triplets of this shard's captions, under their final name."""
        final, out = self.shard.file(self.output), self.triplets
        if not out.finished:
            words = Vocabulary.read(self.vocabulary)
            sizes = [block["captions"] for block in self.keywords.blocks]
            with Progress(
                total=sum(sizes), initial=sum(sizes[: len(out.blocks)]), desc="triplets",
                unit=" captions", unit_scale=True, delay=1,
            ) as bar:  # fmt: skip
                for i in range(len(out.blocks), len(sizes)):
                    out.add(*self._triplets(i, words))
                    bar.update(sizes[i])
        out.finish(final)
        statistics = {key: sum(block[key] for block in self.keywords.blocks) for key in _COUNTED}
        for key in (*KINDS, "captions without", "filtered"):
            statistics[key] = sum(block[key] for block in out.blocks)
        _say(f"{final}: {describe(statistics)}")
        done = [self.folder / f"done-{self.key}-{i:05d}" for i in range(self.shard.count)]
        write_atomically(done[self.shard.index], lambda f: f.write(b""))
        if all(each.is_file() for each in done):
            shutil.rmtree(self.folder, ignore_errors=True)
        return statistics

    def _triplets(self, block: int, words: Vocabulary) -> tuple[list[str], dict[str, int]]:
        made: list[tuple[str, editing.Triplet]] = []
        without = 0
        for name, caption, found in map(json.loads, self.keywords.read(block)):
            rng = random.Random(f"{self.recipe.seed}/{name}")
            keywords = [Keyword(*word) for word in found]
            some = editing.triplets(caption, keywords, words, self.recipe.rules, rng)
            made += [(f"{name}/{i}", triplet) for i, triplet in enumerate(some)]
            without += not some
        good = self._filtered(made)
        kept = [triplet for (_, triplet), fine in zip(made, good, strict=True) if fine]
        note = {kind: sum(triplet.kind == kind for triplet in kept) for kind in KINDS}
        note |= {"captions without": without, "filtered": len(made) - len(kept)}
        return [_line(triplet) for triplet in kept], note

    def _filtered(self, made: Sequence[tuple[str, editing.Triplet]]) -> np.ndarray:
        """bool[triplets]: whether both captions pass."""
        if self.keep is None:
            return np.ones(len(made), bool)
        texts = [getattr(triplet, side) for _, triplet in made for side in NAMES]
        streams = [f"{self.recipe.seed}/{name}/{side}" for name, _ in made for side in NAMES]
        found = self.keep.similarities(texts, streams).reshape(-1, len(NAMES))
        return (found >= self.recipe.threshold).all(axis=1)


_COUNTED = ("captions", "empty")


def _line(triplet: editing.Triplet) -> str:
    """With the names of RTD's code, and the keywords, which are looked for in images."""
    record = {name: getattr(triplet, side) for side, name in NAMES.items()}
    record["conditioning_caption"] = triplet.text
    keywords = {"source_keyword": triplet.source, "target_keyword": triplet.other}
    return json.dumps(record | keywords, ensure_ascii=False)


def describe(statistics: dict[str, int]) -> str:
    """One line of what was made of what."""
    total = sum(statistics[kind] for kind in KINDS)
    kinds = ", ".join(f"{statistics[kind]:,} {kind}" for kind in KINDS)
    return (
        f"{total:,} triplets ({kinds}) of {statistics['captions']:,} captions; "
        f"{statistics['captions without']:,} captions without, {statistics['empty']:,} empty ones; "
        f"{statistics['filtered']:,} triplets filtered out"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
