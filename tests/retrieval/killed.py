"""Extracts features slowly, to be killed: `python -m tests.retrieval.killed CACHE_DIR OUTPUT`."""

import sys
import time
from pathlib import Path

import numpy as np

from cir_jax.retrieval import features
from cir_jax.sharding.mesh import make_mesh
from cir_jax.storage import chunk_store
from tests import tiny

ROWS, CHUNK = 60, 4


class SlowTable(tiny.MemoryTable):
    """Says which rows were read."""

    def __init__(self, records, log):
        super().__init__(records)
        self.log = log

    def identity(self):
        return "slow table"

    def __getitem__(self, index):
        time.sleep(0.02)
        with self.log.open("a") as file:
            file.write(f"{int(index)}\n")
        return super().__getitem__(index)


def records():
    rng = np.random.default_rng(0)
    return [{"image": tiny.png(rng)} for _ in range(ROWS)]


def main(directory, output):
    chunk_store.CHUNK_ROWS = CHUNK
    table = SlowTable(records(), output.with_suffix(".log"))
    backbone, params = tiny.backbone()
    found = features.image_features(
        backbone, params, table, mesh=make_mesh({"data": 1}), batch_size=4, cache_dir=directory
    )
    np.save(output, found)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
