"""Words that an inversion stage stored, in the format of SEARLE's released code.

python launch/export_words.py --stage=runs/searle_oti/shapes/oti --output=DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags  # noqa: E402

from launch import ending  # noqa: E402

_STAGE = flags.DEFINE_string("stage", None, "Directory of the stage in a workdir")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where datasets lie, as for launch/prepare.py")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    from cir_jax.errors import CirError
    from cir_jax.storage import buckets
    from cir_jax.storage.places import default_data_dir
    from cir_jax.training import inversion

    try:
        data_dir = buckets.place(_DATA_DIR.value) if _DATA_DIR.value else default_data_dir()
        output = buckets.local(_OUTPUT.value, "--output")
        inversion.export(buckets.place(_STAGE.value), output, data_dir)
    except CirError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.mark_flags_as_required(["stage", "output"])
    ending.run(lambda: app.run(main))
