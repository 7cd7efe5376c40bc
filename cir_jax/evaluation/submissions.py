"""Files for the test servers of CIRR and CIRCO, and what the servers would reject.

CIRR (cirr.cecs.anu.edu.au): two files, {"version": "rc2", "metric": "recall", pair id: [50 names]}
and "recall_subset" with 3 names. CIRCO (circo.micc.unifi.it): {query id: [50 image ids]}.
"""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from cir_jax.errors import DataError
from cir_jax.evaluation.benchmarks import REGISTRY, incomplete
from cir_jax.evaluation.queries import Benchmark
from cir_jax.evaluation.result import Result
from cir_jax.input.identity import source_identity
from cir_jax.input.tables import Table
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.places import default_cache_dir

LENGTH = {"recall": 50, "recall_subset": 3, "circo": 50}
"""Images per query of each kind of file."""

VERSION = "rc2"
MAX_BYTES = 5 << 20
"""What CIRR's server takes."""

SERVERS = {
    "cirr": "https://cirr.cecs.anu.edu.au (or https://cirr.junjie.au)",
    "circo": "https://circo.micc.unifi.it",
}
MAX_LISTED = 10
HEADER = ("version", "metric")


@dataclasses.dataclass(frozen=True)
class Official:
    """What a split's file must fit. references, members: query id -> names."""

    split: str
    references: Mapping[str, str]
    members: Mapping[str, frozenset[str]]
    images: frozenset[str]


def write(result: Result, benchmark: Benchmark, output: Path) -> list[Path]:
    """Writes the server's files of a split without public labels into `output`, and returns them.

    Nothing for benchmarks without a server. Partial data: "partial" stands in the file's name, for
    the server will refuse it. On process 0 only; each file whole or not at all.
    """
    if benchmark.protocol.name not in SERVERS or benchmark.protocol.text == "inversion":
        return []
    names = gallery_names(benchmark.gallery, [result.top, result.subset_top])
    ids = [query.id for query in benchmark.queries]

    def lists(top: np.ndarray, length: int) -> dict[str, list[str]]:
        return {
            str(number): [names[int(image)] for image in row[:length] if image >= 0]
            for number, row in zip(ids, top, strict=True)
        }

    stem = f"{file_name(benchmark.name)}_{benchmark.split}"
    files: dict[str, Any] = {}
    if benchmark.protocol.name == "circo":
        found = lists(result.top, LENGTH["circo"])
        # the server reads numbers; the embedded world's names are not
        files[stem] = {k: [int(x) if x.isdecimal() else x for x in v] for k, v in found.items()}
    else:
        for kind, top in (("recall", result.top), ("recall_subset", result.subset_top)):
            header = {"version": VERSION, "metric": kind}
            files[f"{stem}_{kind}"] = header | lists(top, LENGTH[kind])
    paths = []
    for name, content in files.items():
        path = output / f"{name}.json"
        text = json.dumps(content)
        if jax.process_index() == 0:
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
        paths.append(path)
    return paths


