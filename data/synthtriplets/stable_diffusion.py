"""Pairs of images by Stable Diffusion and Prompt-to-Prompt, as InstructPix2Pix makes them.

Both captions are drawn in one batch from the same latent, with the same noise in each of 100 steps
of Euler's ancestral method. In the first share p of the steps the target's self-attention maps are
the reference's (Prompt-to-Prompt, arXiv 2208.01626): so its layout is, too. p is drawn from 0.1 to
0.9 for each pair, and the weight of the captions (classifier-free guidance) from 7.5 to 15.
"""

import hashlib
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cir_jax.weights import pipelines

STEPS = 100
SHARED = (0.1, 0.9)
GUIDANCE = (7.5, 15.0)
QUALITY = 95  # of JPEG


class StableDiffusion:
    """`drawing.Painter`: a Stable Diffusion of diffusers. steps: of the sampler.

    Where the weights come with a safety checker, pairs that it flags are refused.
    Raises ConfigError and WeightsError as `pipelines.load` does.
    """

    def __init__(self, model: str, steps: int = STEPS):
        loaded = pipelines.load(
            ("StableDiffusionPipeline",), model, "--model", "EulerAncestralDiscreteScheduler"
        )
        self.pipeline, self.steps = loaded.run, steps
        self.identity = {"model": model, "parameters": loaded.parameters, "steps": steps}

    def pair(self, reference: str, target: str, name: str) -> tuple[list[bytes], dict] | str:
        """See `drawing.Painter`. Notes the share of steps and the guidance."""
        import torch

        rng = random.Random(name)
        shared, guidance = (low + (high - low) * rng.random() for low, high in (SHARED, GUIDANCE))
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        with sharing(self.pipeline.unet, round(shared * self.steps)) as counter:
            made = self.pipeline(
                [reference, target],
                num_inference_steps=self.steps,
                guidance_scale=guidance,
                # one of the CPU for each: the same noise for both, on any device
                generator=[torch.Generator().manual_seed(seed) for _ in range(2)],
                callback_on_step_end=counter,
            )
        if any(getattr(made, "nsfw_content_detected", None) or ()):
            return "unsafe"
        note = {"shared": round(shared, 4), "guidance": round(guidance, 4)}
        return [_jpeg(image) for image in made.images], note


@contextmanager
def sharing(unet: Any, steps: int) -> Iterator[Any]:
    """In the first `steps` steps of a batch [reference, target], twice with guidance, all
    self-attention of the target is by the reference's maps. Yields the callback of the steps.

    A map is a function of queries and keys alone, so it is these that the target takes over.
    """
    done = 0

    def count(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done = step + 1
        return tensors

    def share(module: Any, inputs: Any, output: Any) -> Any:
        if done >= steps:
            return None
        pairs = output.unflatten(0, (-1, 2))
        return pairs[:, :1].expand_as(pairs).flatten(0, 1)

    handles = [
        part.register_forward_hook(share)
        for name, module in unet.named_modules()
        if name.endswith("attn1")  # attn2 attends to the caption
        for part in (module.to_q, module.to_k)
    ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def _jpeg(image: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    return data.getvalue()
