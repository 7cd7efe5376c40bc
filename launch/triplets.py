"""Text triplets from any captions by templates, as RTD and CompoDiff make them.

    python launch/triplets.py --captions=cc3m.tsv --output=triplets/rtd.jsonl
    python launch/prepare.py --dataset=text_triplets --source=triplets --name=rtd

The defaults are RTD's: nouns by spaCy in more than 100 captions, alternatives with a similarity of
0.5 to 0.7 in all-MiniLM-L6-v2 (extra `triplets`). --filter removes triplets with a caption that
does not survive a LinCIR's inversion. data/text_triplets/README.md tells more.

The same command continues an interrupted run: what is done is in OUTPUT.parts. With --shard=I/N,
started N times, N processes share the work on a disk that all of them see. Exit status: 0 = done,
or --nowait and other shards are to go on first; 2 = error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags  # noqa: E402

from cir_jax.storage import buckets  # noqa: E402
from launch import ending  # noqa: E402

_EMBEDDERS = {
    "rtd": "sbert:sentence-transformers/all-MiniLM-L6-v2",
    "compodiff": "openai/clip-vit-large-patch14",
}

_CAPTIONS = flags.DEFINE_string(
    "captions",
    None,
    "File or folder of texts, DATASET/TABLE[:SPLIT] of the prepared data, or "
    "hf:ORG/NAME[@REVISION][:CONFIG], a dataset of the Hugging Face hub (extra `hub`)",
)
_SPLIT = flags.DEFINE_string("split", "", "Split of hf:ORG/NAME; default train, or its only one")
_OUTPUT = flags.DEFINE_string("output", None, "File to write, .jsonl")
_TEMPLATES = flags.DEFINE_enum("templates", "rtd", list(_EMBEDDERS), "Whose templates")
_KEYWORDS = flags.DEFINE_string(
    "keywords", "spacy", "spacy, or a JSON file of parts of speech: {'NOUN': ['star', ...], ...}"
)
_PARTS = flags.DEFINE_list("parts", ["NOUN"], "Parts of speech that are keywords")
_MIN_COUNT = flags.DEFINE_integer("min_count", 101, "Captions that a keyword must be in, at least")
_SIMILARITY = flags.DEFINE_list(
    "similarity", ["0.5", "0.7"], "Least and greatest similarity of keywords that are exchanged"
)
_EMBEDDER = flags.DEFINE_string(
    "embedder",
    None,
    "What gives the similarity: a backbone, by its text tower, or sbert:NAME_OR_DIR of the package "
    "sentence-transformers; default that of the paper",
)
_DELETIONS = flags.DEFINE_enum(
    "deletions", "any", ["any", "modifiers"], "Which keywords may be deleted: modifiers = "
    "those right before another keyword, so that the rest stays a sentence"
)  # fmt: skip
_PER_CAPTION = flags.DEFINE_integer("per_caption", 1, "Triplets of a caption, at most")
_FILTER = flags.DEFINE_string(
    "filter", None, "Workdir of a trained LinCIR, or its preset: lincir:vit_l14"
)
_FILTER_WEIGHTS = flags.DEFINE_string(
    "filter_weights", None, "With a preset: its authors' weights, lincir_large.pt"
)
_THRESHOLD = flags.DEFINE_float("threshold", 0.75, "Similarity that both captions must keep")
_SEED = flags.DEFINE_integer("seed", 0, "Of all that is drawn")
_SHARD = flags.DEFINE_string("shard", "0/1", "I/N: this process is number I, from 0, of N")
_WAIT = flags.DEFINE_bool(
    "wait", True, "Wait for other shards; --nowait ends where they have to go on first"
)
_COLUMNS = flags.DEFINE_list("columns", None, "text=COLUMN: what the column of a file is called")
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
        _generate()
    except CirError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _generate() -> None:
    import functools
    import zlib

    from cir_jax.input import keywords
    from cir_jax.storage.places import default_data_dir
    from data import corpus
    from data.text_triplets import captions, editing, embedders, generation, templates
    from data.text_triplets.inversion_filter import InversionFilter

    output = buckets.local(_OUTPUT.value, "--output")
    ending.phase("generating", f"what is done is kept in {output}.parts")
    recipe = generation.Recipe(
        editing.Rules(
            {"": templates.PAPERS[_TEMPLATES.value]}, _DELETIONS.value, _PER_CAPTION.value
        ),
        _PARTS.value,
        _MIN_COUNT.value,
        generation.read_band(_SIMILARITY.value),
        _THRESHOLD.value,
        _SEED.value,
    )
    shard = generation.Shard.read(_SHARD.value)
    data_dir = buckets.place(_DATA_DIR.value) if _DATA_DIR.value else default_data_dir()
    columns = corpus.parse_columns(_COLUMNS.value or ())
    tag = keywords.tagger(_KEYWORDS.value)
    embedder = _EMBEDDER.value or _EMBEDDERS[_TEMPLATES.value]
    generation.generate(
        captions.read(_CAPTIONS.value, data_dir, columns, _SPLIT.value),
        output,
        recipe,
        tag,
        functools.partial(embedders.read, embedder),
        # of a dictionary, what it says
        names={
            "keywords": f"{_KEYWORDS.value} {zlib.crc32(repr(tag).encode())}",
            "embedder": embedder,
        },
        keep=InversionFilter(_FILTER.value, _FILTER_WEIGHTS.value) if _FILTER.value else None,
        shard=shard,
        wait=_WAIT.value,
    )


if __name__ == "__main__":
    flags.mark_flags_as_required(["captions", "output"])
    ending.run(lambda: app.run(main))
