"""What the tokens of a trained ISA attend to: drawn, and as arrays.

    python launch/attention.py --workdir=runs/isa/shapes --images=photos/ --output=DIR

writes attention.png and attention.npz (names; groups and cross, float32[images, tokens, height,
width]).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags, logging  # noqa: E402

from cir_jax.storage import buckets  # noqa: E402
from launch import ending  # noqa: E402

_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory of a trained ISA")
_IMAGES = flags.DEFINE_list("images", None, "A folder, or files, separated by commas")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write")
_LIMIT = flags.DEFINE_integer("limit", 8, "Images that are drawn, the first of a folder", 1)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # of Orbax, as it restores
    import cir_jax
    from cir_jax.errors import CirError
    from cir_jax.evaluation import attention_maps
    from cir_jax.retrieval.search import find

    given = [Path(name).expanduser() for name in _IMAGES.value]
    try:
        folder = len(given) == 1 and given[0].is_dir()
        paths = find(given[0] if folder else given)
        search = cir_jax.load(_WORKDIR.value)
        output = buckets.local(_OUTPUT.value, "--output")
        for path in attention_maps.write(search, paths[: _LIMIT.value], output):
            print(path)
    except CirError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "images", "output"])
    ending.run(lambda: app.run(main))
