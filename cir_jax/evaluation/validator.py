"""Would a test server take this file? And what a file of the public val splits scores.

Whoever wrote it: the order of the keys is free (SEARLE's files are sorted as text: "0", "1", "10"),
image ids of CIRCO are numbers or texts of them. What is official (`Facts`) comes from the authors'
annotation files (`data.official`) or from prepared tables (`prepared`).
"""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cir_jax.errors import DataError
from cir_jax.evaluation import protocols
from cir_jax.evaluation.benchmarks import NAMES, REGISTRY, incomplete
from cir_jax.evaluation.metrics import Estimate
from cir_jax.evaluation.protocols import Outcome, Protocol
from cir_jax.evaluation.queries import pad_rows
from cir_jax.evaluation.submissions import (
    HEADER,
    HIDDEN,
    LENGTH,
    MAX_BYTES,
    SERVERS,
    VERSION,
)
from cir_jax.input.identity import source_identity
from cir_jax.input.tables import Table, is_prepared
from cir_jax.progress import Progress
from cir_jax.storage.atomic import write_atomically
from cir_jax.storage.places import default_cache_dir

MAX_LISTED = 10
PREFIXES = {"test1": "test1", "val": "dev", "train": "train"}
"""CIRR's split -> how the names of its images begin."""

BEHIND = 1 << 20
"""Stands for the rank of a target that is not in the list."""


