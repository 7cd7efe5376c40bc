"""A library of 120,000 photos: opening it, a query, its memory; FAISS beside.

    python benchmarks/library.py [--photos=120000] [--dim=512]

The vectors are random, of unit norm, in a store as `cir index` writes it; a query is a random
vector, too, so that nothing is encoded: what is timed begins where the composed query is there.
Each measurement is a process of its own on one core (its affinity, not a wish):

    open      from the SQLite file to vectors that can be ranked, in a process that has imported all
              and has opened a store of 100 photos before; the file was read before, too; and the
              processor's time of it
    query     the best 64 of all, median and 9th of ten of --queries, after three that are not
              timed; and the processor's time of one, which another load on the core disturbs less
    memory    the peak while it opens and answers, beyond what the process held before; times the
              vectors: in float16, as they are stored and held, and in float32

FAISS: `IndexFlatIP`, exact, on the same vectors in float32, on one thread; `open` is its own file.
Where it is not installed it is left out and said: pip install faiss-cpu. Writes
benchmarks/library.json.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.machine import forget_peak, held_mib, signed  # noqa: E402

K = 64
FEW = 100
BATCH = 2048


def vectors(count: int, dim: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for start in range(0, count, BATCH):
        rows = rng.standard_normal((min(BATCH, count - start), dim), np.float32)
        yield rows / np.linalg.norm(rows, axis=1, keepdims=True)


def queries(count: int, dim: int) -> np.ndarray:
    rows = np.random.default_rng(1).standard_normal((count, 1, dim), np.float32)
    return rows / np.linalg.norm(rows, axis=2, keepdims=True)


def prepare(
    folder: Path, count: int, dim: int, of: Callable[[int, int], Iterator[np.ndarray]] = vectors
) -> None:
    """Two stores, "few" and "library"."""
    from cir_jax.library.photos import File
    from cir_jax.library.store import New, Store

    for name, rows in (("few", FEW), ("library", count)):
        store, done = Store(folder / f"{name}.sqlite"), 0
        encoder = store.encoder("random", "{}")
        for piece in of(rows, dim):
            files = [File(f"2024/{done + i:07}.jpg".encode(), 1, 1) for i in range(len(piece))]
            store.add(encoder, [New(file, file.path[-16:], "", "") for file in files], piece)
            done += len(piece)
        store.close()


def ours(folder: Path, count: int, dim: int, asked: np.ndarray) -> dict[str, Any]:
    from cir_jax.library.indexes import ladder
    from cir_jax.library.indexes.exact import Exact
    from cir_jax.library.store import Store
    from cir_jax.library.vectors import Vectors

    def opened(name: str) -> Exact:
        index = Exact()
        ladder.follow(index, Vectors(Store(folder / f"{name}.sqlite"), 1))
        return index

    opened("few").search(asked[0], K)
    before = held_mib("VmRSS")
    forget_peak()
    began = clocks()
    index = opened("library")
    seconds = clocks() - began
    assert len(index) == count

    def rank(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = index.search(query, K)
        return found.ids[0] - 1, found.scores[0]

    return measured(rank, asked, seconds, before, count, dim)


def faiss(folder: Path, count: int, dim: int, asked: np.ndarray) -> dict[str, Any]:
    import faiss

    faiss.omp_set_num_threads(1)
    file = str(folder / "flat.faiss")
    if not Path(file).exists():
        index = faiss.IndexFlatIP(dim)
        for piece in vectors(count, dim):
            index.add(piece)
        faiss.write_index(index, file)
        del index
    before = held_mib("VmRSS")
    forget_peak()
    began = clocks()
    index = faiss.read_index(file)
    seconds = clocks() - began

    def rank(query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, top = index.search(query, K)
        return top[0], scores[0]

    return measured(rank, asked, seconds, before, count, dim)


def clocks() -> np.ndarray:
    """Seconds on the wall, seconds of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def measured(
    rank: Any, asked: np.ndarray, opened: np.ndarray, before: float, count: int, dim: int
) -> dict[str, Any]:
    took, found = [], []
    for query in asked:
        began = clocks()
        found.append(rank(query))
        took.append(1000 * (clocks() - began))
    memory, took = held_mib("VmHWM") - before, np.sort(took[3:], axis=0)
    check(asked[-1], found[-1], count, dim)
    return {
        "open_seconds": round(opened[0], 3),
        "open_cpu_seconds": round(opened[1], 3),
        "query_ms": round(statistics.median(took[:, 0]), 2),
        "query_ms_9_of_10": round(took[int(0.9 * (len(took) - 1)), 0], 2),
        "query_cpu_ms": round(took[:, 1].mean(), 2),
        "memory_mib": round(memory, 1),
        "times_float16": round(memory / (2 * count * dim / 2**20), 2),
        "times_float32": round(memory / (4 * count * dim / 2**20), 2),
    }


def check(query: np.ndarray, found: tuple[np.ndarray, np.ndarray], count: int, dim: int) -> None:
    """It is the exact answer, but for what half precision rounds."""
    scores = np.concatenate([piece @ query[0] for piece in vectors(count, dim)])
    np.testing.assert_allclose(found[1], np.sort(scores)[::-1][:K], atol=2e-4)
    np.testing.assert_allclose(scores[found[0]], found[1], atol=2e-4)


CONTENDERS = {"cir_jax": ours, "faiss": faiss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=120_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=50, help="that are timed")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "library.json")
    parser.add_argument("--worker", nargs=2, help="NAME FOLDER: one of them, in this process")
    args = parser.parse_args()
    if args.worker:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        name, folder = args.worker
        asked = queries(3 + args.queries, args.dim)
        print(json.dumps(CONTENDERS[name](Path(folder), args.photos, args.dim, asked)))
        return
    load, found, absent = os.getloadavg(), {}, []
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch), args.photos, args.dim)
        sizes = [f"--{name}={getattr(args, name)}" for name in ("photos", "dim", "queries")]
        for name in CONTENDERS:
            if name == "faiss" and importlib.util.find_spec("faiss") is None:
                absent.append(name)
                continue
            command = [sys.executable, __file__, *sizes, "--worker", name, scratch]
            if name == "faiss":  # its first process writes the file that the second opens
                subprocess.run(command, capture_output=True, check=True)
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            found[name] = json.loads(done.stdout)
        store = (Path(scratch) / "library.sqlite").stat().st_size / 2**20
    report = {
        "photos": args.photos,
        "dim": args.dim,
        "queries": args.queries,
        "store_mib": round(store, 1),
        "contenders": found,
        "absent": absent,
        **signed("python benchmarks/library.py", load, "numpy"),
    }
    text = json.dumps(report, indent=1) + "\n"
    args.output.write_text(text)
    print(text, end="")
    if absent:
        print(f"left out, not installed: {', '.join(absent)}", file=sys.stderr)


if __name__ == "__main__":
    main()
