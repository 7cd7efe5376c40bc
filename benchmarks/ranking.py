"""Ranks CIRCO's test split by size: 800 queries among 123,403 images of 768 features.

    python benchmarks/ranking.py [--output=FILE]

Prints seconds and memory, and writes them as JSON. No data are needed: features are random. Memory
is what ranking adds to the features themselves, as the peak of the process.
"""

import datetime
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402

OUTPUT = flags.DEFINE_string("output", str(ROOT / "benchmarks" / "ranking.json"), "File to write")
IMAGES = flags.DEFINE_integer("images", 123403, "Images in the gallery")
QUERIES = flags.DEFINE_integer("queries", 800, "Queries")
DIM = flags.DEFINE_integer("dim", 768, "Features per image")


def peak_mib() -> float:
    """The largest memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(images: int, queries: int, dim: int) -> dict[str, Any]:
    """Seconds of the first and the second ranking, and the memory both needed."""
    import jax

    from cir_jax.retrieval import ranking
    from cir_jax.retrieval.features import unit

    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((images, dim), np.float32)
    for start in range(0, images, 4096):  # in place: the peak shall be that of ranking
        gallery[start : start + 4096] = unit(gallery[start : start + 4096])
    asked = unit(rng.standard_normal((queries, dim), np.float32))
    targets = rng.integers(0, images, (queries, 5)).astype(np.int32)
    jax.block_until_ready(jax.numpy.zeros(1))
    before, seconds = peak_mib(), []
    for _ in range(2):
        began = time.perf_counter()
        found = ranking.rank(asked, gallery, k=50, targets=targets)
        seconds.append(round(time.perf_counter() - began, 2))
    # the ranking is right: checked on a few queries by sorting everything
    for row in range(0, queries, max(1, queries // 5)):
        scores = gallery @ asked[row]
        best = np.sort(scores)[::-1][:50]
        np.testing.assert_allclose(scores[found.top[row]], best, rtol=1e-5)
    return {
        "images": images,
        "queries": queries,
        "dim": dim,
        "seconds_with_compilation": seconds[0],
        "seconds": seconds[1],
        "memory_features_mib": round((gallery.nbytes + asked.nbytes) / 2**20),
        "memory_added_by_ranking_mib": round(peak_mib() - before),
        "memory_limit_of_scores_mib": ranking.SCORE_BYTES >> 20,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/ranking.py",
    }


def main(_: list[str]) -> None:
    measured = measure(IMAGES.value, QUERIES.value, DIM.value)
    text = json.dumps(measured, indent=1) + "\n"
    Path(OUTPUT.value).write_text(text)
    print(text, end="")


if __name__ == "__main__":
    app.run(main)
