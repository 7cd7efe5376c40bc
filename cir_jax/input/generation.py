"""Phrases from a causal language model (PyTorch, transformers): METHODS 2.2.

    "a photo of {concept} that" -> continuations, sampled at temperature 0.5, at most 35 tokens with
    the prompt, no pair of tokens twice

Finished concepts are appended to `OUTPUT.part`, one JSON line each; a last line that a kill cut off
is made again. Each concept has a seed of its own, so an interrupted run ends in the same phrases.
"""

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cir_jax.errors import DataError, WeightsError
from cir_jax.input.phrases import TEMPLATES, PhraseBook, write
from cir_jax.progress import Progress

MAX_TOKENS = 35
TEMPERATURE = 0.5


def generate(
    names: Sequence[str],
    output: Path,
    *,
    model: str,
    count: int = 256,
    batch_size: int = 256,
    seed: int = 42,
) -> PhraseBook:
    """Writes (and returns) the phrase book of `names`, with progress.

    Raises DataError when OUTPUT.part is of another run, WeightsError when the model cannot be had.
    """
    if min(count, batch_size) < 1:
        raise DataError(f"count={count}, batch_size={batch_size}: both must be 1 or more.")
    part = output.with_name(output.name + ".part")
    head = {"model": model, "count": count, "seed": seed}
    done = _resume(part, head)
    part.parent.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if name not in done]
    if missing:
        sample = _Sampler(model)
        with part.open("a", encoding="utf-8") as file:
            if not part.stat().st_size:
                file.write(json.dumps(head) + "\n")
            total = len(names)
            for name in Progress(
                missing, initial=total - len(missing), total=total, unit="concept"
            ):
                done[name] = sample(name, count, batch_size, seed)
                file.write(json.dumps([name, done[name]], ensure_ascii=False) + "\n")
                file.flush()
    book = PhraseBook(TEMPLATES, {name: tuple(done[name]) for name in names})
    write(output, book)
    part.unlink(missing_ok=True)
    print(f"{output}: {len(names)} concepts, {len(book.discarded)} of them will be discarded")
    return book


def tidy(text: str) -> str:
    """Line breaks become full stops, and runs of full stops one, as in the release."""
    return re.sub(r"\.+", ".", re.sub(r"\n+", ". ", text))


def _resume(part: Path, head: dict[str, Any]) -> dict[str, list[str]]:
    if not part.is_file():
        return {}
    lines = part.read_bytes().split(b"\n")
    whole = lines[:-1]  # what follows the last line break was cut off
    try:
        found = json.loads(whole[0]) if whole else head
        done = {name: phrases for name, phrases in map(json.loads, whole[1:])}
    except (ValueError, TypeError) as error:
        raise DataError(f"{part}: damaged ({error}). Delete it to begin again.") from error
    if found != head:
        raise DataError(f"{part}: of another run ({found}, now {head}). Delete it to begin again.")
    part.write_bytes(b"".join(line + b"\n" for line in whole))
    return done


def causal_model(name: str, training: bool = False) -> tuple[Any, Any]:
    """Tokenizer and language model of transformers, on a GPU if there is one, there in float16, or
    for `training` in bfloat16.

    Raises WeightsError where PyTorch is not installed, or there is no such model.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise WeightsError("language models need PyTorch: `pip install cir_jax[torch]`.") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.bfloat16 if training else torch.float16
    dtype = half if device == "cuda" else torch.float32
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except Exception as error:  # transformers raises many types
        raise WeightsError(
            f"--model={name}: no causal language model there ({str(error).splitlines()[0]}). "
            "Give a directory in Hugging Face format, or a hub id where there is a network."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.to(device).eval()


class _Sampler:
    def __init__(self, name: str):
        self._tokenizer, self._model = causal_model(name)

    def __call__(self, concept: str, count: int, batch_size: int, seed: int) -> list[str]:
        import torch

        prompt = f"a photo of {concept} that"
        inputs = self._tokenizer(prompt, return_tensors="pt").to(self._model.device)
        torch.manual_seed((seed + zlib.crc32(concept.encode())) % 2**63)
        phrases: list[str] = []
        while len(phrases) < count:
            rows = self._model.generate(
                **inputs,
                do_sample=True,
                temperature=TEMPERATURE,
                max_length=max(MAX_TOKENS, inputs["input_ids"].shape[1] + 1),
                no_repeat_ngram_size=2,
                num_return_sequences=min(batch_size, count - len(phrases)),
                pad_token_id=self._tokenizer.eos_token_id,
            )
            phrases += self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [tidy(phrase) for phrase in phrases]
