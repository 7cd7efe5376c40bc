"""One of several processes: `python -m tests.input.alike PORT PROCESSES NUMBER`.

Texts of process p in batch b are `LENGTHS[b][p]` tokens long; process 1 reads slowly.
"""

import json
import sys
import time

import jax
import numpy as np

from cir_jax.input.pipeline import trimmed_alike
from cir_jax.input.records import TrimText
from cir_jax.sharding import joining

LENGTHS = ((3, 2), (2, 9), (12, 5), (4, 4), (1, 8), (16, 1))
EOS = 7


def batches(process):
    for lengths in LENGTHS:
        if process:
            time.sleep(0.02)
        ids = np.ones((2, 20), np.int32)
        ids[:, lengths[process] - 1 :] = EOS
        yield {"token_ids": ids, "row": np.arange(2)}


def main():
    port, count, number = sys.argv[1:]
    joining.initialize(f"localhost:{port}", int(count), int(number))
    trim = TrimText(EOS, bucket=4)
    alone = [trim.map(batch)["token_ids"].shape for batch in batches(int(number))]
    together = []
    for batch in trimmed_alike(batches(int(number)), trim):
        together.append(batch["token_ids"].shape)
        assert (batch["token_ids"] == EOS).any(axis=1).all() and (batch["row"] == [0, 1]).all()
    again = [batch["token_ids"].shape for batch in trimmed_alike(batches(int(number)), trim)]
    kept = jax._src.distributed.global_state.client.key_value_dir_get("cir_jax/largest/")
    print(json.dumps([alone, together, again, len(kept)]))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
