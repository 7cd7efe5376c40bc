"""The filters over the pairs that were drawn: what passed, how much fell where, and a picture.

Of each `pairs-NUMBER.tar` a file of the same name with what passed, whole or not there, and beside
it a JSON file with all similarities; so interrupted runs go on, and processes share the work file
by file. When the last is there, `statistics.json` and `sheet.png` are written.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax import composers, weights
from cir_jax.errors import DataError
from cir_jax.progress import Progress
from cir_jax.retrieval import features
from cir_jax.sharding.mesh import make_mesh
from cir_jax.sharding.placement import on_mesh
from cir_jax.weights.fingerprint import fingerprint
from data import formats, tars
from data.corpus import Unusable
from data.sharing import Shard, alone, same_run
from data.synthtriplets import filters, sheet
from data.synthtriplets.drawing import SUFFIXES, sample, write_json, write_tar

BATCH = 256
IMAGES = ("reference", "target")


@dataclasses.dataclass(frozen=True)
class Pair:
    """key: of its files. record: what its JSON says."""

    key: str
    reference: bytes
    target: bytes
    record: Mapping[str, Any]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a tar file of `drawing`. Raises DataError for one that cannot be read."""
    pairs = []
    for item in tars.samples([path]):
        try:
            there = tars.Sample(formats.row(item))
            images = []
            for name in IMAGES:
                columns = [
                    f"{name}.{s}" for s in SUFFIXES.values() if f"{name}.{s}" in there.columns
                ]
                if not columns:
                    raise Unusable(f"it has no image {name}")
                images.append(there.member(columns[0]).read())
            text = there.text("json") if "json" in there.columns else "{}"
            pairs.append(Pair(item.where.rpartition(" ")[2], *images, json.loads(text)))
        except DataError as error:
            raise DataError(
                f"{item.where}: {error}. Delete the file, and draw it again."
            ) from error
    return pairs


