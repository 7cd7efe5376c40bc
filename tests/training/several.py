"""One of several processes: `python tests/training/several.py PORT PROCESSES NUMBER DIRECTORY`.

Trains slowly, says each step, and then waits to be stopped. With `NUMBER=WHAT` after it, that
process fails at step 5, as a user's data or our own mistakes can do.
"""

import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402

from cir_jax.errors import CirError, DataError  # noqa: E402
from cir_jax.sharding import joining  # noqa: E402
from cir_jax.training import loop  # noqa: E402
from launch import ending  # noqa: E402
from tests.training.line import trainer  # noqa: E402

STEPS = 300


def say(*words):
    print(*words, flush=True)


def main():
    port, count, number, directory, *fails = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
    joining.initialize(f"localhost:{port}", int(count), int(number))

    def slowly(step):
        time.sleep(0.02)
        say("step", step)
        if step == 5 and f"{number}=data" in fails:
            raise DataError("shard 3: record 7 is no image.")
        if step == 5 and f"{number}=bug" in fails:
            raise KeyError("caption")

    try:
        trainer(steps=STEPS, before=slowly, checkpoint_every=50).run(Path(directory))
    except loop.Preempted as stop:
        say(stop)
        sys.exit(128 + stop.signal)
    except CirError as error:  # as launch/common.py
        raise ending.Failed(str(error)) from error
    ending.phase("waiting", "all is kept")
    say("trained")
    time.sleep(60)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    ending.run(main)
