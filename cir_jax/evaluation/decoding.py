"""Images of composed queries, by an unCLIP decoder of diffusers: what a method has in mind.

Decoders are trained on un-normalised CLIP image features: Karlo
(`kakaobrain/karlo-v1-alpha-image-variations`, CompoDiff's choice, its prior replaced) on those of
ViT-L/14, `stabilityai/stable-diffusion-2-1-unclip-small` on the same, `...-unclip` on ViT-H/14's.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from cir_jax.errors import ConfigError, WeightsError
from cir_jax.models.backbone import Backbone
from cir_jax.weights import pipelines

FLAG = "config.evaluation.decoder"
KINDS = (pipelines.KARLO, "StableUnCLIPImg2ImgPipeline")


class Unclip:
    """model: directory or hub id, of one of `KINDS`. steps: of its (first) sampler; None = its own.

    Raises ConfigError where diffusers is not installed, WeightsError where there is no such model,
    or one for features of another width than the backbone's.
    """

    def __init__(self, model: str, backbone: Backbone, steps: int | None = None):
        loaded = pipelines.load(KINDS, model, FLAG)
        self._run, self._karlo = loaded.run, loaded.kind == pipelines.KARLO
        parts = self._run.components
        dim = (parts["text_proj"] if self._karlo else parts["image_encoder"]).config
        dim = dim.clip_embeddings_dim if self._karlo else dim.projection_dim
        if dim != backbone.dim:
            raise WeightsError(
                f"{FLAG}={model}: decodes features of width {dim}, those of {backbone.weights_id} "
                f"have {backbone.dim}. Choose a decoder that was trained on this backbone's."
            )
        name = "decoder_num_inference_steps" if self._karlo else "num_inference_steps"
        self._options: Mapping[str, Any] = {} if steps is None else {name: steps}

    def __call__(self, features: np.ndarray, stream: str) -> Image.Image:
        """float32[dim], as long as image features are -> an image, its noise of stream `stream`."""
        import torch

        if not np.isfinite(features).all():
            raise ConfigError("features that are not finite cannot be decoded")
        seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "little")
        options = {**self._options, "generator": torch.Generator().manual_seed(seed)}
        like = next(self._run.image_encoder.parameters())
        rows = torch.from_numpy(np.asarray(features, np.float32)[None]).to(like)
        if self._karlo:
            return self._run(image_embeddings=rows, **options).images[0]
        return self._run(prompt="", image_embeds=rows, **options).images[0]
