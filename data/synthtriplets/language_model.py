"""A causal language model of transformers (PyTorch), sampled as InstructPix2Pix samples its own.

Temperature 0.7, at most 256 tokens, frequency penalty 0.1 (a token's logit falls by that for each
time that it was sampled before), until END. Each token of a row takes one number of the row's own
random stream, so that what is written does not depend on which rows are completed together.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cir_jax.errors import ConfigError, WeightsError
from cir_jax.input.generation import causal_model
from data.synthtriplets.instructions import END

TEMPERATURE = 0.7
MAX_TOKENS = 256
FREQUENCY_PENALTY = 0.1

_TAIL = 8  # tokens that END is looked for in: it has 4 characters


class LanguageModel:
    """`instructions.Model`. name: directory or hub id; adapter: of LoRA, by peft, or "".

    Raises WeightsError where there is no such model or adapter, or PyTorch is not installed,
    ConfigError where peft is not.
    """

    def __init__(self, name: str, adapter: str = "", max_tokens: int = MAX_TOKENS):
        tokenizer, model = causal_model(name)
        self._tokenizer = tokenizer
        self._model = _adapted(model, adapter) if adapter else model
        tokenizer.padding_side = "left"
        self._max_tokens = max_tokens
        room = getattr(self._model.config, "max_position_embeddings", None)
        self._room = (room or 1 << 20) - max_tokens
        self.identity = {"model": name, "adapter": adapter, "max_tokens": max_tokens}

    def complete(self, prompts: Sequence[str], streams: Sequence[str]) -> list[str | None]:
        """See `instructions.Model`."""
        if not prompts:
            return []
        lengths = [len(ids) for ids in self._tokenizer(list(prompts))["input_ids"]]
        fit = [i for i, length in enumerate(lengths) if length <= self._room]
        written: list[str | None] = [None] * len(prompts)
        if fit:
            texts = self._complete([prompts[i] for i in fit], [streams[i] for i in fit])
            for i, text in zip(fit, texts, strict=True):
                written[i] = text
        return written

    def _complete(self, prompts: list[str], streams: list[str]) -> list[str]:
        import torch

        numbers = np.stack([_numbers(stream, self._max_tokens) for stream in streams])
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True).to(self._model.device)
        start = inputs["input_ids"].shape[1]

        def ended(ids: Any, scores: Any, **_: Any) -> Any:
            tails = self._tokenizer.batch_decode(ids[:, max(start, ids.shape[1] - _TAIL) :])
            return torch.tensor([END in tail for tail in tails], device=ids.device)

        with torch.no_grad():
            rows = self._model.generate(
                **inputs,
                do_sample=False,  # `draw` leaves one token to choose
                num_beams=1,
                max_new_tokens=self._max_tokens,
                logits_processor=[lambda ids, scores: draw(ids[:, start:], scores, numbers)],
                stopping_criteria=[ended],
                pad_token_id=self._tokenizer.pad_token_id,
            )
        return self._tokenizer.batch_decode(rows[:, start:], skip_special_tokens=True)


def draw(sampled: Any, scores: Any, numbers: np.ndarray) -> Any:
    """The logits [rows, vocabulary] with one token left in each row: that whose share of the
    probabilities holds the row's next number.

    sampled: int64[rows, tokens so far]. numbers: float64[rows, tokens], each in 0..1.
    """
    import torch

    ones = torch.ones_like(sampled, dtype=scores.dtype)
    counts = torch.zeros_like(scores).scatter_add_(1, sampled, ones)
    logits = (scores - FREQUENCY_PENALTY * counts).double() / TEMPERATURE
    sums = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    now = torch.from_numpy(numbers[:, sampled.shape[1]]).to(sums.device)[:, None]
    chosen = torch.searchsorted(sums, now * sums[:, -1:], right=True)
    chosen = chosen.clamp(max=scores.shape[1] - 1)
    return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _numbers(stream: str, count: int) -> np.ndarray:
    seed = hashlib.sha256(stream.encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "little")).random(count)


def lora_package(what: str) -> Any:
    """peft. Raises ConfigError where it is not installed; what: the flag that needs it."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{what}: {error}. Install it: pip install 'cir_jax[synth]'.") from error
    return peft


def _adapted(model: Any, adapter: str) -> Any:
    peft = lora_package(f"--adapter={adapter}")
    try:
        return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
    except Exception as error:  # peft and the hub raise many types
        raise WeightsError(
            f"--adapter={adapter}: no LoRA of this model there ({str(error).splitlines()[0]}). "
            "Give a directory as peft saves it."
        ) from error
