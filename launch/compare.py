"""Compares runs of launch/eval.py query by query, on benchmarks that they share.

    python launch/compare.py RUN RUN [RUN ...] [--output=DIR] [--data_dir=DIR]

RUN is a folder with `results.json` and `queries.jsonl`. Each run is compared with the first one:
per metric the difference with its paired bootstrap interval, and on how many queries it wins and
loses; `compare.json` has the same for programs. A contact sheet per pair shows the queries on which
they differ most (--nosheets: without; it needs the prepared images).

(`benchmarks/compare.py` is another thing: it trains methods on the embedded world over seeds.)
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags  # noqa: E402
from absl import logging as absl_logging  # noqa: E402

from cir_jax.storage.buckets import place  # noqa: E402
from launch import ending, pixel_limit  # noqa: E402

_OUTPUT = flags.DEFINE_string("output", "compare", "Folder for compare.json and the sheets.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where datasets lie; default $CIR_JAX_DATA, else ~/.cache/cir_jax/data."
)
_SHEETS = flags.DEFINE_bool("sheets", True, "Draw where they differ most.")
_ROWS = flags.DEFINE_integer("rows", 8, "Queries on a sheet.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 10_000, "Resamples of the bootstrap.", lower_bound=100)
_SEED = flags.DEFINE_integer("seed", 0, "Of the bootstrap.")


def main(argv: list[str]) -> None:
    from cir_jax.errors import CirError

    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        pixel_limit.apply()
        _compare([place(name) for name in argv[1:]])
    except CirError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _compare(folders: list[Path]) -> None:
    import dataclasses

    from cir_jax.evaluation import comparison
    from cir_jax.evaluation.submissions import file_name
    from cir_jax.storage.atomic import write_atomically

    output = place(_OUTPUT.value)
    shared = comparison.load(folders)
    loaded = {key: _images(*key) for key in shared} if _SHEETS.value else {}
    found = []
    for key, (first, *others) in shared.items():
        for second in others:
            rows = comparison.differences(first, second, samples=_SAMPLES.value, seed=_SEED.value)
            print(comparison.format_table(key, first, second, rows), end="\n\n", flush=True)
            found.append(
                {
                    "benchmark": key[0],
                    "split": key[1],
                    "first": first.label,
                    "second": second.label,
                    "protocol": first.facts["protocol"],
                    "weights_id": [run.facts["weights_id"] for run in (first, second)],
                    "samples": _SAMPLES.value,
                    "level": comparison.LEVEL,
                    "seed": _SEED.value,
                    "differences": [dataclasses.asdict(row) for row in rows],
                }
            )
            if key in loaded:
                name = file_name(f"{key[0]}_{key[1]}_{second.label}")
                path = output / f"{name}.png"
                if comparison.draw(loaded[key], first, second, path, _ROWS.value):
                    print(f"pictures: {path}\n")
                else:
                    print("no pictures: no query tells them apart\n")
    text = json.dumps(found, indent=2) + "\n"
    write_atomically(output / "compare.json", lambda file: file.write(text.encode()))
    print(f"written: {output / 'compare.json'}")


def _images(name: str, split: str):
    """The prepared benchmark of a result."""
    from cir_jax.errors import DataError
    from cir_jax.evaluation import benchmarks

    data_dir = place(_DATA_DIR.value) if _DATA_DIR.value else None
    try:
        partial = name.endswith(" (partial)")
        return benchmarks.load(
            name.removesuffix(" (partial)"), split, data_dir, allow_partial=partial
        )
    except DataError as error:
        raise DataError(f"{error} Or leave the pictures out with --nosheets.") from error


if __name__ == "__main__":
    ending.run(lambda: app.run(main))
