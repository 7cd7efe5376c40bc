"""Trains an experiment, then evaluates it.

    python launch/main.py --config=experiments/compodiff.py [--workdir=DIR]

The same command continues an interrupted run. The same program runs on a laptop, a GPU and every
host of a TPU pod (there: the same command on every host).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags  # noqa: E402

from launch import common, ending, pixel_limit  # noqa: E402

DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print shapes, shardings and bytes per device of every stage; compute nothing"
)


def main() -> None:
    from cir_jax.sharding import joining

    pixel_limit.apply()
    common.join(joining)
    from cir_jax import experiment as experiments
    from cir_jax.evaluation import runner, selection, sharing
    from cir_jax.storage.places import default_cache_dir
    from cir_jax.training import stages
    from cir_jax.training import workdir as workdirs

    config, workdir = common.CONFIG.value, common.workdir()
    workdirs.check(workdir, config)
    common.prepare(config, training=True)
    experiment = experiments.setup(config, shapes_only=DRY_RUN.value)
    # mistakes show before the workdir belongs to them
    plan, given = stages.dry_run(experiment), stages.start(experiment, workdir)
    if DRY_RUN.value:
        print(plan)
        return
    scorer = selection.scorer(experiment)
    workdirs.claim(workdir, config)
    with workdirs.only_run(workdir):
        kept = f"checkpoints and words in {workdir} and features in {default_cache_dir()} are kept"
        ending.phase("running the stages", kept)
        workdirs.say_changes(workdir, config)
        params = stages.train(experiment, workdir, scorer, given)
        ending.phase("exporting", f"what was trained is in {workdir}")
        stages.export(experiment, params)
        common.evaluating(workdir)
        runner.run(experiment, params, workdir, common.command())
        sharing.export(experiment, workdir)


if __name__ == "__main__":
    common.run(main)
