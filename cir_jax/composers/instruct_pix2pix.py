"""CLIP + InstructPix2Pix: the reference is edited, then images are compared (CompoDiff's Table 3).

The naive way to compose: InstructPix2Pix (arXiv 2211.09800) edits the reference image as the text
says, the backbone encodes what came out, and the query is that feature:

    q = image(edit(reference, text)) / |.|

CompoDiff's authors do not say how they edit; here as InstructPix2Pix's own code does: longer side
`resolution` pixels, both multiples of 64, 100 steps of Euler's ancestral method, and guidance

    e = e(0, 0) + s_T (e(I, T) - e(I, 0)) + s_I (e(I, 0) - e(0, 0)),   s_T = 7.5, s_I = 1.5.

Needs diffusers and PyTorch (extra `synth`); the weights are read by them, the backbone by us.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import jax
from PIL import Image, ImageOps

from cir_jax.composers.base import Composer, Params, Query, normalise
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone
from cir_jax.weights import hub_ids, pipelines

MODEL = "timbrooks/instruct-pix2pix"
_MULTIPLE = 64


class InstructPix2Pix(Composer):
    """model: directory or hub id, as diffusers saves it. steps: of the sampler.

    Raises ConfigError for values that cannot work and where diffusers is not installed,
    WeightsError where there is no such model.
    """

    edits_reference = True

    def __init__(
        self,
        backbone: Backbone,
        model: str = MODEL,
        steps: int = 100,
        text_guidance: float = 7.5,
        image_guidance: float = 1.5,
        resolution: int = 512,
    ):
        super().__init__(backbone)
        if steps < 1:
            raise ConfigError(f"steps={steps}: expected 1 or more")
        if resolution < _MULTIPLE or resolution % _MULTIPLE:
            raise ConfigError(f"resolution={resolution}: expected a multiple of {_MULTIPLE}")
        if not (1 < text_guidance < math.inf and 1 <= image_guidance < math.inf):
            raise ConfigError(
                f"text_guidance={text_guidance}, image_guidance={image_guidance}: expected more "
                "than 1, and 1 or more: below it, diffusers does not guide at all"
            )
        self.model, self.steps, self.resolution = model, steps, resolution
        self.text_guidance, self.image_guidance = text_guidance, image_guidance
        loaded = pipelines.load(
            ("StableDiffusionInstructPix2PixPipeline",),
            model,
            "composer.model",
            "EulerAncestralDiscreteScheduler",
        )
        self._pipeline, self._parameters = loaded.run, loaded.parameters
        self._pipeline.safety_checker = None  # it blackens images, and these are not looked at

    @classmethod
    def for_others(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        model = settings.get("model", MODEL)
        if not hub_ids(model):
            raise ConfigError(
                f"composer.model={model!r} lies here alone. Put it on the hub, and give its id."
            )
        return dict(settings)

    def contents(self) -> dict[str, str]:
        return {"instruct_pix2pix": self._parameters}

    def edit(self, image: Image.Image, text: str, stream: str) -> Image.Image:
        import torch

        seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "little")
        made = self._pipeline(
            text,
            image=fitted(image, self.resolution),
            num_inference_steps=self.steps,
            guidance_scale=self.text_guidance,
            image_guidance_scale=self.image_guidance,
            generator=torch.Generator().manual_seed(seed),
        )
        return made.images[0]

    def compose(self, params: Params, frozen: Params, query: Query, rng: jax.Array) -> jax.Array:
        """Of a query whose reference is edited already."""
        return normalise(self.reference_features(frozen, query))


def fitted(image: Image.Image, resolution: int) -> Image.Image:
    """The image cut and resized to multiples of 64, so that nearly all of it is seen.

    As InstructPix2Pix does: scaled to a longer side of `resolution`, then up until the shorter side
    is a multiple; the longer is cut to one.
    """
    short, long = sorted(image.size)
    side = -(-short * resolution // (long * _MULTIPLE)) * _MULTIPLE
    size = (length * side // short // _MULTIPLE * _MULTIPLE for length in image.size)
    return ImageOps.fit(image.convert("RGB"), tuple(size), Image.Resampling.LANCZOS)
