"""Parity handler of SEARLE-OTI: losses, gradient, AdamW and the average, step by step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.composers import searle_oti
from cir_jax.models.clip import Clip, overwrite_tokens
from cir_jax.weights import convert, open_clip
from tests.parity_core import DOLLAR, Outputs, nhwc


def optimisation(fixture: Any) -> Outputs:
    """The given texts, one step after the other; features of step 0."""
    clip, inputs = open_clip.from_openai(fixture.config["clip"]), fixture.inputs
    params = convert.to_ours(
        fixture.params, open_clip.names(clip), ignore=open_clip.IGNORE, what=fixture.path.name
    )
    names = ("learning_rate", "weight_decay", "lambda_cos", "lambda_gpt", "ema_decay")
    rate, decay, weight_cos, weight_gpt, ema = (fixture.config[name] for name in names)
    batch = fixture.config["batch"]
    recipe = searle_oti.Recipe(rate, decay, ema, weight_cos, weight_gpt, mean_over=batch)
    model = Clip(clip).bind({"params": params})

    def text(ids: jax.Array, words: jax.Array) -> jax.Array:
        at = (ids == DOLLAR).argmax(axis=1)
        return model.encode_text(ids, overwrite_tokens(model.embed_tokens(ids), at, words))

    @jax.jit
    def step(state: searle_oti.State, template: Any, replaced: Any, original: Any) -> Any:
        template, replaced = (functools.partial(text, ids) for ids in (template, replaced))
        target = model.encode_text(original)
        return searle_oti.update(
            recipe,
            state,
            searle_oti.image_term(recipe, state.words, template, images),
            searle_oti.phrase_term(recipe, state.words, replaced, target),
        )

    state = searle_oti.start(recipe, jnp.asarray(inputs["init_pseudo_tokens"]))
    ids = [jnp.asarray(inputs[name]) for name in ("template_ids", "oti_gpt_ids", "reg_gpt_ids")]

    @jax.jit
    def of_step_0(images: jax.Array, words: jax.Array) -> Outputs:
        return {
            "image_features": model.encode_image(images),
            "template_features_step0": text(ids[0][0], words),
            "oti_gpt_features_step0": text(ids[1][0], words),
            "reg_gpt_features_step0": model.encode_text(ids[2][0]),
        }

    outputs = of_step_0(nhwc(inputs["images"]), state.words)
    images = outputs["image_features"]
    series: dict[str, list[Any]] = {}
    for texts in zip(*ids, strict=True):
        state, losses, gradient = step(state, *texts)
        values = (losses.total.mean(), losses.cosine.mean(), losses.phrase.mean())
        values = (*values, gradient, state.words, state.average)
        names = ("oti_loss", "cosine_loss", "gpt_loss")
        names = (*names, "grad_pseudo_tokens", "pseudo_tokens", "ema_pseudo_tokens")
        for name, value in zip(names, values, strict=True):
            series.setdefault(name, []).append(np.asarray(value))
    return outputs | {name: np.stack(values) for name, values in series.items()}


HANDLERS = {"searle_oti": optimisation}
