"""Evaluates a trained workdir, or a training-free method without one.

python launch/eval.py --config=experiments/compodiff.py --workdir=DIR
python launch/eval.py --config=experiments/slerp.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import common  # noqa: E402


def main() -> None:
    from cir_jax.training import distributed

    common.join(distributed)
    from cir_jax.evaluation import runner
    from cir_jax.training import experiment as experiments

    config = common.CONFIG.value
    experiments.check_workdir(common.workdir(), config)
    common.prepare(config, training=False)
    experiment = experiments.setup(config)
    params = runner.trained_params(experiment, common.workdir())
    runner.run(experiment, params, common.workdir(), common.command())


if __name__ == "__main__":
    common.run(main)
