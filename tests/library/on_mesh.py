"""One of several processes that search a store together.

python -m tests.library.on_mesh PORT PROCESSES NUMBER STORE

Each holds the vectors of its own devices. Compares what it finds with the truth, and says that and
what it holds; again when the store has changed.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from cir_jax.library.indexes import ladder
from cir_jax.library.indexes.sharded import OnMesh
from cir_jax.sharding import joining
from cir_jax.sharding.mesh import make_mesh
from cir_jax.sharding.together import meet
from tests.library.test_indexes import Photos, agrees, asked


def main() -> None:
    port, count, number, store = sys.argv[1:]
    joining.initialize(f"localhost:{port}", int(count), int(number))
    photos = Photos(Path(store))
    index = OnMesh(make_mesh({"data": -1}))
    for change in range(3):
        ladder.follow(index, photos.vectors)
        agrees(index, photos.world())
        agrees(index, photos.world(), only=np.arange(0, 999, 3), without=[6, 9])
        held = sorted(int(i) for ids, _ in index for i in ids)
        found = index.search(asked(), 10).ids.tolist()
        print(json.dumps({"held": held, "found": found, "count": len(index)}), flush=True)
        meet("all have searched")
        if number == "0":
            photos.add([f"{change} {i}" for i in range(40)], 7 + change)
            photos.remove({f"{10 * change + i}" for i in range(9)})
        meet("the store has changed")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    main()