@dataclasses.dataclass(frozen=True)
class OfficialQuery:
    """A query as the official files say it, images by name.

    members: CIRR's image set. targets: empty where the labels are not public, single one first.
    """

    reference: str
    members: frozenset[str] = frozenset()
    targets: tuple[str, ...] = ()
    aspects: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of one split.

    queries: query id -> `OfficialQuery`. images: of the gallery, None = not known. where: what says
    so.
    """

    split: str
    queries: Mapping[str, OfficialQuery]
    images: frozenset[str] | None
    where: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """accepted: the server will take it. local: right, but of a split with public labels, which no
    server takes. form: right in its form; nothing was there to compare it with.

    metrics: of a "local" file whose ground truth is known.
    """

    kind: Literal["accepted", "local", "form"]
    text: str
    metrics: Mapping[str, Estimate] = dataclasses.field(default_factory=dict)


STATUS = {"accepted": 0, "local": 1, "form": 3}
"""Exit status of the command; 2 is an error, as everywhere."""


def validate(
    path: Path, known: Mapping[str, Sequence[Facts]] | None = None, where: str = ""
) -> Verdict:
    """Checks all that the server checks, and that the file is for it.

    Kind and split are recognised by the content. known: benchmark ("circo", "cirr") -> splits.
    where: what they come from, for the text.
    Raises DataError listing what is wrong, by query.
    """
    path = Path(path)
    content, size = read(path)
    kind = _kind(content, path)
    benchmark = "circo" if kind == "circo" else "cirr"
    keys = [key for key in content if kind == "circo" or key not in HEADER]
    problems: list[str] = []
    if kind != "circo":
        if content.get("version") != VERSION:
            problems.append(f'"version" is {content.get("version")!r}, expected "{VERSION}"')
        if size > MAX_BYTES:
            problems.append(f"{size} bytes, the server takes {MAX_BYTES}")
    split = _circo_split(keys) if kind == "circo" else _cirr_split(content, keys)
    facts = next((one for one in (known or {}).get(benchmark, ()) if one.split == split), None)
    problems += _check_keys(benchmark, split, keys, facts)
    for key in keys:
        asked = facts.queries.get(key) if facts else None
        images = facts.images if facts else None
        found = _check_list(kind, split, content[key], asked, images)
        problems += [f"query {key}: {text}" for text in found]
    if not problems and kind == "circo":
        problems += _positions(content)
    if problems:
        listed = "\n  ".join(problems[:MAX_LISTED])
        more = len(problems) - MAX_LISTED
        raise DataError(
            f"{path}: as a {_called(kind)} file of {split} it is wrong ({len(problems)} "
            f"problem(s)):\n  {listed}" + (f"\n  and {more} more" if more > 0 else "")
        )
    return _verdict(path, kind, split, content, keys, facts, where)


def _verdict(
    path: Path,
    kind: str,
    split: str,
    content: Mapping[str, Any],
    keys: Sequence[str],
    facts: Facts | None,
    where: str,
) -> Verdict:
    benchmark = "circo" if kind == "circo" else "cirr"
    what = f"{path}: a {_called(kind)} file of {split}, {len(keys)} queries"
    against = "form only: its query ids, references and images were compared with nothing"
    if where and facts is None:
        against += f", because {where} has nothing of {benchmark}'s {split}"
    complete = False
    if facts is not None:
        official = REGISTRY[benchmark].counts[split][0]
        complete = len(facts.queries) == official
        against = f"compared with {facts.where}"
        if facts.images is None:
            against += " (but for the names of its images, which are not listed there)"
        if not complete:
            against += f", which has {len(facts.queries)} of the {official} official queries"
    if split != HIDDEN[benchmark]:
        labelled = facts is not None and any(one.targets for one in facts.queries.values())
        text = f"{what}, {against}. Its labels are public: never send it to the server"
        if not labelled or facts is None:
            again = f"python launch/eval.py --validate_submission={path} --source=DIR"
            return Verdict("local", f"{text}; score it locally: {again}")
        scored = score(kind, content, facts)
        numbers = "  ".join(f"{name} {one.value:.2f}" for name, one in scored.items())
        return Verdict("local", f"{text}. Scored locally:\n  {numbers}", scored)
    if not complete:
        return Verdict(
            "form",
            f"{what}, {against}. Give the authors' annotation files with --source=DIR, or prepare "
            "the whole benchmark (launch/prepare.py)",
        )
    return Verdict("accepted", f"{what}, {against}: valid. Server: {SERVERS[benchmark]}")


def score(kind: str, content: Mapping[str, Any], facts: Facts) -> dict[str, Estimate]:
    """The numbers of a file's lists, percent: what the server's metrics give on public labels."""
    ranks = pad_rows([_ranks(content[key], asked.targets) for key, asked in facts.queries.items()])
    nothing = np.full(len(ranks), -1, np.int32)
    aspects = tuple(asked.aspects for asked in facts.queries.values())
    subset = ranks[:, 0] if kind == "recall_subset" else nothing
    outcome = Outcome(ranks, subset, ("",) * len(ranks), aspects)
    return protocols.measure(_protocol(kind), outcome)


def _protocol(kind: str) -> Protocol:
    if kind == "circo":
        return protocols.CIRCO
    other = {"recall": "subset_recall", "recall_subset": "recall"}[kind]
    return dataclasses.replace(protocols.CIRR, average=(), **{other: ()})


def _ranks(row: Iterable[Any], targets: Sequence[str]) -> list[int]:
    place = {str(name).lstrip("0") or "0": rank for rank, name in enumerate(row)}
    return [place.get(target.lstrip("0") or "0", BEHIND) for target in targets]


def prepared(data_dir: Path) -> dict[str, list[Facts]]:
    """The whole splits that are prepared in the folder, as `validate` takes them."""
    found: dict[str, list[Facts]] = {"circo": [], "cirr": []}
    for name, splits in found.items():
        entry = REGISTRY[name]
        for split in (HIDDEN[name], "val"):
            try:
                table = Table(data_dir, entry.dataset, entry.table, split)
                images = entry.gallery_split or split
                gallery = Table(data_dir, entry.dataset, entry.gallery, images)
            except DataError:
                continue  # not prepared here
            if incomplete(entry, table, split, (len(table), len(gallery))):
                continue  # the server compares with the whole
            if is_prepared(data_dir, entry.dataset, NAMES):
                gallery = Table(data_dir, entry.dataset, NAMES, images)
            names = all_names(gallery)
            queries = {}
            for i in range(len(table)):
                r = table[i]
                queries[str(int(r["id"]))] = OfficialQuery(
                    names[int(r["reference"])],
                    frozenset(names[int(c)] for c in r["candidates"]),
                    tuple(names[int(t)] for t in r["targets"]),
                    tuple(a.decode() if isinstance(a, bytes) else str(a) for a in r["aspects"]),
                )
            splits.append(Facts(split, queries, frozenset(names), f"the prepared {split} split"))
    return found


def all_names(gallery: Table) -> list[str]:
    """Names of all images, stored beside the features: tables built before there was the table
    `names` have them beside the images, and reading a record reads both."""
    digest = hashlib.sha256(source_identity(gallery, "name").encode()).hexdigest()[:24]
    file = default_cache_dir() / f"names-{digest}.json"
    try:
        names = json.loads(file.read_text())
    except (OSError, ValueError):
        rows = Progress(range(len(gallery)), desc="names of the images", unit="image", delay=1)
        names = [gallery[i]["name"].decode() for i in rows]
        write_atomically(file, lambda out: out.write(json.dumps(names).encode()))
    return names


def read(path: Path) -> tuple[dict[str, Any], int]:
    """The file's object, and its size in bytes. Raises DataError for what is no such file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, n in collections.Counter(k for k, _ in pairs).items() if n > 1]
        if twice:
            raise DataError(f"{path}: the key {twice[0]!r} is there more than once.")
        return dict(pairs)

    try:
        data = path.read_bytes()
        content = json.loads(data.decode(), object_pairs_hook=unique)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except DataError:
        raise
    except ValueError as error:  # also a byte order mark, which the servers cannot read
        raise DataError(f"{path}: not valid JSON in UTF-8 ({error}). Write it again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected one JSON object.")
    return content, len(data)


