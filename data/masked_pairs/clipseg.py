"""Masks of what words name, by CLIPSeg (arXiv 2112.10003) through transformers.

The probabilities of an image's words are joined by their maximum, squashed to 64 x 64 and cut at
THRESHOLD. CompoDiff's paper says neither how it joins nor where it cuts. Where less than LEAST of a
picture is over the threshold, the LARGEST part of it with the highest probabilities is taken: a
masked row must have a mask.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from cir_jax.errors import ConfigError, WeightsError
from cir_jax.input import masks
from cir_jax.input.images import to_rgb

THRESHOLD = 0.5
LEAST, LARGEST = 0.01, 0.1
MOST_WORDS = 8
"""Words of a caption that are looked for, from its beginning."""


@dataclasses.dataclass(frozen=True)
class ClipSeg:
    """A model with its processor, in evaluation mode."""

    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str) -> "ClipSeg":
        """A directory, or a hub id that is there or can be downloaded.

        Raises ConfigError where torch or transformers is missing, WeightsError where there is no
        such model.
        """
        try:
            import torch  # noqa: F401
            from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor
        except ImportError as error:
            raise ConfigError(
                f"--segmenter={name}: {error}. CLIPSeg needs PyTorch and transformers: "
                "pip install 'cir_jax[clipseg]'."
            ) from error
        try:
            model, unused = CLIPSegForImageSegmentation.from_pretrained(
                name, output_loading_info=True
            )
            processor = CLIPSegProcessor.from_pretrained(name)
        except Exception as error:  # transformers and the hub raise many types
            raise WeightsError(
                f"--segmenter={name}: no CLIPSeg could be loaded ({_first(error)}). Give a "
                "directory in Hugging Face format, such as `hf download CIDAS/clipseg-rd64-refined "
                "--local-dir DIR` makes."
            ) from error
        if missing := sorted(unused["missing_keys"]):
            raise WeightsError(
                f"--segmenter={name}: no CLIPSeg, its file lacks {missing[0]} and "
                f"{len(missing) - 1} more tensors. Give CIDAS/clipseg-rd64-refined, or its folder."
            )
        return cls(model.eval(), processor)

    def masks(
        self, images: Sequence[Image.Image], words: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """bool[64, 64] of each image, where what its words name is seen."""
        import torch

        named = [list(of)[:MOST_WORDS] for of in words]
        rows = [
            (to_rgb(image), word) for image, of in zip(images, named, strict=True) for word in of
        ]
        inputs = self.processor(
            text=[word for _, word in rows],
            images=[image for image, _ in rows],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            logits = self.model(**inputs).logits
        logits = logits.reshape(len(rows), 1, *logits.shape[-2:])
        small = torch.nn.functional.interpolate(
            logits, (masks.SIZE, masks.SIZE), mode="bilinear", antialias=True
        )
        probabilities = torch.sigmoid(small)[:, 0].numpy()
        ends = np.cumsum([len(of) for of in named])[:-1]
        return [cut(part.max(axis=0)) for part in np.split(probabilities, ends)]


def cut(probabilities: np.ndarray) -> np.ndarray:
    """float[64, 64] -> bool[64, 64], never empty."""
    mask = probabilities > THRESHOLD
    if mask.mean() >= LEAST:
        return mask
    order = np.argsort(-probabilities, axis=None, kind="stable")
    mask = np.zeros(probabilities.size, bool)
    mask[order[: int(LARGEST * probabilities.size)]] = True
    return mask.reshape(probabilities.shape)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
