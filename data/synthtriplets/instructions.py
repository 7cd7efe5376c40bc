r"""Instructions and edited captions from a language model: InstructPix2Pix's text format.

    prompt      caption \n##\n
    completion  instruction \n%%\n edited caption \nEND

A model is fine-tuned on such lines (CompoDiff: OPT-6.7B with LoRA, on InstructPix2Pix's 452,000)
and completes prompts of other captions. What it writes is used if it has this form and changes
something.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cir_jax.errors import ConfigError
from cir_jax.storage.atomic import write_atomically
from data.sharing import Shard, alone, same_run
from data.synthtriplets.triplets import CaptionTriplets
from data.text_triplets.captions import Captions, blocks
from data.text_triplets.parts import Growing

AFTER_CAPTION, AFTER_INSTRUCTION, END = "\n##\n", "\n%%\n", "\nEND"
BLOCK = 64
"""Captions that are completed at once, stored and lost to a kill."""

PROBLEMS = ("too long", "unfinished", "no edit", "empty", "unchanged")


class Model(Protocol):
    """identity: what the completions depend on, beside prompts and streams."""

    identity: dict[str, Any]

    def complete(self, prompts: Sequence[str], streams: Sequence[str]) -> list[str | None]:
        """Of each prompt what follows it, `END` included if it came; None where there is no room.
        All that is random is from the stream of that name."""
        ...


def prompt(caption: str) -> str:
    return f"{caption}{AFTER_CAPTION}"


def completion(instruction: str, edited: str) -> str:
    return f"{instruction}{AFTER_INSTRUCTION}{edited}{END}"


def parse(caption: str, written: str | None) -> tuple[str, str] | str:
    """(instruction, edited caption) of a completion, or one of `PROBLEMS`.

    unfinished: no END within the limit. no edit: not one instruction and one caption. unchanged:
    the edited caption is the caption, up to case and a full stop (. ! ?) at its end.
    """
    if written is None:
        return "too long"
    text, end, _ = written.partition(END)
    if not end:
        return "unfinished"
    parts = [part.strip() for part in text.split(AFTER_INSTRUCTION)]
    if len(parts) != 2:
        return "no edit"
    instruction, edited = parts
    if not (instruction and edited):
        return "empty"
    if _plain(edited) == _plain(caption):
        return "unchanged"
    return instruction, edited


def _plain(caption: str) -> str:
    return caption.strip().rstrip(".!?").strip().lower()


def write_examples(triplets: CaptionTriplets, output: Path) -> int:
    """Data to fine-tune on: JSON lines of prompt and completion; returns how many."""
    _check_name(output)
    lines = [
        json.dumps(
            {
                "prompt": prompt(triplet.reference_caption),
                "completion": completion(triplet.text, triplet.target_caption),
            },
            ensure_ascii=False,
        )
        for _, block in triplets.blocks(1024, 0, 1)
        for triplet in block
    ]
    write_atomically(output, lambda file: file.write("".join(f"{x}\n" for x in lines).encode()))
    return len(lines)


def write(
    captions: Captions,
    output: Path,
    model: Model,
    *,
    per_caption: int = 1,
    seed: int = 0,
    shard: Shard | None = None,
) -> dict[str, int]:
    """Caption triplets of the captions as JSON lines; returns how many, and how many completions
    had which problem.

    per_caption: completions of each. Interrupted runs go on from OUTPUT.parts; shard i of n has
    every n-th block of captions, and a file of its own.
    Raises DataError when OUTPUT.parts is of other captions or settings or in use.
    """
    shard = shard or Shard()
    _check_name(output)
    if per_caption < 1:
        raise ConfigError(f"--samples={per_caption}: expected 1 or more.")
    folder = output.with_name(output.name + ".parts")
    settings = {"captions": captions.identity, "per_caption": per_caption, "seed": seed}
    settings |= {"shards": shard.count, "block": BLOCK, **model.identity}
    same_run(folder, settings, "other captions or settings", "--output")
    with alone(folder / f"lock-{shard.index:05d}"):
        part = Growing(folder / f"triplets-{shard.index:05d}.jsonl")
        if not part.finished:
            done = part.blocks[-1]["done"] if part.blocks else 0
            first = len(part.blocks)
            for behind, block in blocks(captions, shard, BLOCK, first, done, "instructions"):
                lines, counts = _written(block, model, per_caption, seed)
                part.add(lines, {"counts": counts, "done": behind})
        final = shard.file(output)
        part.finish(final)
    total: Counter[str] = Counter(triplets=0)
    for block in part.blocks:
        total.update(block["counts"])
    print(f"{final}: {describe(total)}", file=sys.stderr, flush=True)
    return dict(total)


def _written(
    block: Sequence[tuple[str, str]], model: Model, per_caption: int, seed: int
) -> tuple[list[str], dict[str, int]]:
    given = [(f"{seed}/{name}/{i}", caption) for name, caption in block if caption.strip()
             for i in range(per_caption)]  # fmt: skip
    streams = [stream for stream, _ in given]
    texts = model.complete([prompt(caption) for _, caption in given], streams)
    counts: Counter[str] = Counter(triplets=0)
    lines = {}
    for (_, caption), text in zip(given, texts, strict=True):
        parsed = parse(caption, text)
        if isinstance(parsed, str):
            counts[parsed] += 1
            continue
        instruction, edited = parsed
        record = {"reference_caption": caption, "target_caption": edited}
        line = json.dumps({**record, "conditioning_caption": instruction}, ensure_ascii=False)
        counts["repeated" if line in lines else "triplets"] += 1
        lines[line] = None
    return list(lines), dict(counts)


def describe(counts: Mapping[str, int]) -> str:
    """One line of what came of the completions."""
    bad = [f"{counts[name]:,} {name}" for name in (*PROBLEMS, "repeated") if counts.get(name)]
    return f"{counts['triplets']:,} triplets; dropped: {', '.join(bad) or 'none'}"


def _check_name(output: Path) -> None:
    if output.suffix != ".jsonl":
        raise ConfigError(f"--output={output}: expected a name that ends in .jsonl.")
