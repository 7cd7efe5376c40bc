"""CLIP in any of its formats: Hugging Face, OpenCLIP, OpenAI."""

import dataclasses
import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.input.images import ImageTransform
from cir_jax.input.text import Tokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.models.clip import Clip, ClipConfig, TowerConfig
from cir_jax.models.resnet import ResNetConfig
from cir_jax.weights import beside, convert, families, files, open_clip, positions

IGNORE = (r"(text|vision)_model\.embeddings\.position_ids",)


def hf_names(config: ClipConfig) -> convert.Names:
    """Name table of transformers' CLIPModel."""
    text, vision = "text_model", "vision_model"
    table = convert.Names(
        {
            "logit_scale": (("logit_scale",), "same"),
            "visual_projection.weight": (("visual_projection", "kernel"), "linear"),
            "text_projection.weight": (("text_projection", "kernel"), "linear"),
        }
    )

    def layers(source: str, tower: str, tower_config: TowerConfig) -> None:
        for i in range(tower_config.num_hidden_layers):
            old, new = f"{source}.encoder.layers.{i}", f"layers_{i}"
            for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
                table.linear(f"{old}.self_attn.{theirs}_proj", tower, new, "attention", ours)
            for part in ("fc1", "fc2"):
                table.linear(f"{old}.mlp.{part}", tower, new, part)
            for part in ("1", "2"):
                table.norm(f"{old}.layer_norm{part}", tower, new, f"norm{part}")

    embeddings, patches = f"{vision}.embeddings", ("vision", "patch_embedding", "kernel")
    words = ("text", "token_embedding", "embedding")
    table |= {
        f"{text}.embeddings.token_embedding.weight": (words, "same"),
        f"{text}.embeddings.position_embedding.weight": (("text", "position_embedding"), "same"),
        f"{embeddings}.class_embedding": (("vision", "class_embedding"), "same"),
        f"{embeddings}.position_embedding.weight": (("vision", "position_embedding"), "same"),
        f"{embeddings}.patch_embedding.weight": (patches, "conv"),
    }
    layers(text, "text", config.text)
    table.norm(f"{text}.final_layer_norm", "text", "final_norm")
    layers(vision, "vision", config.vision)
    table.norm(f"{vision}.pre_layrnorm", "vision", "pre_norm")  # spelled so in the original
    table.norm(f"{vision}.post_layernorm", "vision", "post_norm")
    return table


def read(
    source: files.Source,
    dtype: Any,
    params_dtype: Any,
    keep: Container[str] | None = None,
    **sizes: int | None,
) -> tuple[Backbone, dict[str, Any]]:
    """Backbone and parameters; see `backbones.load`.

    keep: the top-level names of the parameters that are wanted (`backbone.TOWERS`); None = all.
    Other tensors are not read. sizes: image_size and context_length, of `positions.resized`.
    """
    tensors, what = open_clip.plain(source.tensors()), source.what()
    config, openai = _config(source, tensors, what)
    if source.kind == files.HUGGING_FACE and not openai:
        table, ignore, marker = hf_names(config), IGNORE, "text_model."
        expected = "CLIP (Hugging Face names)"
    else:
        table, ignore, marker = open_clip.names(config), open_clip.IGNORE, "token_embedding."
        expected = "CLIP (OpenAI or OpenCLIP names)"
    if not any(name.startswith(marker) for name in tensors):
        raise WeightsError(f"{what}: tensors of {families.describe(tensors)}, expected {expected}.")
    tensors = open_clip.folded(tensors)
    if openai:
        ignore = (*ignore, *open_clip.OPENAI_CONSTANTS)
    backbone = _backbone(source, config, dtype, openai)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0))
    if keep is not None:
        other = {name for name, (path, _) in table.items() if path[0] not in keep}
        table = {name: target for name, target in table.items() if name not in other}
        tensors = files.without(tensors, other)
        shapes = {name: tree for name, tree in shapes.items() if name in keep}
    params = convert.to_ours(tensors, table, ignore=ignore, what=what, dtype=params_dtype)
    positions.check(params, config, what)
    convert.check_shapes(params, shapes, what)
    antialias = source.kind == files.OPEN_CLIP  # as open_clip's force_image_size
    backbone, params = positions.resized(backbone, params, antialias=antialias, **sizes)
    cleaning = backbone.tokenizer.cleaning
    about = [*beside.settings(config), *([] if cleaning == "lower" else [cleaning])]
    weights_id = files.content_id(source.name, params, about)
    return dataclasses.replace(backbone, weights_id=weights_id), params


