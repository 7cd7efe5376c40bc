"""A LoRA of a causal language model, trained on what `instructions.write_examples` wrote.

CompoDiff (section 4.2) tunes OPT-6.7B by LoRA on InstructPix2Pix's 452,000 triplets and says no
more. So: one epoch, as InstructPix2Pix tuned GPT-3; rank 8, twice that as alpha, learning rate 2e-4
as in LoRA's paper for GPT-3; the matrices are peft's own choice for the model. The loss is that of
the completion, given the prompt. By transformers' `Trainer` and peft, which do the training.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cir_jax.errors import ConfigError, DataError
from cir_jax.input.generation import causal_model
from cir_jax.storage.atomic import new_directory
from data.sharing import alone, same_run
from data.synthtriplets.language_model import MAX_TOKENS, lora_package

SAVED = 200
"""Steps from one checkpoint to the next, which a kill loses at most."""


class Recipe(NamedTuple):
    """batch_size: examples of a step, of which `microbatch` are in memory at once."""

    rank: int = 8
    epochs: int = 1
    batch_size: int = 64
    microbatch: int = 8
    learning_rate: float = 2e-4
    seed: int = 0


def read_examples(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) of each line. Raises DataError that names the line."""
    found = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    pair = record["prompt"], record["completion"]
                except (ValueError, TypeError, KeyError) as error:
                    raise DataError(
                        f"{path}, line {number}: {error!r}; expected an object with `prompt` and "
                        "`completion`, as --step=examples writes them."
                    ) from error
                if not all(isinstance(text, str) and text for text in pair):
                    raise DataError(f"{path}, line {number}: an empty prompt or completion.")
                found.append(pair)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    if not found:
        raise DataError(f"{path}: no examples.")
    return found


def tune(
    examples: Sequence[tuple[str, str]], output: Path, model: str, recipe: Recipe
) -> dict[str, int]:
    """Writes the directory `output` as peft saves an adapter; returns how many examples were used,
    and how many were too long: completions of more than `MAX_TOKENS` are never written, and some
    have no room beside their prompt.

    Interrupted runs go on from OUTPUT.parts, with the same numbers. What is finished stays.
    Raises ConfigError for a recipe that cannot be and without peft, DataError where OUTPUT.parts is
    of another run or in use or no example fits, WeightsError where there is no such model.
    """
    for name, value in recipe._asdict().items():
        if name != "seed" and value <= 0:
            raise ConfigError(f"--{name}={value}: expected more than 0.")
    if recipe.batch_size % recipe.microbatch:
        raise ConfigError(
            f"--batch_size={recipe.batch_size} is not divisible by --microbatch="
            f"{recipe.microbatch}, the examples that are in memory at once."
        )
    peft = lora_package("--step=tune")
    tokenizer, base = causal_model(model, training=True)
    rows = [row for pair in examples if (row := _tokens(tokenizer, base.config, *pair))]
    counts = {"examples": len(rows), "too long": len(examples) - len(rows)}
    if not rows:
        raise DataError(f"no example fits into {model}: all {len(examples)} are too long.")
    parts = output.with_name(output.name + ".parts")
    content = {"examples": _digest(rows), "model": model, **recipe._asdict()}
    same_run(parts, content, "other examples or settings", "--output")
    with alone(parts / "lock"):
        if output.is_dir():
            return counts
        trainer = _trainer(peft, base, tokenizer, rows, parts / "checkpoints", recipe)
        trainer.train(resume_from_checkpoint=_last(parts / "checkpoints"))
        with new_directory(output) as folder:
            trainer.model.save_pretrained(folder)
        shutil.rmtree(parts / "checkpoints")
    return counts


def _tokens(tokenizer: Any, config: Any, prompt: str, completion: str) -> dict[str, Any] | None:
    """As the model reads them when it writes: the prompt by itself, then the completion."""
    first = tokenizer(prompt)["input_ids"]
    then = tokenizer(completion, add_special_tokens=False)["input_ids"]
    room = getattr(config, "max_position_embeddings", None) or 1 << 20
    if len(then) > MAX_TOKENS or len(first) + len(then) > room:
        return None
    return {"input_ids": first + then, "labels": [-100] * len(first) + then}


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _last(folder: Path) -> str | None:
    """The last checkpoint that is whole: its state is what `Trainer` writes last."""
    whole = [file.parent for file in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.partition("-")[2]))) if whole else None


def _trainer(
    peft: Any, base: Any, tokenizer: Any, rows: Sequence[Any], folder: Path, recipe: Recipe
) -> Any:
    import torch
    import transformers

    logging.getLogger("transformers.trainer").setLevel(logging.WARNING)
    transformers.set_seed(recipe.seed)
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=None if base.config.model_type in known else "all-linear",
        task_type="CAUSAL_LM",
    )
    return transformers.Trainer(
        peft.get_peft_model(base, config),
        transformers.TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.microbatch,
            gradient_accumulation_steps=recipe.batch_size // recipe.microbatch,
            learning_rate=recipe.learning_rate,
            warmup_steps=0.03,
            seed=recipe.seed,
            bf16=torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            save_steps=SAVED,
            save_total_limit=2,
            logging_steps=10,
            remove_unused_columns=False,
            report_to=[],
        ),
        train_dataset=list(rows),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )
