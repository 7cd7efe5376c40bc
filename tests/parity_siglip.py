"""Parity handlers of SigLIP and SigLIP 2; see `parity_core`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cir_jax.models.siglip import Siglip, SiglipConfig
from cir_jax.weights import siglip as siglip_weights
from tests.parity_core import nhwc, normalised

Outputs = dict[str, Any]


def siglip(fixture: Any) -> Outputs:
    """Both towers, with a padding mask too; logits, probabilities and the sigmoid loss."""
    config = SiglipConfig.from_dict(fixture.config)
    params = siglip_weights.to_params(fixture.params, config)

    @jax.jit
    def run(params: Any, inputs: dict[str, jax.Array]) -> Outputs:
        model = Siglip(config).bind({"params": params})
        images, ids = inputs["pixel_values"], inputs["input_ids"]
        embeddings = model.embed_tokens(ids)
        masked = model.text_hidden_states(embeddings, inputs["attention_mask"])
        image, text = model.encode_image(images), model.encode_text(ids)
        cosines = normalised(image) @ normalised(text).T
        logits = jnp.exp(params["logit_scale"]) * cosines + params["logit_bias"]
        n = min(logits.shape)
        signs = 2 * jnp.eye(n) - 1
        return {
            "image_pooled": image,
            "text_pooled": text,
            "image_embeds": normalised(image),
            "text_embeds": normalised(text),
            "vision_last_hidden_state": model.visual_tokens(images),
            "text_last_hidden_state": model.text_hidden_states(embeddings),
            "text_pooled_with_mask": model.text_projection(masked[:, -1]),
            "logits_per_image": logits,
            "probs_per_image": jax.nn.sigmoid(logits),
            "sigmoid_loss_first_n": -jax.nn.log_sigmoid(signs * logits[:n, :n]).sum(0).mean(),
        }

    return run(params, fixture.inputs | {"pixel_values": nhwc(fixture.inputs["pixel_values"])})


HANDLERS: dict[str, Callable[[Any], Outputs]] = {"siglip_hf": siglip}
