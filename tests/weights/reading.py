"""One of several processes: `python -m tests.weights.reading PORT COUNT NUMBER WHAT=DIRECTORY ...`.

Loads the CLIPs one after the other and says as JSON what that took: bytes that the system read for
this process, bytes by which its memory grew at the most, what its devices hold of a parameter.
WHAT is a key of `placement.FROZEN`, or "host".
"""

import functools
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.sharding import joining, placement
from cir_jax.sharding.mesh import make_mesh
from cir_jax.weights import convert
from cir_jax.weights.lazy import spans
from launch import ending


def memory(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) << 10


def bytes_read():
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if "rchar" in line).split()[1])


def shards(leaf):
    """[[start and stop of each axis, hash]] of what this process holds."""
    if isinstance(leaf, np.ndarray):
        return [[[(0, size) for size in leaf.shape], digest(leaf)]]
    return [
        [[(x.start, x.stop) for x in spans(shard.index, leaf.shape)], digest(shard.data)]
        for shard in leaf.addressable_shards
    ]


def digest(array):
    return hashlib.sha256(np.asarray(array).tobytes()).hexdigest()


def load(what, directory):
    rules = placement.FROZEN.get(what)
    mesh = make_mesh({"fsdp": -1})
    where = functools.partial(placement.parameter_shardings, mesh, rules=rules) if rules else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, read = memory("VmRSS"), bytes_read()
    backbone, params = weights.load(directory, shardings=where)
    read, peak = bytes_read() - read, memory("VmHWM") - before
    flat = convert.flatten(params)
    said = {
        "id": backbone.weights_id,
        "read": read,
        "peak": peak,
        "shards": {"/".join(path): shards(leaf) for path, leaf in flat.items()},
    }
    print(json.dumps(said), flush=True)


def main():
    port, count, number, *loads = sys.argv[1:]
    if int(count) > 1:
        joining.initialize(f"localhost:{port}", int(count), int(number))
    for each in loads:
        try:
            load(*each.split("="))
        except WeightsError as error:  # as launch/common.py
            raise ending.Failed(str(error)) from error


if __name__ == "__main__":
    ending.run(main)
