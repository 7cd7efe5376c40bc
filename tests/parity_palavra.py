"""Parity handler of PALAVRA: the set encoder, the map, their losses, and the refinement's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.composers import palavra
from cir_jax.composers.base import normalise
from cir_jax.composers.losses import nt_xent
from cir_jax.composers.palavra import Palavra
from cir_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from cir_jax.weights import convert, open_clip
from tests.parity_words import Outputs, of_ids, part


def text_alone(values: dict[str, int]) -> ClipConfig:
    """OpenAI's text tower; the image tower is any."""
    width = values["transformer_width"]
    return ClipConfig(
        text=TextConfig(
            vocab_size=values["vocab_size"],
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=values["transformer_layers"],
            num_attention_heads=values["transformer_heads"],
            max_position_embeddings=values["context_length"],
            hidden_act="quick_gelu",
            bos_token_id=values["vocab_size"] - 2,
            eos_token_id=values["vocab_size"] - 1,
        ),
        vision=VisionConfig(image_size=32, patch_size=16),
        projection_dim=values["embed_dim"],
    )


def set_encoder(fixture: Any) -> Outputs:
    values, inputs = fixture.config, {k: jnp.asarray(v) for k, v in fixture.inputs.items()}
    config = text_alone(values["clip"])
    tensors = part(fixture.params, "clip.")
    names = {name: to for name, to in open_clip.names(config).items() if name in tensors}
    backbone = convert.to_ours(tensors, names, what=fixture.path.name)
    backbone["logit_scale"] = np.zeros((), np.float32)  # a text tower alone; not used
    params = {
        "map": convert.to_ours(part(fixture.params, "text_visual_map."), palavra.MAP_NAMES),
        "set": convert.to_ours(part(fixture.params, "set_encoder."), palavra.SET_NAMES),
    }
    composer = Palavra(
        of_ids(config),
        hidden_dim=values["d_dim"],
        dropout=values["dropout"],
        weight_object=values["coeff_gt_object_loss"],
        templates=("a photo of {}",),
    )
    composer.placeholder_id = values["asterix_token"]
    images, text = inputs["image_features"], inputs["text_features"]
    batch = len(images)
    composer.prompt_ids = inputs["asterisk_prompt_ids"][:1]
    assert (inputs["asterisk_prompt_ids"] == composer.prompt_ids).all()
    composer.word_ids = inputs["stage2_prompt_ids"][:1]
    composer.coarse_ids = inputs["coarse_ids"]  # one of each row
    frozen = {
        "backbone": backbone,
        "labels": inputs["label_prompt_ids"][None],
        "first_tokens": inputs["label_ids"][:, 1],
    }
    label, template = jnp.arange(batch), jnp.zeros(batch, jnp.int32)
    sets = normalise(images)

    def map_loss(of_map: Any) -> jax.Array:
        return composer.map_error(params | {"map": of_map}, text, images).mean()

    def set_loss(of_set: Any) -> tuple[jax.Array, Any]:
        rows = composer.set_rows(params | {"set": of_set}, frozen, sets, label, template, None)
        total, metrics = composer.set_loss(rows, label)
        return total, (rows, metrics)

    @jax.jit
    def run(params: Any) -> tuple[Outputs, Any, Any]:
        map_value, map_grad = jax.value_and_grad(map_loss)(params["map"])
        (total, (rows, metrics)), grad = jax.value_and_grad(set_loss, has_aux=True)(params["set"])
        apply = composer.set_encoder.apply
        words, inner = apply({"params": params["set"]}, sets, capture_intermediates=True)
        mean = sets.mean(axis=1)
        coarse = composer.coarse_features(params, frozen)

        def refinement(words: jax.Array) -> jax.Array:
            return composer.refinement_loss(frozen, mean, coarse, words).mean()

        refined, refined_grad = jax.value_and_grad(refinement)(words)
        star = composer.text_features(backbone, inputs["stage2_prompt_ids"], words)
        raw = composer.backbone.encode_text(backbone, inputs["coarse_ids"])
        a, b = normalise(mean), normalise(star)
        return (
            {
                "text_visual_map": composer.map.apply({"params": params["map"]}, text),
                "text_visual_loss": map_value,
                "phi_pooled": inner["intermediates"]["Dropout_0"]["__call__"][0],
                "estimated_tokens": words,
                "label_prompt_embeddings": normalise(rows["label"]),
                "asterisk_prompt_embeddings": rows["word"],
                "cycle_loss": metrics["cycle"],
                "gt_object_loss": metrics["object"],
                "total_loss": total,
                "cosine_loss_variant": -jnp.mean(
                    jnp.sum(normalise(rows["label"]) * normalise(rows["word"]), -1)
                ),
                "estimated_tokens_from_text": apply(
                    {"params": params["set"]}, composer.visual(params, text)
                ),
                "estimated_tokens_single_image": apply({"params": params["set"]}, sets[:, :1]),
                "stage2_prompt_embeddings": star,
                "coarse_embeddings": composer.map.apply({"params": params["map"]}, normalise(raw)),
                "stage2_loss_mode1": refined,
                "grad/stage2_tokens_mode1": refined_grad,
                "stage2_loss_mode0": jnp.square(a - b).mean(),
                "stage2_loss_mode2": nt_xent(mean, star, values["contrastive_temp"]),
            },
            map_grad,
            grad,
        )

    outputs, map_grad, grad = run(params)
    for prefix, grads, table in (
        ("text_visual_map", map_grad, palavra.MAP_NAMES),
        ("set_encoder", grad, palavra.SET_NAMES),
    ):
        named = convert.to_source(grads, table)
        outputs |= {f"grad/{prefix}.{name}": value for name, value in named.items()}
    return outputs


HANDLERS: dict[str, Callable[[Any], Outputs]] = {"palavra": set_encoder}
