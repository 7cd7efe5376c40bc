"""Builds a dataset: `python launch/prepare.py --dataset=shapes [--tables=gallery,circo]`.

With --check, reads every record of the built tables instead and decodes every image.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags  # noqa: E402

_DATASET = flags.DEFINE_string("dataset", "shapes", "Name of the dataset.")
_TABLES = flags.DEFINE_list("tables", None, "Tables to build, separated by commas; default all.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where datasets lie; default $CIR_JAX_DATA, else ~/.cache/cir_jax/data."
)
_CHECK = flags.DEFINE_bool("check", False, "Check the tables instead of building them.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    from cir_jax.errors import CirError
    from data import build

    try:
        if _CHECK.value:
            counts = build.check(_DATASET.value, _TABLES.value, _DATA_DIR.value)
            for table, splits in counts.items():
                print(f"{table}: {', '.join(f'{s} {n}' for s, n in splits.items())}: good")
        else:
            folders = build.prepare(_DATASET.value, _TABLES.value, _DATA_DIR.value)
            for table, folder in folders.items():
                print(f"{table}: {folder}")
    except CirError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
