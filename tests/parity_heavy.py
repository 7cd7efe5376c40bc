"""Parity handlers of BLIP, T5 and the light encoders.

A handler takes a `parity.Fixture` and gives our outputs under the fixture's output names (more,
where they come for free). Sizes come from the fixture's config only.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cir_jax.models import light
from cir_jax.models.blip import Blip, BlipConfig
from cir_jax.models.clip import overwrite_tokens
from cir_jax.models.t5 import T5Config, T5Encoder
from cir_jax.weights import blip as blip_weights
from cir_jax.weights import t5 as t5_weights
from cir_jax.weights import timm as timm_weights
from cir_jax.weights.convert import flatten
from tests.parity_core import nchw, nhwc, normalised

Outputs = dict[str, Any]


def blip(fixture: Any) -> Outputs:
    """Both towers, ITC, ITM; with pseudo-words where the fixture has some."""
    config = BlipConfig.from_dict(fixture.config)
    params = blip_weights.to_params(fixture.params, config)

    @jax.jit
    def run(params: Any, inputs: dict[str, jax.Array]) -> Outputs:
        model = Blip(config).bind({"params": params})
        mask = inputs["attention_mask"].astype(bool)
        tokens = model.visual_tokens(inputs["pixel_values"])
        image = normalised(model.project_image(tokens))

        def read(embeddings: jax.Array, prefix: str = "") -> Outputs:
            hidden = model.text_hidden_states(embeddings, mask)
            matched = model.text_hidden_states(embeddings, mask, tokens)
            text = normalised(model.text_projection(hidden[:, 0]))
            return {
                f"{prefix}text_last_hidden_state": hidden,
                f"{prefix}text_embeds": text,
                f"{prefix}itm_text_last_hidden_state": matched,
                f"{prefix}itm_logits": model.match_head(matched[:, 0]),
                f"{prefix}itc_similarity": image @ text.T,
            }

        outputs = {
            "vision_last_hidden_state": tokens,
            "vision_cls": tokens[:, 0],
            "image_embeds": image,
        }
        embeddings = model.embed_tokens(inputs["input_ids"])
        outputs |= read(embeddings)
        if "pseudo_positions" in inputs:
            embeddings = overwrite_tokens(
                embeddings, inputs["pseudo_positions"], inputs["pseudo_tokens"]
            )
            outputs |= read(embeddings, "pseudo_")
        return outputs

    inputs = dict(fixture.inputs)
    inputs["pixel_values"] = nhwc(inputs["pixel_values"])
    return run(params, inputs)


def t5(fixture: Any) -> Outputs:
    """Hidden states with and without the padding mask."""
    config = T5Config.from_dict(fixture.config["t5_config"])
    params = t5_weights.to_params(fixture.params, config)
    run = jax.jit(T5Encoder(config).apply)
    ids, mask = fixture.inputs["input_ids"], fixture.inputs["attention_mask"]
    return {
        "last_hidden_state": run({"params": params}, ids, mask),
        "last_hidden_state_nomask": run({"params": params}, ids),
    }


def timm(fixture: Any) -> Outputs:
    """Feature map, back in NCHW, and pooled vector."""
    config = dict(fixture.config)
    config.pop("num_classes", None)
    name = config.pop("timm_name", None)
    if name is None:
        model = light.from_dict(config)
    elif config.pop("arch") == "efficientvit_msra":
        model = light.create(name, image_size=config["image_size"])
    else:
        model = light.create(name)
    variables = timm_weights.to_variables(fixture.params, model)

    @jax.jit
    def run(variables: Any, images: jax.Array) -> Outputs:
        feature_map = model.apply(variables, images)
        return {"forward_features": nchw(feature_map), "pooled": light.pool(feature_map)}

    return run(variables, nhwc(fixture.inputs["x"]))


HANDLERS: dict[str, Callable[[Any], Outputs]] = {
    "blip_hf": blip,
    "blip_full_rule": blip,
    "t5_encoder": t5,
    "timm_light": timm,
    "timm_full_rule": timm,
}


def light_shape_errors(shapes: dict[str, Any]) -> list[str]:
    """What of `light_shapes.json` our light encoders do not have: names, shapes, counts, maps."""
    errors = []
    for name, known in shapes.items():
        if name.startswith("_"):
            continue
        model = light.create(name)
        ours = {source: path for source, (path, _) in timm_weights.names(model).items()}
        tree = flatten(timm_weights.shapes(model))
        ignored = re.compile("|".join(timm_weights.IGNORE))
        theirs = {k: v for k, v in known["state_dict"].items() if not ignored.fullmatch(k)}
        if ours.keys() != theirs.keys():
            errors.append(f"{name}: names differ: {sorted(ours.keys() ^ theirs.keys())[:5]}")
            continue
        for source, path in ours.items():
            shape = tree[path].shape
            if len(shape) == 4:
                shape = tuple(shape[i] for i in (3, 2, 0, 1))
            if list(shape) != theirs[source]:
                errors.append(f"{name}: {source} is {shape}, not {theirs[source]}")
        count = sum(leaf.size for path, leaf in tree.items() if path[0] == "params")
        if count != known["total_params_without_classifier"]:
            errors.append(f"{name}: {count} parameters")
        channels, height, width = known["default_input_size"]
        images = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
        feature_map = jax.eval_shape(model.apply, timm_weights.shapes(model), images)
        batch, *rest = known["forward_features_shape_at_default_input"]
        if feature_map.shape != (batch, *rest[1:], rest[0]):
            errors.append(f"{name}: feature map {feature_map.shape}")
        if model.config.num_features != known["num_features"]:
            errors.append(f"{name}: {model.config.num_features} features")
    return errors