def architecture(source: files.Source, dtype: Any, **sizes: int | None) -> Backbone:
    """Backbone without its weights, which need not be there unless the config is read off them."""
    tensors = {} if source.kind else open_clip.plain(source.tensors())
    config, openai = _config(source, tensors, str(source.file or source.directory))
    return positions.resized(_backbone(source, config, dtype, openai), {}, **sizes)[0]


def write(path: Path, backbone: Backbone, params: Any, dtype: Any) -> None:
    """See `backbones.save`."""
    config = backbone.config
    if isinstance(config.vision, ResNetConfig):
        table, file = open_clip.names(config), "open_clip_model.safetensors"
        transform = backbone.image_transform
        statistics = {"mean": transform.mean, "std": transform.std}
        model = open_clip.to_open_clip(config, backbone.tokenizer)
        about = {files.OPEN_CLIP: {"model_cfg": model, "preprocess_cfg": statistics}}
    else:
        table, file = hf_names(config), "model.safetensors"
        about = {files.HUGGING_FACE: config.to_dict() | {"torch_dtype": np.dtype(dtype).name}}
    preprocessing = backbone.image_transform.to_dict()
    if files.OPEN_CLIP in about:
        preprocessing.setdefault("cir_jax", {})  # see _backbone
    about[beside.PREPROCESSING] = preprocessing
    tensors = convert.to_source(jax.device_get(params), table)
    beside.write(path, file, tensors, about, backbone.tokenizer, dtype)


def _config(
    source: files.Source, tensors: Mapping[str, np.ndarray], what: str
) -> tuple[ClipConfig, bool]:
    """The config, and whether the weights are OpenAI's own, or Long-CLIP's."""
    openai = set(open_clip.OPENAI_CONSTANTS) <= set(tensors) or open_clip.is_long_clip(tensors)
    if openai or not source.kind:
        if not {"token_embedding.weight", "visual.conv1.weight"} <= set(tensors):
            raise WeightsError(
                f"{what}: tensors of {families.describe(tensors)} and no config beside them. "
                "Expected an OpenAI CLIP file, or the directory of a model with its config."
            )
        config = open_clip.from_shapes({name: array.shape for name, array in tensors.items()})
        if not openai:
            raise WeightsError(
                f"{what}: no config beside it says which activation it was trained with. Write "
                f"{source.directory / files.OPEN_CLIP} with this content, quick_gelu true for "
                "models that started from OpenAI's, false for most others, and check the rest: "
                + json.dumps({"model_cfg": open_clip.to_open_clip(config)})
            )
        return config, openai
    if source.kind == files.HUGGING_FACE:
        return ClipConfig.from_dict(source.config), openai
    try:
        file = str(source.directory / source.kind)
        return open_clip.from_open_clip(source.config["model_cfg"], file), openai
    except KeyError as error:
        raise WeightsError(
            f"{source.directory / source.kind}: no field {error}. Download or copy it again."
        ) from error


def _backbone(source: files.Source, config: ClipConfig, dtype: Any, openai: bool) -> Backbone:
    directory = source.directory
    hugging_face = source.kind == files.HUGGING_FACE and not openai
    preprocessing = directory / beside.PREPROCESSING
    stored = files.read_json(preprocessing) if hugging_face or preprocessing.is_file() else {}
    # beside OpenCLIP weights only our own says more than open_clip_config.json
    if hugging_face or "cir_jax" in stored:
        transform = ImageTransform.from_dict(stored, preprocessing)
    else:
        size = config.vision.image_size
        transform = ImageTransform.from_open_clip(source.config.get("preprocess_cfg", {}), size)
    text = config.text
    last = text.vocab_size - 1
    # OpenAI's published configs carry eos 2, which is no token; the end token is the last word
    eos = last if text.eos_token_id == open_clip.ARGMAX else text.eos_token_id
    if source.kind == files.OPEN_CLIP and not openai:
        what, stored = str(directory / source.kind), source.config["model_cfg"]["text_cfg"]
        tokenizer = open_clip.read_tokenizer(directory, stored, text, what)
    else:
        tokenizer = Tokenizer.from_directory(
            directory,
            context_length=text.max_position_embeddings,
            bos_id=text.bos_token_id,
            eos_id=eos,
            # the tokenizer's own padding token where it names one: the config's is often wrong
            pad_id=eos if hugging_face else 0,
        )
    beside.check(directory, tokenizer, transform, config)
    return Backbone(Clip(config, dtype), tokenizer, transform, f"{source.name}@untrained")
