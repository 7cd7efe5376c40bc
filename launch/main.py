"""Trains an experiment, then evaluates it.

    python launch/main.py --config=experiments/compodiff.py [--workdir=DIR]

The same command continues an interrupted run. The same program runs on a laptop, a GPU and every
host of a TPU pod (there: the same command on every host).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags  # noqa: E402

from launch import common  # noqa: E402

DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print shapes, shardings and bytes per device of every stage; compute nothing"
)


def main() -> None:
    from cir_jax.training import distributed

    distributed.initialize(
        common.COORDINATOR.value, common.NUM_PROCESSES.value, common.PROCESS_ID.value
    )
    from cir_jax.training import experiment as experiments
    from data import build

    config = common.CONFIG.value
    for dataset, tables in experiments.required_tables(config).items():
        build.prepare(dataset, tables, experiments.data_dir(config))
    experiment = experiments.setup(config)
    if DRY_RUN.value:
        print(experiments.dry_run(experiment))
        return
    params = experiments.train(experiment, common.workdir())
    experiments.export(experiment, params)


if __name__ == "__main__":
    common.run(main)