class Clip:
    """Features of a backbone of this library, over all devices.

    Raises WeightsError when there is no such backbone, ConfigError when it has no joint space.
    """

    def __init__(self, name: str):
        self.backbone, params = weights.load(name)
        self.identity = {"backbone": self.backbone.weights_id, "parameters": fingerprint(params)}
        self.mesh = make_mesh({"data": -1})
        self.frozen = {"backbone": on_mesh(self.mesh, params)}
        self.text_only = composers.build("text_only", self.backbone)

    def images(self, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """float32[images, dim] of unit norm. Raises DataError for one that does not decode."""
        return features.image_features(
            self.backbone, self.frozen["backbone"], records, mesh=self.mesh, batch_size=BATCH,
            normalise=True,
        )  # fmt: skip

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32[texts, dim] of unit norm, of each text once; NaN for ""."""
        known = sorted({text for text in texts if text})
        prompts = [self.text_only.prompt(text) for text in known]
        rows = features.query_features(
            self.text_only,
            {},
            self.frozen,
            # one length for all blocks
            self.backbone.tokenizer(prompts, self.backbone.context_length),
            np.arange(len(known), dtype=np.int32),
            reference_features=np.zeros((len(known), self.backbone.dim), np.float32),
            has_reference=False,
            mesh=self.mesh,
            batch_size=BATCH,
            description="",
        )
        table = np.concatenate([rows, np.full((1, rows.shape[1]), np.nan, np.float32)])
        where = {text: i for i, text in enumerate(known)} | {"": len(known)}
        return table[[where[text] for text in texts]]


def features_of(pairs: Sequence[Pair], clip: Clip) -> filters.Features:
    """What the filters compare."""
    images = clip.images([{"image": getattr(pair, name)} for name in IMAGES for pair in pairs])
    fields = ("reference_caption", "target_caption", "text", "source_keyword", "target_keyword")
    texts = clip.texts([str(pair.record.get(f, "")) for f in fields for pair in pairs])
    return filters.Features(*np.split(images, len(IMAGES)), *np.split(texts, len(fields)))


def filter_pairs(
    source: Path,
    output: Path,
    clip: Clip,
    thresholds: Mapping[str, float],
    *,
    best: int = filters.BEST,
    shard: Shard | None = None,
) -> dict[str, Any] | None:
    """Writes this shard's files into `output`; returns the statistics when those of all are there.

    Raises DataError when `source` holds no pairs, or `output` is of other pairs or settings.
    """
    shard = shard or Shard()
    files = sorted(source.glob("pairs-*.tar"))
    how = source / "settings.json"
    if not (files and how.is_file()):
        raise DataError(
            f"--source={source}: no pairs-*.tar and settings.json in it. `--step=draw` writes them."
        )
    output.mkdir(parents=True, exist_ok=True)
    drawn = json.loads(how.read_text())
    settings = {"pairs": drawn, "thresholds": dict(thresholds), "best": best, **clip.identity}
    same_run(output, settings, "other pairs or settings", "--output")
    with alone(output / f".lock-{shard.index:05d}-of-{shard.count:05d}"):
        for file in Progress(files[shard.index :: shard.count], desc="files", unit="file", delay=1):
            if not (output / file.name).is_file():
                _filter_file(file, output, clip, thresholds, best)
    if not all((output / file.name).is_file() for file in files):
        return None
    notes = [(output / file.name).with_suffix(".json") for file in files]
    statistics = summary(notes, thresholds)
    sheet.write(output / "sheet.png", _examples(files, output), statistics)
    write_json(output / "statistics.json", statistics)
    return statistics


def _filter_file(
    file: Path, output: Path, clip: Clip, thresholds: Mapping[str, float], best: int
) -> None:
    pairs = read_pairs(file)
    verdict: list[str] = []
    found = {name: np.zeros(0, np.float32) for name in filters.THRESHOLDS}
    if pairs:
        try:
            found = filters.similarities(features_of(pairs, clip))
        except DataError as error:  # an image that does not decode
            raise DataError(f"{file}: {error} Delete the file, and draw it again.") from error
        groups = np.asarray([int(pair.record.get("triplet", i)) for i, pair in enumerate(pairs)])
        verdict = filters.falls(found, thresholds, groups, best)
    note = {
        "counts": filters.count(found, verdict, thresholds),
        "keys": [pair.key for pair in pairs],
        "fell": verdict,
        "similarities": {
            name: [None if np.isnan(x) else round(float(x), 4) for x in row]
            for name, row in found.items()
        },
    }
    write_json((output / file.name).with_suffix(".json"), note)
    members = [
        member
        for pair, fell in zip(pairs, verdict, strict=True)
        if not fell
        for member in sample(pair.key, (pair.reference, pair.target), {}, pair.record)
    ]
    write_tar(output / file.name, members)


def _examples(files: Sequence[Path], output: Path) -> dict[str, list[sheet.Example]]:
    """Of each verdict the first few pairs."""
    found: dict[str, list[sheet.Example]] = {name: [] for name in sheet.TITLES}
    for file in files:
        note = json.loads((output / file.name).with_suffix(".json").read_bytes())
        wanted = {name for name, some in found.items() if len(some) < sheet.ROWS}
        if not wanted & set(note["fell"]):
            continue
        for i, pair in enumerate(read_pairs(file)):
            some = found[note["fell"][i]]
            if len(some) < sheet.ROWS:
                values = {name: row[i] for name, row in note["similarities"].items()}
                some.append(sheet.Example(pair.reference, pair.target, pair.record, values))
    return found


def summary(notes: Iterable[Path], thresholds: Mapping[str, float]) -> dict[str, Any]:
    """The counts of all files, and of each filter the similarities that 10, 50, 90 % are below."""
    each = (json.loads(note.read_bytes())["counts"] for note in notes)
    counts = functools.reduce(filters.add, each)
    for name, entry in counts["filters"].items():
        entry["threshold"] = thresholds[name]
        entry["quantiles"] = filters.quantiles(entry.pop("histogram"))
    return counts