def _called(kind: str) -> str:
    return "CIRCO" if kind == "circo" else f"CIRR {kind}"


def _kind(content: Mapping[str, Any], path: Path) -> str:
    metric = content.get("metric")
    if not any(key in content for key in HEADER):
        if not any(_image_name(x) and not x.isdecimal() for x in _values(content)):
            return "circo"
    elif metric in ("recall", "recall_subset"):
        return metric
    raise DataError(
        f'{path}: "metric" is {metric!r}, expected "recall" or "recall_subset" (CIRR). '
        "A CIRCO file has neither version nor metric, and lists image ids."
    )


def _values(content: Mapping[str, Any]) -> Iterable[Any]:
    return (x for row in content.values() if isinstance(row, list) for x in row)


def _circo_split(keys: Sequence[str]) -> str:
    """The split that a file is most likely of: its ids begin at 0 in both."""
    counts = REGISTRY["circo"].counts
    return min(counts, key=lambda split: (abs(counts[split][0] - len(keys)), counts[split][0]))


def _cirr_split(content: Mapping[str, Any], keys: Sequence[str]) -> str:
    """That of most of its images, by their names; of hidden labels where they say nothing."""
    rows = (content[key] for key in keys)
    found = collections.Counter(
        x.partition("-")[0] for row in rows if isinstance(row, list) for x in row if _image_name(x)
    )
    return max(PREFIXES, key=lambda split: found[PREFIXES[split]])


def _check_keys(benchmark: str, split: str, keys: Sequence[str], facts: Facts | None) -> list[str]:
    official = REGISTRY[benchmark].counts[split][0]
    if facts is not None:
        expected: list[str] = list(facts.queries)
    elif benchmark == "circo":
        expected = [str(i) for i in range(official)]
    else:
        problems = [f"query {key!r}: is no pair id" for key in keys if not _number(key)]
        if len(keys) != official:
            problems.append(f"{len(keys)} queries, {split} has {official}")
        return problems
    missing, extra = set(expected) - set(keys), set(keys) - set(expected)
    problems = [f"query {key}: is missing" for key in expected if key in missing]
    return problems + [f"query {key!r}: is no query of the split" for key in keys if key in extra]


def _check_list(
    kind: str, split: str, row: Any, asked: OfficialQuery | None, images: frozenset[str] | None
) -> list[str]:
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
    if images is not None:
        outside = [name for name in names if name not in images]
    elif kind != "circo":
        outside = [name for name in names if not name.startswith(f"{PREFIXES[split]}-")]
    else:
        outside = []
    if outside:
        problems.append(f"{outside[0]} is no image of the gallery")
    if asked is None or kind == "circo":
        return problems
    if asked.reference in names:
        problems.append(f"its reference {asked.reference} is in the list")
    if kind == "recall_subset":
        outside = [name for name in names if name not in asked.members]
        problems += [f"{outside[0]} is not in its image set"] if outside else []
    return problems


def _positions(content: Mapping[str, Any]) -> list[str]:
    """COCO's ids go up to 581,929: all of them below the gallery's size are its positions."""
    size = REGISTRY["circo"].counts["test"][1]
    if any(int(x) >= size for x in _values(content)):
        return []
    return [f"all image ids are below {size}: positions in the gallery instead of COCO's ids?"]


def _number(x: str) -> bool:
    return re.fullmatch(r"[0-9]+", x) is not None


def _image_id(x: Any) -> bool:
    return (isinstance(x, int) and not isinstance(x, bool) and x >= 0) or (
        isinstance(x, str) and _number(x)
    )


def _image_name(x: Any) -> bool:
    return isinstance(x, str) and bool(x) and "/" not in x and not x.endswith((".png", ".jpg"))
