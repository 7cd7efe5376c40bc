"""Ranks CIRCO's test split by size: 800 queries among 123,403 images of 768 features.

    python benchmarks/ranking.py [--output=FILE] [--contenders=cir_jax,numpy,torch,faiss]

Prints and writes as JSON: seconds, CPU seconds and added memory of each, the least of --repeats
runs, each in a process of its own. No data are needed: features are random, in a file that all
read. The seconds are those of a second ranking; memory is the peak of both above what the process
holds with features loaded and the libraries in use, so what ours compiles counts. Another load on
the machine disturbs the seconds, the others less; `load` says how busy it was.

cir_jax gives the 50 best images and the exact ranks of five targets per query, in `cir_jax_top`
the images alone, as the others do: numpy (a product per block, `argpartition`), torch (the same
with `topk`), faiss (`knn`, its exact search without an index). Those that are not installed are
left out and said: pip install torch faiss-cpu.
"""

import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

from benchmarks.machine import forget_peak, held_mib  # noqa: E402

CONTENDERS = ("cir_jax", "cir_jax_top", "numpy", "torch", "faiss")
K = 50
TARGETS = 5
BLOCK = 8192
"""Images per block of the others, whose scores of all queries then take 25 MiB."""

OUTPUT = flags.DEFINE_string("output", str(ROOT / "benchmarks" / "ranking.json"), "File to write")
IMAGES = flags.DEFINE_integer("images", 123403, "Images in the gallery", lower_bound=K)
QUERIES = flags.DEFINE_integer("queries", 800, "Queries", lower_bound=1)
DIM = flags.DEFINE_integer("dim", 768, "Features per image", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 3, "Processes per contender", lower_bound=1)
WHO = flags.DEFINE_multi_enum("contenders", None, CONTENDERS, "Which; default all")
WORKER = flags.DEFINE_list("worker", None, "NAME,FOLDER: measures one, for the command itself")

RANKS: list[np.ndarray] = []
"""Target ranks of the last call, to be checked when the clock has stopped."""