def file_name(benchmark: str) -> str:
    """ "fashioniq:small_gallery (partial)" -> "fashioniq_small_gallery_partial"."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", benchmark).strip("_")


def gallery_names(gallery: Sequence[Mapping[str, Any]], tops: Sequence[np.ndarray]) -> dict:
    """Position -> name of the images that occur in `tops`."""
    used = np.unique(np.concatenate([top.reshape(-1) for top in tops]))
    return {int(i): _name(gallery[int(i)], int(i)) for i in used if i >= 0}


def _name(record: Mapping[str, Any], position: int) -> str:
    name = record.get("name", str(position))
    return name.decode() if isinstance(name, bytes) else str(name)


def _all_names(gallery: Table) -> list[str]:
    """Names of all images, stored beside the features: reading them means reading the images."""
    digest = hashlib.sha256(source_identity(gallery, "image").encode()).hexdigest()[:24]
    file = default_cache_dir() / f"names-{digest}.json"
    try:
        names = json.loads(file.read_text())
    except (OSError, ValueError):
        rows = tqdm(range(len(gallery)), desc="names of the images", unit="image", delay=1)
        names = [_name(gallery[i], i) for i in rows]
        write_atomically(file, lambda out: out.write(json.dumps(names).encode()))
    return names


def validate(path: Path, data_dir: Path | None = None) -> str:
    """What a file holds, as one line, after checking all that its server checks.

    Kind and split are recognised by the content. data_dir: prepared tables of the benchmark; if the
    split is there, query ids, image names, references and image sets are compared with it,
    otherwise with the official counts and the form of the names, which the line says.
    Raises DataError listing what is wrong, by key.
    """
    content, size = _read(Path(path))
    kind = _kind(content, path)
    keys = [key for key in content if kind == "circo" or key not in HEADER]
    problems: list[str] = []
    if kind != "circo":
        if content.get("version") != VERSION:
            problems.append(f'"version" is {content.get("version")!r}, expected "{VERSION}"')
        if size > MAX_BYTES:
            problems.append(f"{size} bytes, the server takes {MAX_BYTES}")
    official = _official(kind, keys, content, data_dir)
    problems += _check_keys(kind, keys, official)
    for key in keys:
        problems += [f"query {key}: {text}" for text in _check_list(kind, key, content, official)]
    if problems:
        listed = "\n  ".join(problems[:MAX_LISTED])
        more = len(problems) - MAX_LISTED
        raise DataError(
            f"{path}: the server would reject it ({len(problems)} problem(s)):\n  {listed}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
    what = "CIRCO" if kind == "circo" else f"CIRR {kind}"
    against = (
        f"compared with the prepared {official.split} split"
        if official is not None
        else "NOT compared with the official query ids, image names and references, because the "
        "whole benchmark is not prepared here (launch/prepare.py)"
    )
    server = SERVERS["circo" if kind == "circo" else "cirr"]
    return f"{path}: a valid {what} file, {len(keys)} queries, {against}. Server: {server}"


def _read(path: Path) -> tuple[dict[str, Any], int]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, n in collections.Counter(k for k, _ in pairs).items() if n > 1]
        if twice:
            raise DataError(f"{path}: the key {twice[0]!r} is there {len(twice) + 1} times or more")
        return dict(pairs)

    try:
        data = path.read_bytes()
        content = json.loads(data, object_pairs_hook=unique)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Write it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected one JSON object.")
    return content, len(data)


def _kind(content: Mapping[str, Any], path: Path) -> str:
    if not any(key in content for key in HEADER):
        return "circo"
    metric = content.get("metric")
    if metric not in ("recall", "recall_subset"):
        raise DataError(
            f'{path}: "metric" is {metric!r}, expected "recall" or "recall_subset" (CIRR). '
            "A CIRCO file has neither version nor metric."
        )
    return metric


def _official(
    kind: str, keys: Sequence[str], content: Mapping[str, Any], data_dir: Path | None
) -> Official | None:
    """The prepared split that the file is of: that with the most of its query ids."""
    name = "circo" if kind == "circo" else "cirr"
    entry, found = REGISTRY[name], []
    for split in ("test", "val") if kind == "circo" else ("test1", "val"):
        if data_dir is None:
            continue
        try:
            table = Table(data_dir, entry.dataset, entry.table, split)
            gallery = Table(data_dir, entry.dataset, entry.gallery, entry.gallery_split or split)
        except DataError:
            continue  # not prepared here
        if incomplete(entry, table, split, (len(table), len(gallery))):
            continue  # the server compares with the whole
        if kind == "circo" and len(table) != _circo_size(keys):
            continue
        names = _all_names(gallery)
        records = [table[i] for i in range(len(table))]
        found.append(
            Official(
                split,
                {str(int(r["id"])): names[int(r["reference"])] for r in records},
                {str(int(r["id"])): frozenset(names[c] for c in r["candidates"]) for r in records},
                frozenset(names),
            )
        )
    here = set(keys)
    best = max(found, key=lambda one: len(here & set(one.references)), default=None)
    return best if best and here & set(best.references) else None


def _circo_size(keys: Sequence[str]) -> int:
    """Queries of the split that a CIRCO file is most likely of."""
    sizes = [queries for queries, _ in REGISTRY["circo"].counts.values()]
    return min(sizes, key=lambda size: (abs(size - len(keys)), size))


def _check_keys(kind: str, keys: Sequence[str], official: Official | None) -> list[str]:
    if kind == "circo":
        expected = [str(i) for i in range(_circo_size(keys))]
    elif official is not None:
        expected = list(official.references)
    else:
        sizes = sorted({queries for queries, _ in REGISTRY["cirr"].counts.values()})
        problems = [f"{key!r} is no pair id" for key in keys if not key.isdecimal()]
        if len(keys) not in sizes:
            problems.append(f"{len(keys)} queries, the official splits have {sizes}")
        return problems
    missing, extra = set(expected) - set(keys), set(keys) - set(expected)
    problems = [f"query {key}: is missing" for key in expected if key in missing]
    problems += [f"query {key!r}: is no query of the split" for key in keys if key in extra]
    if kind == "circo" and not problems and list(keys) != expected:
        first = next(a for a, b in zip(keys, expected, strict=True) if a != b)
        problems.append(f"query {first}: out of order, expected 0, 1, 2, ...")
    return problems


def _check_list(
    kind: str, key: str, content: Mapping[str, Any], official: Official | None
) -> list[str]:
    row = content[key]
    if not isinstance(row, list):
        return [f"holds a {type(row).__name__}, expected a list"]
    well_formed = _image_id if kind == "circo" else _image_name
    if bad := [x for x in row if not well_formed(x)]:
        kind_of = "image id" if kind == "circo" else "image name (without folder and extension)"
        return [f"{bad[0]!r} is no {kind_of}"]
    names = [str(int(x)) if kind == "circo" else x for x in row]
    problems = []
    if len(names) != LENGTH[kind]:
        problems.append(f"{len(names)} images, expected {LENGTH[kind]}")
    if twice := [name for name, n in collections.Counter(names).items() if n > 1]:
        problems.append(f"{twice[0]} is there more than once")
    if official is None or key not in official.references:
        return problems
    if unknown := [name for name in names if name not in official.images]:
        problems.append(f"{unknown[0]} is no image of the gallery")
    if kind != "circo" and official.references[key] in names:
        problems.append(f"its reference {official.references[key]} is in the list")
    if kind == "recall_subset":
        outside = [name for name in names if name not in official.members[key]]
        problems += [f"{outside[0]} is not in its image set"] if outside else []
    return problems


def _image_id(x: Any) -> bool:
    return (isinstance(x, int) and not isinstance(x, bool) and x >= 0) or (
        isinstance(x, str) and x.isdecimal()
    )


def _image_name(x: Any) -> bool:
    return isinstance(x, str) and bool(x) and "/" not in x and not x.endswith((".png", ".jpg"))
