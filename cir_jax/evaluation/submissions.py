"""Files for the test servers of CIRR and CIRCO; `validator` says what the servers would reject.

CIRR (cirr.cecs.anu.edu.au): two files, {"version": "rc2", "metric": "recall", pair id: [50 names]}
and "recall_subset" with 3 names. CIRCO (circo.micc.unifi.it): {query id: [50 image ids]}.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cir_jax.evaluation.queries import Benchmark
from cir_jax.evaluation.result import Result
from cir_jax.storage.atomic import write_atomically

LENGTH = {"recall": 50, "recall_subset": 3, "circo": 50}
"""Images per query of each kind of file."""

VERSION = "rc2"
MAX_BYTES = 5 << 20
"""What CIRR's server takes."""

SERVERS = {
    "cirr": "https://cirr.cecs.anu.edu.au (or https://cirr.junjie.au)",
    "circo": "https://circo.micc.unifi.it",
}
HEADER = ("version", "metric")
HIDDEN = {"circo": "test", "cirr": "test1"}
"""Benchmark -> the split whose labels only the server has."""


def write(result: Result, benchmark: Benchmark, output: Path) -> list[Path]:
    """Writes the server's files of a split without public labels into `output`, and returns them.

    Nothing for benchmarks without a server. Partial data: "partial" stands in the file's name, for
    the server will refuse it. On process 0 only; each file whole or not at all.
    """
    if benchmark.protocol.name not in SERVERS or benchmark.protocol.text == "inversion":
        return []
    names = image_names(benchmark, [result.top, result.subset_top])
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


def image_names(benchmark: Benchmark, tops: Sequence[np.ndarray]) -> dict[int, str]:
    """Position -> name of the images that occur in `tops`."""
    used = np.unique(np.concatenate([top.reshape(-1) for top in tops]))
    return {int(i): benchmark.image_name(int(i)) for i in used if i >= 0}
