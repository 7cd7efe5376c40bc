"""The rungs of a library's index, as it grows: what each takes, and what it misses.

    python benchmarks/ladder.py [--photos=120000,1000000] [--dim=512]

The vectors are random, of unit norm, in a store as `cir index` writes it; their variance falls as
1/i over the dimensions, so that some are near each other, as features of photographs are. A query
is the sum of two of them and of noise of its size, as FAISS's lists are tuned on, drawn otherwise.
Each measurement is a process of its own; seconds are those on the wall, and the processor's, which
another load disturbs less:

    make      FAISS's file, of the store's vectors, on all cores: sampled, learnt, filled, tuned
    open      from the files to the first answer, on one core, in a process that has imported all
              and has asked a small store before
    query     the best 10, median of --queries, on one core, a query at a time
    memory    the peak while it opens and answers, beyond what the process held before
    recall    of the 10 best by an exact scan, those that are found, over all queries

Qdrant is left out: what its local mode does is no server's. "sharded" is on one device here, the
CPU: what is measured is the program, not a pod. Writes benchmarks/ladder.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.library import BATCH, clocks, prepare  # noqa: E402
from benchmarks.machine import forget_peak, held_mib, signed  # noqa: E402

K = 10
RUNGS = ("exact", "faiss", "sharded")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def vectors(count: int, dim: int) -> Iterator[np.ndarray]:
    rng, falling = np.random.default_rng(0), (1 / np.arange(1, dim + 1)) ** 0.5
    for start in range(0, count, BATCH):
        rows = rng.standard_normal((min(BATCH, count - start), dim), np.float32)
        yield unit(rows * falling.astype(np.float32))


def queries(count: int, dim: int) -> np.ndarray:
    """float32[count, dim]; of photos that lie at the beginning."""
    rng = np.random.default_rng(1)
    photos = next(vectors(BATCH, dim))
    pairs = photos[rng.choice(len(photos), (count, 2))].sum(axis=1)
    return unit(unit(pairs) + unit(rng.standard_normal(pairs.shape, np.float32)))


def is_made(folder: Path) -> bool:
    return any(folder.glob("library.sqlite.*.faiss"))


def measured(rung: str, folder: Path, asked: np.ndarray) -> dict[str, Any]:
    """In a process of its own."""
    from cir_jax.library.indexes import ladder
    from cir_jax.library.indexes.base import Found, recall, scan
    from cir_jax.library.store import Store
    from cir_jax.library.vectors import Vectors
    from cir_jax.sharding.mesh import make_mesh

    mesh = make_mesh({"data": -1})

    def opened(name: str) -> tuple[Any, Vectors]:
        made = Vectors(Store(folder / f"{name}.sqlite"), 1)
        given = dict(space=lambda: "random", scoring={}, method="", mesh=mesh, say=print)
        index = ladder.opened(rung, made, **given)
        ladder.follow(index, made)
        return index, made

    opened("few")[0].search(asked[:1], K)
    report: dict[str, Any] = {}
    if rung == "faiss":
        if not is_made(folder):
            began = clocks()
            opened("library")
            wall, cpu = clocks() - began
            return {"make_seconds": round(wall, 1), "make_cpu_seconds": round(cpu, 1)}
        import faiss

        faiss.omp_set_num_threads(1)
        (file,) = folder.glob("library.sqlite.*.faiss")
        report["file_mib"] = round(file.stat().st_size / 2**20, 1)
    before = held_mib("VmRSS")
    forget_peak()
    began = clocks()
    index, made = opened("library")
    index.search(asked[:1], K)
    wall, cpu = clocks() - began
    report |= {"open_seconds": round(wall, 2), "open_cpu_seconds": round(cpu, 2)}
    took, found = [], []
    for query in asked:
        began = clocks()
        found.append(index.search(query[None], K))
        took.append(clocks() - began)
    wall, cpu = 1000 * np.median(took, axis=0)
    report |= {"query_ms": round(wall, 2), "query_cpu_ms": round(cpu, 2)}
    report["memory_mib"] = round(held_mib("VmHWM") - before, 1)
    if rung == "faiss":
        report["lists"], report["lists_looked_into"] = index.lists
    best = scan(made.read, asked, K)
    report["recall"] = round(recall(Found(*map(np.concatenate, zip(*found, strict=True))), best), 4)
    assert index.approximate or report["recall"] == 1, report
    return report


def table(report: dict[str, Any]) -> str:
    """For docs/search.md: the processor's time."""
    lines = [
        "| photos | index | to make it | to open it | a query | memory | recall@10 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for count, rungs in report["photos"].items():
        for rung, found in rungs.items():
            made = f"{found['make_cpu_seconds']:.0f} s" if "make_cpu_seconds" in found else ""
            lines.append(
                f"| {int(count):,} | `{rung}` | {made} | {found['open_cpu_seconds']:.1f} s | "
                f"{found['query_cpu_ms']:.0f} ms | {found['memory_mib']:.0f} MiB | "
                f"{found['recall']:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", default="120000,1000000,2000000")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "ladder.json")
    parser.add_argument("--worker", nargs=2, help="RUNG FOLDER: one of them, in this process")
    args = parser.parse_args()
    if args.worker:
        rung, folder = args.worker[0], Path(args.worker[1])
        if rung != "faiss" or is_made(folder):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # of threads that are to come
        found = measured(rung, folder, queries(args.queries, args.dim))
        print(json.dumps(found))
        return
    load, sizes = os.getloadavg(), {}
    for count in map(int, args.photos.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            prepare(Path(scratch), count, args.dim, vectors)
            sizes[str(count)] = found = {}
            for rung in RUNGS:
                given = [f"--{name}={getattr(args, name)}" for name in ("dim", "queries")]
                command = [sys.executable, __file__, *given, "--worker", rung, scratch]
                found[rung] = {}
                for _ in range(1 + (rung == "faiss")):  # one makes the file that another opens
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        sys.exit(f"{rung} failed:\n{done.stderr[-2000:]}")
                    found[rung] |= json.loads(done.stdout.splitlines()[-1])
                print(count, rung, found[rung], file=sys.stderr)
    report = {
        "dim": args.dim,
        "queries": args.queries,
        "photos": sizes,
        **signed("python benchmarks/ladder.py", load, "numpy", "faiss-cpu", "jax"),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
