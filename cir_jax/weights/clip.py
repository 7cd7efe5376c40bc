"""CLIP in any of its formats: Hugging Face, OpenCLIP, OpenAI."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.input import images
from cir_jax.input.images import ImageTransform
from cir_jax.input.text import Tokenizer
from cir_jax.models.backbone import TOWERS, Backbone
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from cir_jax.models.resnet import ResNetConfig
from cir_jax.models.transformer import TowerConfig
from cir_jax.weights import (
    beside,
    configs,
    convert,
    families,
    files,
    lazy,
    one_by_one,
    open_clip,
    positions,
)
from cir_jax.weights.one_by_one import Shardings

IGNORE = (r"(text|vision)_model\.embeddings\.position_ids",)

TOWER_TYPES = {"image": "clip_vision_model", "text": "clip_text_model"}
"""Half of a pair -> the model_type of a directory that holds this tower alone."""

_PREFIXES = {"image": "vision", "text": "text"}
_PROJECTIONS = {
    "": ("visual_projection.weight", "text_projection.weight"),
    "image": ("visual_projection.weight",),
    "text": (),
}
"""Half -> tensors of the joint dimension; the text half of a pair has none."""

_SCALE = "logit_scale"


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

    embeddings, patches = f"{vision}.embeddings", ("vision", "patch_embedding", "kernel")
    words = ("text", "token_embedding", "embedding")
    table |= {
        f"{text}.embeddings.token_embedding.weight": (words, "same"),
        f"{text}.embeddings.position_embedding.weight": (("text", "position_embedding"), "same"),
        f"{embeddings}.class_embedding": (("vision", "class_embedding"), "same"),
        f"{embeddings}.position_embedding.weight": (("vision", "position_embedding"), "same"),
        f"{embeddings}.patch_embedding.weight": (patches, "conv"),
    }
    hf_layers(table, text, "text", config.text)
    table.norm(f"{text}.final_layer_norm", "text", "final_norm")
    hf_layers(table, vision, "vision", config.vision)
    table.norm(f"{vision}.pre_layrnorm", "vision", "pre_norm")  # spelled so in the original
    table.norm(f"{vision}.post_layernorm", "vision", "post_norm")
    return table


def hf_layers(table: convert.Names, source: str, tower: str, config: TowerConfig) -> None:
    """Adds the blocks of a tower, as transformers names them in CLIP and SigLIP."""
    for i in range(config.num_hidden_layers):
        old, new = f"{source}.encoder.layers.{i}", f"layers_{i}"
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            table.linear(f"{old}.self_attn.{theirs}_proj", tower, new, "attention", ours)
        for part in ("fc1", "fc2"):
            table.linear(f"{old}.mlp.{part}", tower, new, part)
        for part in ("1", "2"):
            table.norm(f"{old}.layer_norm{part}", tower, new, f"norm{part}")


def read(
    source: files.Source,
    dtype: Any,
    params_dtype: Any,
    half: str = "",
    *,
    shardings: Shardings | None = None,
    **sizes: int | None,
) -> tuple[Backbone, dict[str, Any]]:
    """Backbone and parameters; see `backbones.load`.

    half: "image" or "text", where only the parameters of `backbone.TOWERS` are wanted; then other
    tensors are not read, and the directory may hold that tower alone. sizes: image_size and
    context_length, of `positions.resized`.
    """
    tensors, what = _tensors(source), source.what()
    config, openai = _config(source, tensors, what, half)
    if source.kind == files.HUGGING_FACE and not openai:
        table, ignore = hf_names(config), IGNORE
        marker = "vision_model." if source.model_type == TOWER_TYPES["image"] else "text_model."
        expected = "CLIP (Hugging Face names)"
    else:
        table, ignore, marker = open_clip.names(config), open_clip.IGNORE, "token_embedding."
        expected = "CLIP (OpenAI or OpenCLIP names)"
    if not any(name.startswith(marker) for name in tensors):
        named = ", ".join(source.config.get("architectures") or ["no architecture"])
        raise WeightsError(
            f"{what}: tensors of {families.describe(tensors)} (the config says {named}), expected "
            f"{expected}."
        )
    tensors = open_clip.folded(tensors)
    if openai:
        ignore = (*ignore, *open_clip.OPENAI_CONSTANTS)
    backbone = _backbone(source, config, dtype, openai, half)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0))
    if half:
        other = {name for name, (path, _) in table.items() if path[0] not in TOWERS[half]}
        table = {name: target for name, target in table.items() if name not in other}
        tensors = files.without(tensors, other)
        shapes = {name: tree for name, tree in shapes.items() if name in TOWERS[half]}
    if alone := source.model_type in TOWER_TYPES.values():
        del table[_SCALE], shapes[_SCALE]
    params = convert.unread(tensors, table, ignore=ignore, what=what, dtype=params_dtype)
    positions.check(params, config, what)
    convert.check_shapes(params, shapes, what)
    antialias = source.kind == files.OPEN_CLIP  # as open_clip's force_image_size
    backbone, params = positions.resized(backbone, params, antialias=antialias, **sizes)
    if alone:  # a parameter of the whole model, which no half of a pair uses
        params[_SCALE] = np.float32(config.logit_scale_init_value)
    settings = beside.settings(config, backbone.tokenizer)
    params, weights_id = one_by_one.read(source, params, settings, shardings)
    return dataclasses.replace(backbone, weights_id=weights_id), params


def _tensors(source: files.Source) -> Mapping[str, np.ndarray]:
    """Tensors under the names they have in a whole model whose towers lie side by side.

    transformers 5 leaves the prefix out where a tower alone has no projection.
    """
    tensors = open_clip.plain(source.tensors())
    prefix = {TOWER_TYPES[half]: f"{name}_model." for half, name in _PREFIXES.items()}
    front = prefix.get(source.model_type)
    if front is None or not any(name.startswith("embeddings.") for name in tensors):
        return tensors
    return files.renamed(tensors, lambda name: front + name)


def architecture(source: files.Source, dtype: Any, half: str = "", **sizes: int | None) -> Backbone:
    """Backbone without its weights, which need not be there unless the config is read off them."""
    tensors = {} if source.kind else _tensors(source)
    config, openai = _config(source, tensors, str(source.file or source.directory), half)
    return positions.resized(_backbone(source, config, dtype, openai, half), {}, **sizes)[0]


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
    source: files.Source, tensors: Mapping[str, np.ndarray], what: str, half: str
) -> tuple[ClipConfig, bool]:
    """The config, and whether the weights are OpenAI's own, or Long-CLIP's."""
    openai = set(open_clip.OPENAI_CONSTANTS) <= set(tensors) or open_clip.is_long_clip(tensors)
    if openai or not source.kind:
        if not {"token_embedding.weight", "visual.conv1.weight"} <= set(tensors):
            raise WeightsError(
                f"{what}: tensors of {families.describe(tensors)} and no config beside them. "
                "Expected an OpenAI CLIP file, or the directory of a model with its config."
            )
        config = open_clip.from_shapes({n: lazy.stored(tensors, n).shape for n in tensors})
        if not openai:
            raise WeightsError(
                f"{what}: no config beside it says which activation it was trained with. Write "
                f"{source.directory / files.OPEN_CLIP} with this content, quick_gelu true for "
                "models that started from OpenAI's, false for most others, and check the rest: "
                + json.dumps({"model_cfg": open_clip.to_open_clip(config)})
            )
        return config, openai
    if source.kind == files.HUGGING_FACE:
        return _hugging_face(source, tensors, half), openai
    try:
        file = str(source.directory / source.kind)
        return open_clip.from_open_clip(source.config["model_cfg"], file), openai
    except KeyError as error:
        raise WeightsError(
            f"{source.directory / source.kind}: no field {error}. Download or copy it again."
        ) from error


def _hugging_face(source: files.Source, tensors: Mapping[str, np.ndarray], half: str) -> ClipConfig:
    values, file = source.config, source.directory / source.kind
    towers = {"text": TextConfig, "image": VisionConfig}
    if source.model_type in TOWER_TYPES.values():
        configs.check(values, _fields(towers[half]), file)
        # the tower that is not there is traced and never run: one layer will do
        parts = {_PREFIXES[each]: tower(num_hidden_layers=1) for each, tower in towers.items()}
        config = ClipConfig(**parts | {_PREFIXES[half]: towers[half].from_dict(values)})
    else:
        parts = {f"{_PREFIXES[half]}_config": tower for half, tower in towers.items()}
        configs.check(
            values, frozenset({"projection_dim", *parts, *(f"{p}_dict" for p in parts)}), file
        )
        for part, tower in parts.items():
            for name in (part, f"{part}_dict"):
                configs.check(values.get(name) or {}, _fields(tower), f"{file}: {name}")
        config = ClipConfig.from_dict(values)
    # configs say it in four places, and some of them are wrong
    dims = {lazy.stored(tensors, n).shape[0] for n in _PROJECTIONS[half] if n in tensors}
    return dataclasses.replace(config, projection_dim=dims.pop()) if len(dims) == 1 else config


def _fields(tower: type[TowerConfig]) -> frozenset[str]:
    return frozenset({"projection_dim", *(field.name for field in dataclasses.fields(tower))})


def _backbone(
    source: files.Source, config: ClipConfig, dtype: Any, openai: bool, half: str
) -> Backbone:
    """half: whose tokenizer or preprocessing alone must be there."""
    directory = source.directory
    hugging_face = source.kind == files.HUGGING_FACE and not openai
    if half == "text":
        transform = images.clip(config.vision.image_size)  # not used
    else:
        transform = _transform(source, config, hugging_face)
    tokenizer = None
    if half != "image":
        tokenizer = _tokenizer(source, config.text, openai)
        text = config.text
        tokens = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        largest = tokenizer.eos_id == text.vocab_size - 1
        if text.eos_token_id == open_clip.ARGMAX and (hugging_face or largest):
            del tokens["eos"]
        text = dataclasses.replace(text, **{f"{name}_token_id": i for name, i in tokens.items()})
        config = dataclasses.replace(config, text=text)
    beside.check(directory, tokenizer, transform, config)
    return Backbone(Clip(config, dtype), tokenizer, transform, f"{source.name}@untrained")


def _tokenizer(source: files.Source, text: TextConfig, openai: bool) -> Tokenizer:
    directory = beside.directory_of(source.directory, "text_encoder", "tokenizer")
    if source.kind == files.OPEN_CLIP and not openai:
        what, stored = str(source.directory / source.kind), source.config["model_cfg"]["text_cfg"]
        return open_clip.read_tokenizer(directory, stored, text, what)
    return Tokenizer.from_directory(
        directory,
        context_length=text.max_position_embeddings,
        # OpenAI's tokenizer has no padding, and fills up with zeros
        pad_id=None if source.kind == files.HUGGING_FACE and not openai else 0,
    )


def _transform(source: files.Source, config: ClipConfig, hugging_face: bool) -> ImageTransform:
    directory = beside.directory_of(source.directory, "image_encoder", "feature_extractor")
    # beside OpenCLIP weights only our own says more than open_clip_config.json
    ours = (directory / beside.PREPROCESSING).is_file() and "cir_jax" in beside.preprocessing(
        directory
    )[1]
    if hugging_face or ours:
        return beside.image_transform(directory, "clip")
    size, what = config.vision.image_size, source.directory / files.OPEN_CLIP
    return ImageTransform.from_open_clip(source.config.get("preprocess_cfg", {}), size, what)
