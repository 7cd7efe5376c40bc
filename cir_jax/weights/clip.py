"""CLIP in any of its formats: Hugging Face, OpenCLIP, OpenAI; one way in, one way out."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from cir_jax.errors import WeightsError
from cir_jax.input.images import ImageTransform
from cir_jax.input.text import Tokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.models.clip import Clip, ClipConfig, TowerConfig
from cir_jax.models.resnet import ResNetConfig
from cir_jax.weights import convert, files, open_clip
from cir_jax.weights.files import REPOSITORY as REPOSITORY

IGNORE = (r"(text|vision)_model\.embeddings\.position_ids",)

# tensors that only one family has, to say what a file is when it is not what was expected
_SIGNATURES = {
    "CLIP (Hugging Face names)": ("text_model.embeddings.token_embedding.weight",),
    "CLIP (OpenAI or OpenCLIP names)": ("token_embedding.weight", "visual.conv1.weight"),
    "BLIP (Hugging Face names)": ("vision_proj.weight", "vision_model.embeddings.class_embedding"),
    "BLIP (original names)": ("visual_encoder.cls_token",),
    "T5": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
}


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


def load(
    name_or_path: str | Path, dtype: Any = jnp.float32, *, params_dtype: Any = jnp.float32
) -> tuple[Backbone, dict[str, Any]]:
    """Backbone and parameters of a directory, file or hub id (see `files.find`).

    dtype: of the computation. params_dtype: of the parameters, None = as they are stored.
    Raises WeightsError naming what is missing, unreadable, another model's, or does not fit.
    """
    source = _find(name_or_path)
    tensors, paths = source.tensors(), source.files()
    what = str(paths[0]) if len(paths) == 1 else f"{source.directory} ({len(paths)} files)"
    config, openai = _config(source, tensors, what)
    if source.kind == files.HUGGING_FACE and not openai:
        table, ignore, marker = hf_names(config), IGNORE, "text_model."
    else:
        table, ignore, marker = open_clip.names(config), open_clip.IGNORE, "token_embedding."
    if not any(name.startswith(marker) for name in tensors):
        raise WeightsError(f"{what}: tensors of {_family(tensors)}, expected {_expected(marker)}.")
    if openai:
        ignore = (*ignore, *open_clip.OPENAI_CONSTANTS)
    backbone = _backbone(source, config, dtype, openai)
    params = convert.to_ours(tensors, table, ignore=ignore, what=what, dtype=params_dtype)
    convert.check_shapes(params, jax.eval_shape(backbone.init, jax.random.key(0)), what)
    weights_id = files.content_id(source.name, params, _beside_shapes(config))
    return dataclasses.replace(backbone, weights_id=weights_id), params


def load_architecture(name_or_path: str | Path, dtype: Any = jnp.float32) -> Backbone:
    """Backbone without its weights, which need not be there unless the config is read off them."""
    source = _find(name_or_path)
    tensors = {} if source.kind else source.tensors()
    config, openai = _config(source, tensors, str(source.file or source.directory))
    return _backbone(source, config, dtype, openai)


def save(path: Path, backbone: Backbone, params: Any, dtype: Any = np.float32) -> None:
    """Writes a directory, whole or not at all: Hugging Face's format, which transformers loads;
    OpenCLIP's for ResNets, which Hugging Face's cannot say.

    dtype: of the stored tensors; float16 halves the files.
    """
    config = backbone.config
    if isinstance(config.vision, ResNetConfig):
        table, file = open_clip.names(config), "open_clip_model.safetensors"
        transform = backbone.image_transform
        statistics = {"mean": transform.mean, "std": transform.std}
        model = open_clip.to_open_clip(config)
        about = {files.OPEN_CLIP: {"model_cfg": model, "preprocess_cfg": statistics}}
    else:
        table, file = hf_names(config), "model.safetensors"
        about = {files.HUGGING_FACE: config.to_dict() | {"torch_dtype": np.dtype(dtype).name}}
    tensors = convert.to_source(jax.device_get(params), table)
    tensors = {name: np.asarray(array, dtype, order="C") for name, array in tensors.items()}
    preprocessing = backbone.image_transform.to_dict()
    if files.OPEN_CLIP in about:
        preprocessing.setdefault("cir_jax", {})  # see _backbone
    about |= {
        "preprocessor_config.json": preprocessing,
        "tokenizer_config.json": backbone.tokenizer.to_dict(),
    }
    with files.new_directory(Path(path)) as scratch:
        save_file(tensors, scratch / file, metadata={"format": "pt"})
        for name, content in about.items():
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n")
        backbone.tokenizer.save(scratch / "tokenizer.json")


def _find(name_or_path: str | Path) -> files.Source:
    source = files.find(name_or_path)
    if source.kind and source.model_type != "clip":
        raise WeightsError(
            f"{source.directory / source.kind}: model_type {source.model_type!r}, expected 'clip'. "
            "Give the weights of a CLIP."
        )
    return source


def _config(
    source: files.Source, tensors: Mapping[str, np.ndarray], what: str
) -> tuple[ClipConfig, bool]:
    """The config, and whether the weights are an archive of OpenAI's own."""
    openai = set(open_clip.OPENAI_CONSTANTS) <= set(tensors)
    if openai or not source.kind:
        if not {"token_embedding.weight", "visual.conv1.weight"} <= set(tensors):
            raise WeightsError(
                f"{what}: tensors of {_family(tensors)} and no config beside them. Expected an "
                "OpenAI CLIP file, or the directory of a model with its config."
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
        return open_clip.from_open_clip(source.config["model_cfg"], what), openai
    except KeyError as error:
        raise WeightsError(
            f"{source.directory / source.kind}: no field {error}. Download or copy it again."
        ) from error


def _backbone(source: files.Source, config: ClipConfig, dtype: Any, openai: bool) -> Backbone:
    directory = source.directory
    hugging_face = source.kind == files.HUGGING_FACE and not openai
    preprocessing = directory / "preprocessor_config.json"
    stored = files.read_json(preprocessing) if hugging_face or preprocessing.is_file() else {}
    # beside OpenCLIP weights only our own says more than open_clip_config.json
    if hugging_face or "cir_jax" in stored:
        transform = ImageTransform.from_dict(stored)
    else:
        size = config.vision.image_size
        transform = ImageTransform.from_open_clip(source.config.get("preprocess_cfg", {}), size)
    if transform.crop != config.vision.image_size:
        raise WeightsError(
            f"{preprocessing}: images of {transform.crop} pixels, but the model takes "
            f"{config.vision.image_size}. Correct crop_size (or size)."
        )
    text = config.text
    last = text.vocab_size - 1
    # OpenAI's published configs carry eos 2, which is no token; the end token is the last word
    eos = last if text.eos_token_id == open_clip.ARGMAX else text.eos_token_id
    tokenizer = Tokenizer.from_directory(
        directory,
        context_length=text.max_position_embeddings,
        bos_id=text.bos_token_id,
        eos_id=eos,
        # the tokenizer's own padding token where it names one: the config's is often wrong
        pad_id=eos if hugging_face else 0,
    )
    if tokenizer.vocab_size > text.vocab_size:
        raise WeightsError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{text.vocab_size}. Use the tokenizer that comes with the weights."
        )
    return Backbone(Clip(config, dtype), tokenizer, transform, f"{source.name}@untrained")


def _beside_shapes(config: ClipConfig) -> list[Any]:
    towers: list[Any] = [config.text, config.vision]
    names = ("hidden_act", "num_attention_heads", "layer_norm_eps")
    return [getattr(tower, name, None) for tower in towers for name in names]


def _family(tensors: Mapping[str, Any]) -> str:
    for family, names in _SIGNATURES.items():
        if all(name in tensors for name in names):
            return family
    return f"an unknown model ({', '.join(list(tensors)[:3])} ...)"


def _expected(marker: str) -> str:
    return next(family for family, names in _SIGNATURES.items() if names[0].startswith(marker))
