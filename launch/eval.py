"""Evaluates a trained workdir, or a training-free method without one.

    python launch/eval.py --config=experiments/compodiff.py --workdir=DIR
    python launch/eval.py --config=experiments/slerp.py --benchmarks=circo,cirr,fashioniq,genecis

Writes results.json, report.html, a contact sheet per benchmark, and with --split=test the files for
the test servers. Benchmarks may name variants of their protocol: fashioniq:small_gallery.

Methods with settings of a query take them from the config (--config.composer.steps=5, .guidance,
.samples_per_query, .source_mixing, .noised_reference of CompoDiff), and conditions as flags:

    python launch/eval.py --config=experiments/compodiff.py --negative_text="a star" --mask=left.png

    python launch/eval.py --validate_submission=FILE [--source=DIR]

checks such a file, whoever wrote it, as the server would; no --config is needed. It is compared
with the authors' annotation files in DIR, else with prepared tables. Exit status: 0 = the server
will take it, 1 = right, but of a split with public labels: it is scored here, 2 = wrong, 3 = right
in its form, but there was nothing to compare it with.
"""

import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags  # noqa: E402

from cir_jax.errors import ConfigError  # noqa: E402
from cir_jax.storage import buckets  # noqa: E402
from launch import common, pixel_limit  # noqa: E402

BENCHMARKS = flags.DEFINE_list(
    "benchmarks", None, "Benchmarks, separated by commas; default config.evaluation.benchmarks"
)
SPLIT = flags.DEFINE_string(
    "split", None, "Split of all of them, such as val or test; default each one's own"
)
OUTPUT = flags.DEFINE_string("output", None, "Where results are written; default the workdir")
ALLOW_PARTIAL = flags.DEFINE_bool(
    "allow_partial", False, "Evaluate on incomplete data too; all results are marked as partial"
)
NEGATIVE_TEXT = flags.DEFINE_string(
    "negative_text", None, "What no result should show, of all queries (CompoDiff)"
)
MASK = flags.DEFINE_string(
    "mask", None, "Region of all reference images to edit: PNG of their size, black and white, "
    "white = edit (CompoDiff)"
)  # fmt: skip
SEED = flags.DEFINE_integer(
    "seed", None, "Of the noise of methods that draw some; default config.seed"
)
USE = flags.DEFINE_enum(
    "use", "both", ["both", "text", "image"], "What of the queries the method is given (CompoDiff)"
)
VALIDATE = flags.DEFINE_string(
    "validate_submission", None, "File for a test server to check, instead of an evaluation"
)
SOURCE = flags.DEFINE_string(
    "source", None, "Folder of CIRCO's or CIRR's annotation files, for --validate_submission"
)


def main() -> None:
    config = common.CONFIG.value
    if VALIDATE.value is not None:
        _validate(Path(VALIDATE.value).expanduser(), config.data_dir if config is not None else "")
    if SOURCE.value is not None:
        raise ConfigError("--source goes with --validate_submission only.")
    from cir_jax.sharding import joining

    pixel_limit.apply()
    common.join(joining)
    from cir_jax import experiment as experiments
    from cir_jax.composers.conditions import Conditions
    from cir_jax.evaluation import runner
    from cir_jax.evaluation.asked import Asked
    from cir_jax.training import workdir as workdirs

    if BENCHMARKS.value:
        config.evaluation.benchmarks = tuple(BENCHMARKS.value)
    if SPLIT.value is not None:
        config.evaluation.split = SPLIT.value
    if ALLOW_PARTIAL.value:
        config.evaluation.allow_partial = True
    conditions = Conditions(negative_text=NEGATIVE_TEXT.value, mask=MASK.value, seed=SEED.value)
    asked = Asked(conditions, USE.value)
    workdirs.check(common.workdir(), config)
    common.prepare(config, training=False)
    experiment = experiments.setup(config)
    asked.of(experiment.composer, config.seed)  # before minutes of work
    params = runner.trained_params(experiment, common.workdir())
    output = buckets.place(OUTPUT.value) if OUTPUT.value else common.workdir()
    common.evaluating(output)
    runner.run(experiment, params, output, common.command(), asked=asked if asked.said else None)


def _validate(file: Path, data_dir: str) -> NoReturn:
    from cir_jax.evaluation import validator
    from cir_jax.storage.places import default_data_dir

    if SOURCE.value is not None:
        from data import official

        where = Path(SOURCE.value).expanduser()
        known = official.facts(where)
    else:
        where = buckets.place(data_dir) if data_dir else default_data_dir()
        known = validator.prepared(where)
    verdict = validator.validate(file, known, str(where))
    print(verdict.text)
    sys.exit(validator.STATUS[verdict.kind])


if __name__ == "__main__":
    common.run(main, needs_config=lambda: VALIDATE.value is None)
