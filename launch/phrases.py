"""Phrases about concepts from a causal language model, for SEARLE's regulariser.

    python launch/phrases.py --concepts=oidv7-class-descriptions.csv --output=phrases.json

The released settings are the defaults: GPT-Neo 2.7B, 256 continuations of "a photo of {concept}
that", temperature 0.5. Needs PyTorch (extra `torch`). The same command continues an interrupted
run: finished concepts are in OUTPUT.part. One concept takes seconds on a GPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags  # noqa: E402

from cir_jax.storage import buckets  # noqa: E402
from launch import ending  # noqa: E402

_CONCEPTS = flags.DEFINE_string("concepts", None, "CSV with DisplayName, or one name per line")
_MODEL = flags.DEFINE_string("model", "EleutherAI/gpt-neo-2.7B", "Directory or hub id of a model")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write")
_COUNT = flags.DEFINE_integer("count", 256, "Phrases per concept")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Phrases generated at once")
_SEED = flags.DEFINE_integer("seed", 42, "Of the sampling; each concept has its own from it")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    from cir_jax.errors import CirError
    from cir_jax.input import generation, phrases

    ending.phase("generating", f"finished concepts are kept in {_OUTPUT.value}.part")
    try:
        generation.generate(
            list(dict.fromkeys(phrases.read_names(_CONCEPTS.value))),
            buckets.local(_OUTPUT.value, "--output"),
            model=_MODEL.value,
            count=_COUNT.value,
            batch_size=_BATCH_SIZE.value,
            seed=_SEED.value,
        )
    except CirError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.mark_flags_as_required(["concepts", "output"])
    ending.run(lambda: app.run(main))
