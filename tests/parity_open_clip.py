"""Parity handlers of models that are a CLIP with something of their own: Long-CLIP, BGE-VL."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.composers.image_text import ImageText
from cir_jax.input.images import ImageTransform
from cir_jax.input.text import word_tokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.models.clip import Clip, ClipConfig, end_positions
from cir_jax.retrieval import ranking
from cir_jax.weights import clip, convert, open_clip, positions

Outputs = dict[str, Any]


def long_clip(fixture: Any) -> Outputs:
    """The text tower with two tables of positions, and the stretching of 77 positions."""
    sizes = fixture.config
    text = {name: sizes[f"transformer_{name}"] for name in ("width", "heads", "layers")}
    text |= {name: sizes[name] for name in ("vocab_size", "context_length")}
    config = open_clip.from_open_clip(
        {"embed_dim": sizes["embed_dim"], "quick_gelu": True, "vision_cfg": {}, "text_cfg": text}
    )
    tensors = open_clip.folded(fixture.params)
    table = {
        name: target
        for name, target in open_clip.names(config).items()
        if target[0][0] in ("text", "text_projection")
    }
    params, ids = convert.to_ours(tensors, table), fixture.inputs["input_ids"]
    params["logit_scale"] = np.float32(0)  # of the whole module, and not in the fixture

    @jax.jit
    def run(params: Any, ids: jax.Array) -> Outputs:
        model = Clip(config).bind({"params": params})
        hidden, features = model.text_hidden_states(model.embed_tokens(ids)), model.encode_text(ids)
        end = end_positions(ids, config.text.eos_token_id)
        return {
            "text_features": features,
            "text_features_normalised": features / jnp.linalg.norm(features, axis=-1)[:, None],
            "last_hidden_state_at_eot": hidden[jnp.arange(len(ids)), end],
        }

    return run(params, ids) | {
        "combined_positions": tensors["positional_embedding"],
        "stretched_positions_248": positions.stretched(fixture.inputs["clip_positions_77"]),
    }


def bge_vl(fixture: Any) -> Outputs:
    """Queries of un-normalised features, from given ones and from pixels and ids."""
    config, inputs = ClipConfig.from_dict(fixture.config), fixture.inputs
    params = convert.to_ours(fixture.params, clip.hf_names(config), ignore=clip.IGNORE)
    # ids and pixels are given: neither tokenizer nor transform is used
    backbone = Backbone(Clip(config), word_tokenizer([], 8), ImageTransform(), "fixture")
    composer, rng = ImageText(backbone, unit=False), jax.random.key(0)
    pixels, candidates = (
        np.transpose(inputs[f"{name}_pixel_values"], (0, 2, 3, 1))
        for name in ("query", "candidate")
    )

    @jax.jit
    def run(params: Any, pixels: jax.Array, ids: jax.Array, candidates: jax.Array) -> Outputs:
        frozen = {"backbone": params}
        query = composer.compose({}, frozen, {"reference_images": pixels, "token_ids": ids}, rng)
        gallery = composer.embed_gallery({}, frozen, candidates)
        text = backbone.encode_text(params, ids)
        return {
            "image_features": backbone.encode_image(params, pixels),
            "text_features": text,
            "text_features_without_mask": text,
            "text_only_embeddings": text / jnp.linalg.norm(text, axis=-1)[:, None],
            "query_embeddings": query,
            "candidate_embeddings": gallery,
            "scores": composer.score({}, query, gallery),
        }

    given = {name: jnp.asarray(inputs[f"given_{name}_features"]) for name in ("image", "text")}
    query = composer.fuse(given["image"], given["text"])
    gallery = np.asarray(inputs["given_candidate_features"])
    gallery = gallery / np.linalg.norm(gallery, axis=-1, keepdims=True)
    ranked = ranking.rank(np.asarray(query), gallery, k=len(gallery))
    return run(params, pixels, inputs["input_ids"], candidates) | {
        "given_query_embeddings": query,
        "given_candidate_embeddings": gallery,
        "given_scores": composer.score({}, query, gallery),
        "given_ranking": ranked.top,
    }


HANDLERS: dict[str, Callable[[Any], Outputs]] = {"longclip": long_clip, "bge_vl": bge_vl}