Rank = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(queries, gallery, targets) -> int[queries, K] positions, best first."""


def ours(queries: np.ndarray, gallery: np.ndarray, targets: np.ndarray) -> np.ndarray:
    from cir_jax.retrieval import ranking

    found = ranking.rank(queries, gallery, k=K, targets=targets)
    RANKS.append(found.target_ranks)
    return found.top


def ours_top(queries: np.ndarray, gallery: np.ndarray, targets: np.ndarray) -> np.ndarray:
    from cir_jax.retrieval import ranking

    return ranking.rank(queries, gallery, k=K).top


def with_numpy(queries: np.ndarray, gallery: np.ndarray, targets: np.ndarray) -> np.ndarray:
    best = np.full((len(queries), 0), 0.0, np.float32)
    top = np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(gallery), BLOCK):
        scores = queries @ gallery[start : start + BLOCK].T
        k = min(K, scores.shape[1])
        found = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:]
        best = np.concatenate([best, np.take_along_axis(scores, found, axis=1)], axis=1)
        top = np.concatenate([top, found + start], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :K]
        best, top = (np.take_along_axis(x, order, axis=1) for x in (best, top))
    return top


def with_torch(queries: np.ndarray, gallery: np.ndarray, targets: np.ndarray) -> np.ndarray:
    import torch

    asked, images = torch.from_numpy(queries), torch.from_numpy(gallery)
    best = top = None
    with torch.inference_mode():
        for start in range(0, len(images), BLOCK):
            scores = asked @ images[start : start + BLOCK].T
            values, found = scores.topk(min(K, scores.shape[1]), dim=1)
            found += start
            if best is not None:
                values, found = torch.cat([best, values], 1), torch.cat([top, found], 1)
            best, order = values.topk(min(K, values.shape[1]), dim=1)
            top = found.gather(1, order)
    return top.numpy()


def with_faiss(queries: np.ndarray, gallery: np.ndarray, targets: np.ndarray) -> np.ndarray:
    import faiss

    return faiss.knn(queries, gallery, K, metric=faiss.METRIC_INNER_PRODUCT)[1]


RANK: dict[str, Rank] = {
    "cir_jax": ours,
    "cir_jax_top": ours_top,
    "numpy": with_numpy,
    "torch": with_torch,
    "faiss": with_faiss,
}


def work(name: str, folder: Path) -> dict[str, float]:
    """One measurement, in this process."""
    queries, gallery, targets = (
        np.load(folder / f"{x}.npy") for x in ("queries", "gallery", "targets")
    )
    few = gallery[: 4 * K]
    RANK[name](queries[:8], few, np.minimum(targets[:8], len(few) - 1 - np.arange(TARGETS)))
    forget_peak()
    before = held_mib("VmRSS")
    RANK[name](queries, gallery, targets)  # compiles, starts threads
    began, used = time.perf_counter(), time.process_time()
    top = RANK[name](queries, gallery, targets)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    added = held_mib("VmHWM") - before
    for row in range(0, len(queries), max(1, len(queries) // 5)):
        scores = gallery @ queries[row]
        for target, rank in zip(targets[row], RANKS[-1][row] if RANKS else (), strict=False):
            # exact but for scores that the two products round to the other side
            low, high = (int((scores > scores[target] + x).sum()) for x in (1e-6, -1e-6))
            assert low <= rank <= high, (row, target, rank, low, high)
        best = np.sort(scores)[::-1][:K]
        np.testing.assert_allclose(scores[top[row]], best, rtol=1e-5)
    return {"seconds": seconds, "cpu_seconds": cpu, "added_mib": added}


def measure(folder: Path, contenders: list[str]) -> dict[str, Any]:
    """All contenders in turn, and again; the least of each measure."""
    found: dict[str, list[dict[str, float]]] = {}
    absent = [n for n in contenders if n in ("torch", "faiss") and not importlib.util.find_spec(n)]
    for _ in range(REPEATS.value):
        for name in contenders:
            if name in absent:
                continue
            command = [sys.executable, __file__, f"--worker={name},{folder}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            found.setdefault(name, []).append(json.loads(done.stdout))
    least = {
        name: {key: round(min(run[key] for run in runs), 2) for key in runs[0]}
        for name, runs in found.items()
    }
    return {"contenders": least, "absent": absent}


def prepare(folder: Path) -> None:
    """Unit features, and targets that differ within a query."""
    rng = np.random.default_rng(0)
    for name, rows in (("gallery", IMAGES.value), ("queries", QUERIES.value)):
        x = rng.standard_normal((rows, DIM.value), np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        np.save(folder / f"{name}.npy", x)
    first = rng.integers(0, IMAGES.value, (QUERIES.value, 1))
    np.save(
        folder / "targets.npy", ((first + np.arange(TARGETS) * 7) % IMAGES.value).astype(np.int32)
    )


def main(_: list[str]) -> None:
    if WORKER.value:
        name, folder = WORKER.value
        print(json.dumps(work(name, Path(folder))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        measured = measure(Path(scratch), list(WHO.value or CONTENDERS))
    import jax

    measured |= {
        "images": IMAGES.value,
        "queries": QUERIES.value,
        "dim": DIM.value,
        "repeats": REPEATS.value,
        "features_mib": round(4 * DIM.value * (IMAGES.value + QUERIES.value) / 2**20),
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(x, 1) for x in os.getloadavg()],
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "numpy": np.__version__,
        },
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/ranking.py",
    }
    text = json.dumps(measured, indent=1) + "\n"
    Path(OUTPUT.value).write_text(text)
    print(text, end="")
    if measured["absent"]:
        print(f"left out, not installed: {', '.join(measured['absent'])}", file=sys.stderr)


if __name__ == "__main__":
    app.run(main)
