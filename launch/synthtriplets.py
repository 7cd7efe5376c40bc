"""Image triplets from captions, as CompoDiff's SynthTriplets18M was made: one step at a time.

    python launch/triplets.py --templates=compodiff --captions=FILE --output=captions/keywords.jsonl
    python launch/synthtriplets.py --step=examples --source=IP2P.jsonl --output=tune.jsonl
    python launch/synthtriplets.py --step=tune --source=tune.jsonl --model=LM --output=lora
    python launch/synthtriplets.py --step=write --source=FILE --model=LM --adapter=lora \
        --output=captions/llm.jsonl
    python launch/synthtriplets.py --step=draw --source=captions --model=DIR --output=pairs
    python launch/synthtriplets.py --step=filter --source=pairs --output=triplets
    python launch/prepare.py --dataset=image_triplets --source=triplets --name=synth

examples: InstructPix2Pix's text triplets as prompts and completions, to fine-tune a language model
on. tune: a LoRA of one (extra `synth`). write: caption triplets by such a model (extra `torch`).
draw: two images of each caption triplet, by Stable Diffusion with shared self-attention (extra
`synth`), or with --model=shapes by the embedded world's renderer. filter: the five CLIP filters,
with statistics and a picture. data/synthtriplets/README.md tells more.

The same command continues an interrupted run. With --shard=I/N, started N times, N processes share
the work on a disk that all of them see. Exit status: 0 = done, 2 = error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags  # noqa: E402

from cir_jax.storage import buckets  # noqa: E402
from launch import ending, pixel_limit  # noqa: E402

_STEP = flags.DEFINE_enum(
    "step", None, ["examples", "tune", "write", "draw", "filter"], "What to do"
)
_SOURCE = flags.DEFINE_string(
    "source", None, "examples, draw: file or folder of caption triplets; tune: what examples "
    "wrote; write: of captions, or DATASET/TABLE[:SPLIT] of the prepared data; filter: the folder "
    "that draw wrote"
)  # fmt: skip
_OUTPUT = flags.DEFINE_string("output", None, "examples, write: .jsonl file; else folder to write")
_MODEL = flags.DEFINE_string(
    "model", None, "Directory or hub id; tune, write: of a causal language model; draw: of a "
    "Stable Diffusion for diffusers, or shapes"
)  # fmt: skip
_ADAPTER = flags.DEFINE_string("adapter", "", "write: directory or hub id of a LoRA, by peft")
_RANK = flags.DEFINE_integer("rank", 8, "tune: of the LoRA")
_EPOCHS = flags.DEFINE_integer("epochs", 1, "tune: passes over the examples")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "tune: examples of a step")
_MICROBATCH = flags.DEFINE_integer("microbatch", 8, "tune: of them in memory at once")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-4, "tune: at its highest")
_SAMPLES = flags.DEFINE_integer(
    "samples", 1, "write: completions of each caption; draw: pairs of each caption triplet"
)
_BACKBONE = flags.DEFINE_string(
    "backbone", "openai/clip-vit-large-patch14", "filter: whose cosines decide"
)
_THRESHOLDS = flags.DEFINE_list(
    "thresholds", [], "filter: FILTER=COSINE,... for those that are not to be the paper's"
)
_BEST = flags.DEFINE_integer("best", 4, "filter: pairs kept of each caption triplet, at most")
_SEED = flags.DEFINE_integer("seed", 0, "Of all that is drawn")
_SHARD = flags.DEFINE_string("shard", "0/1", "I/N: this process is number I, from 0, of N")
_COLUMNS = flags.DEFINE_list(
    "columns", None, "FIELD=COLUMN,...: what the columns of captions and their triplets are called"
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where datasets lie; default $CIR_JAX_DATA, else ~/.cache/cir_jax/data."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    from absl import logging

    from cir_jax.errors import CirError

    logging.set_verbosity(logging.WARNING)
    try:
        pixel_limit.apply()
        steps = {"examples": _examples, "tune": _tune, "write": _write, "draw": _draw}
        steps |= {"filter": _filter}
        steps[_STEP.value]()
    except CirError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _examples() -> None:
    from data import corpus
    from data.synthtriplets import instructions
    from data.synthtriplets.triplets import CaptionTriplets

    columns = corpus.parse_columns(_COLUMNS.value or ())
    triplets = CaptionTriplets(buckets.local(_SOURCE.value, "--source"), columns)
    count = instructions.write_examples(triplets, buckets.local(_OUTPUT.value, "--output"))
    print(f"{_OUTPUT.value}: {count:,} prompts and completions", file=sys.stderr)


def _tune() -> None:
    from cir_jax.errors import ConfigError
    from data.synthtriplets import tuning

    if not _MODEL.value:
        raise ConfigError(
            "--step=tune needs --model: a directory or hub id of a causal language model, such as "
            "facebook/opt-6.7b."
        )
    recipe = tuning.Recipe(
        _RANK.value,
        _EPOCHS.value,
        _BATCH_SIZE.value,
        _MICROBATCH.value,
        _LEARNING_RATE.value,
        _SEED.value,
    )
    ending.phase("tuning", f"checkpoints are kept in {_OUTPUT.value}.parts")
    examples = tuning.read_examples(buckets.local(_SOURCE.value, "--source"))
    output = buckets.local(_OUTPUT.value, "--output")
    counts = tuning.tune(examples, output, _MODEL.value, recipe)
    said = ", ".join(f"{n:,} {what}" for what, n in counts.items())
    print(f"{_OUTPUT.value}: a LoRA of {_MODEL.value} ({said})", file=sys.stderr)


def _write() -> None:
    from cir_jax.errors import ConfigError
    from cir_jax.storage.places import default_data_dir
    from data import corpus
    from data.sharing import Shard
    from data.synthtriplets import instructions
    from data.synthtriplets.language_model import LanguageModel
    from data.text_triplets import captions

    if not _MODEL.value:
        raise ConfigError(
            "--step=write needs --model: a directory or hub id of a causal language model that was "
            "fine-tuned on what --step=examples writes."
        )
    data_dir = buckets.place(_DATA_DIR.value) if _DATA_DIR.value else default_data_dir()
    columns = corpus.parse_columns(_COLUMNS.value or ())
    ending.phase("writing", f"what is done is kept in {_OUTPUT.value}.parts")
    instructions.write(
        captions.read(_SOURCE.value, data_dir, columns),
        buckets.local(_OUTPUT.value, "--output"),
        LanguageModel(_MODEL.value, _ADAPTER.value),
        per_caption=_SAMPLES.value,
        seed=_SEED.value,
        shard=Shard.read(_SHARD.value),
    )


def _draw() -> None:
    from data import corpus
    from data.sharing import Shard
    from data.synthtriplets import drawing
    from data.synthtriplets.triplets import CaptionTriplets

    shard, output = Shard.read(_SHARD.value), buckets.local(_OUTPUT.value, "--output")
    columns = corpus.parse_columns(_COLUMNS.value or ())
    triplets = CaptionTriplets(buckets.local(_SOURCE.value, "--source"), columns)
    painter = drawing.painter(_MODEL.value)
    ending.phase("drawing", f"finished files are kept in {output}")
    counts = drawing.draw(
        triplets, output, painter, samples=_SAMPLES.value, seed=_SEED.value, shard=shard
    )
    refused = "".join(f", {n:,} {reason}" for reason, n in counts.items() if reason != "pairs")
    print(f"{output}: {counts['pairs']:,} pairs{refused}", file=sys.stderr)


def _filter() -> None:
    from data.sharing import Shard
    from data.synthtriplets import filtering, filters

    shard, output = Shard.read(_SHARD.value), buckets.local(_OUTPUT.value, "--output")
    thresholds = filters.read_thresholds(_THRESHOLDS.value)
    clip = filtering.Clip(_BACKBONE.value)
    ending.phase("filtering", f"finished files are kept in {output}")
    statistics = filtering.filter_pairs(
        buckets.local(_SOURCE.value, "--source"),
        output,
        clip,
        thresholds,
        best=_BEST.value,
        shard=shard,
    )
    if statistics is None:
        print(f"{output}: this shard's files are there; others are not yet", file=sys.stderr)
    else:
        print(f"{output}: {filters.describe(statistics)}", file=sys.stderr)


if __name__ == "__main__":
    flags.mark_flags_as_required(["step", "source", "output"])
    ending.run(lambda: app.run(main))
