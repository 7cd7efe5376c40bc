"""BLIP in Hugging Face format and in salesforce's original `.pth` files."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.input import images
from cir_jax.input.text import Tokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.models.bert import BertConfig
from cir_jax.models.blip import Blip, BlipConfig, BlipVisionConfig, interpolate_positions
from cir_jax.weights import beside, configs, convert, families, files, one_by_one, positions
from cir_jax.weights.one_by_one import Shardings

IGNORE = (
    r"(.*\.)?position_ids",  # a constant
    r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..*",  # momentum copies of pre-training
    r"(image|text|idx|ptr)_queue|queue_ptr",  # negatives of the contrastive loss
    r"text_decoder\..*",  # captioning
    r"temp|logit_scale",  # temperature of the contrastive loss
)

_FIELDS = frozenset({"projection_dim", "image_text_hidden_size", "text_config", "vision_config"})

CONTEXT_LENGTH = 35
"""Tokens of a text in salesforce's pre-training and retrieval; the tower itself takes 512."""

TOKENIZER = (
    "It is BERT's: `hf download google-bert/bert-base-uncased tokenizer.json --local-dir {}`."
)

POSITIONS = {
    "huggingface": "vision_model.embeddings.position_embedding",
    "salesforce": "visual_encoder.pos_embed",
}
"""Format -> its name of the image position embeddings, which also tells the formats apart."""


def read(
    source: files.Source,
    dtype: Any,
    params_dtype: Any,
    shardings: Shardings | None = None,
    **sizes: int,
) -> tuple[Backbone, dict[str, Any]]:
    """Backbone and parameters; see `backbones.load`. sizes: the image_size that is asked for."""
    tensors, what = source.tensors(), source.what()
    layout_of(tensors, what)  # of another model: said before anything else is
    config = _config(source, tensors, what)
    backbone = _sized(_backbone(source, config, dtype), **sizes)
    params = unread(tensors, backbone.config, what, params_dtype)
    settings = beside.settings(config, backbone.tokenizer)
    params, weights_id = one_by_one.read(source, params, settings, shardings)
    return dataclasses.replace(backbone, weights_id=weights_id), params


def architecture(source: files.Source, dtype: Any, **sizes: int) -> Backbone:
    """Backbone without its weights, which need not be there unless the config is read off them."""
    tensors = {} if source.kind else source.tensors()
    return _sized(_backbone(source, _config(source, tensors, str(source.file)), dtype), **sizes)


def _sized(backbone: Backbone, image_size: int = 0, context_length: int = 0) -> Backbone:
    if context_length:
        raise WeightsError(
            f"context_length={context_length}: the texts of a BLIP are not stretched; its tower "
            f"takes {backbone.config.text.max_position_embeddings} tokens as it is."
        )
    return positions.for_images(backbone, image_size) if image_size else backbone


def write(path: Path, backbone: Backbone, params: Any, dtype: Any) -> None:
    """See `backbones.save`: a directory for transformers' BlipForImageTextRetrieval."""
    about = {
        files.HUGGING_FACE: backbone.config.to_dict() | {"torch_dtype": np.dtype(dtype).name},
        beside.PREPROCESSING: backbone.image_transform.to_dict(),
    }
    tensors = to_tensors(params, backbone.config)
    beside.write(path, "model.safetensors", tensors, about, backbone.tokenizer, dtype)


def _config(source: files.Source, tensors: Mapping[str, Any], what: str) -> BlipConfig:
    if not source.kind:
        return config_of(tensors, what)
    values, file = source.config, source.directory / source.kind
    configs.check(values, _FIELDS, file)
    for part, tower in (("text_config", BertConfig), ("vision_config", BlipVisionConfig)):
        read = {"projection_dim", *(field.name for field in dataclasses.fields(tower))}
        configs.check(values.get(part) or {}, frozenset(read), f"{file}: {part}")
    config = BlipConfig.from_dict(values)
    projection = tensors.get("vision_proj.weight")  # not believed: configs say 512, 768 and 256
    dim = config.projection_dim if projection is None else len(projection)
    return dataclasses.replace(config, projection_dim=dim)


def _backbone(source: files.Source, config: BlipConfig, dtype: Any) -> Backbone:
    directory, text = source.directory, config.text
    if source.kind:
        transform = beside.image_transform(directory, "blip")
    else:
        transform = images.blip(config.vision.image_size)
    tokenizer = Tokenizer.by_tokens(
        directory,
        context_length=min(CONTEXT_LENGTH, text.max_position_embeddings),
        bos="[CLS]",
        eos="[SEP]",
        pad="[PAD]",
        remedy=TOKENIZER.format(directory),
    )
    if (tokenizer.eos_id, tokenizer.pad_id) != (text.sep_token_id, text.pad_token_id):
        raise WeightsError(
            f"{directory}: the tokenizer's [SEP] and [PAD] are {tokenizer.eos_id} and "
            f"{tokenizer.pad_id}, the model's {text.sep_token_id} and {text.pad_token_id}. "
            + TOKENIZER.format(directory)
        )
    beside.check(directory, tokenizer, transform, config)
    return Backbone(Blip(config, dtype), tokenizer, transform, f"{source.name}@untrained")


def names(config: BlipConfig, layout: str = "huggingface") -> convert.Names:
    """Name table of transformers' BlipForImageTextRetrieval, or of salesforce's files."""
    table = convert.Names()
    norm, linear = table.norm, table.linear

    def attention(source: str, *path: str) -> None:
        for part in ("query", "key", "value"):
            linear(f"{source}.self.{part}", *path, part)
        linear(f"{source}.output.dense", *path, "out")
        norm(f"{source}.output.LayerNorm", *path[:-1], f"{path[-1]}_norm")

    if layout == "huggingface":
        tower, block = "vision_model.", "vision_model.encoder.layers.{}."
        first, positions = "embeddings.class_embedding", "embeddings.position_embedding"
        patch, last = "embeddings.patch_embedding", "post_layernorm"
        fused, out, norms = "self_attn.qkv", "self_attn.projection", "layer_norm"
    else:
        tower, block = "visual_encoder.", "visual_encoder.blocks.{}."
        first, positions = "cls_token", "pos_embed"
        patch, last = "patch_embed.proj", "norm"
        fused, out, norms = "attn.qkv", "attn.proj", "norm"
    table[tower + first] = (("vision", "class_embedding"), "same")
    table[tower + positions] = (("vision", "position_embedding"), "same")
    table[f"{tower}{patch}.weight"] = (("vision", "patch_embedding", "kernel"), "conv")
    table[f"{tower}{patch}.bias"] = (("vision", "patch_bias"), "same")
    norm(tower + last, "vision", "post_norm")
    for i in range(config.vision.num_hidden_layers):
        old, new = block.format(i), ("vision", f"layers_{i}")
        linear(old + fused, *new, "attention", ("query", "key", "value"))
        linear(old + out, *new, "attention", "out")
        for part in ("1", "2"):
            norm(f"{old}{norms}{part}", *new, f"norm{part}")
            linear(f"{old}mlp.fc{part}", *new, f"fc{part}")

    source = "text_encoder.embeddings"
    table[f"{source}.word_embeddings.weight"] = (("text", "token_embedding", "embedding"), "same")
    table[f"{source}.position_embeddings.weight"] = (("text", "position_embedding"), "same")
    norm(f"{source}.LayerNorm", "text", "embedding_norm")
    for i in range(config.text.num_hidden_layers):
        old, new = f"text_encoder.encoder.layer.{i}", ("text", f"layers_{i}")
        attention(f"{old}.attention", *new, "attention")
        attention(f"{old}.crossattention", *new, "cross_attention")
        linear(f"{old}.intermediate.dense", *new, "fc1")
        linear(f"{old}.output.dense", *new, "fc2")
        norm(f"{old}.output.LayerNorm", *new, "norm")
    linear("vision_proj", "visual_projection")
    linear("text_proj", "text_projection")
    linear("itm_head", "match_head")
    return table


def layout_of(tensors: Mapping[str, Any], what: str = "BLIP weights") -> str:
    """ "huggingface" or "salesforce". Raises WeightsError for files that are neither."""
    wanted = (
        "Give a Hugging Face BlipForImageTextRetrieval, or salesforce's model_base.pth, "
        "model_base_capfilt_large.pth, model_large.pth or their retrieval files."
    )
    for layout, name in POSITIONS.items():
        if name not in tensors:
            continue
        if not {"text_encoder.embeddings.word_embeddings.weight", "vision_proj.weight"} <= set(
            tensors
        ):
            raise WeightsError(
                f"{what}: a BLIP without the contrastive text encoder (text_encoder, vision_proj), "
                f"such as those that write captions. {wanted}"
            )
        return layout
    raise WeightsError(
        f"{what}: tensors of {families.describe(tensors)}, expected BLIP ({name} or "
        f"{POSITIONS['huggingface']}). {wanted}"
    )


def config_of(tensors: Mapping[str, np.ndarray], what: str = "BLIP weights") -> BlipConfig:
    """Sizes of a salesforce file, which has no config: read off the tensors.

    What shapes do not tell is the same in all of them: heads of 64, GELU, epsilons 1e-6 and 1e-12.
    """
    if layout_of(tensors, what) != "salesforce":
        raise WeightsError(
            f"{what}: Hugging Face names and no config.json beside it. Copy config.json, "
            "preprocessor_config.json and tokenizer.json from where it comes from."
        )
    width, _, patch, _ = tensors["visual_encoder.patch_embed.proj.weight"].shape
    side = round((tensors[POSITIONS["salesforce"]].shape[1] - 1) ** 0.5)
    words, text_width = tensors["text_encoder.embeddings.word_embeddings.weight"].shape
    fc1, text_fc1 = (
        tensors[name].shape[0]
        for name in (
            "visual_encoder.blocks.0.mlp.fc1.weight",
            "text_encoder.encoder.layer.0.intermediate.dense.weight",
        )
    )
    return BlipConfig(
        text=BertConfig(
            hidden_size=text_width,
            intermediate_size=text_fc1,
            num_hidden_layers=_count(tensors, r"text_encoder\.encoder\.layer\.(\d+)\..*"),
            num_attention_heads=text_width // 64,
            vocab_size=words,
            encoder_hidden_size=width,
            max_position_embeddings=len(
                tensors["text_encoder.embeddings.position_embeddings.weight"]
            ),
            bos_token_id=words - 2,
        ),
        vision=BlipVisionConfig(
            hidden_size=width,
            intermediate_size=fc1,
            num_hidden_layers=_count(tensors, r"visual_encoder\.blocks\.(\d+)\..*"),
            num_attention_heads=width // 64,
            layer_norm_eps=1e-6,
            image_size=side * patch,
            patch_size=patch,
        ),
        projection_dim=tensors["vision_proj.weight"].shape[0],
    )


def to_params(
    tensors: Mapping[str, np.ndarray],
    config: BlipConfig,
    what: str = "BLIP weights",
    dtype: Any = None,
) -> dict[str, Any]:
    """As `unread`, and read. Raises WeightsError for numbers that are none, too."""
    return convert.read(unread(tensors, config, what, dtype))


def unread(
    tensors: Mapping[str, np.ndarray],
    config: BlipConfig,
    what: str,
    dtype: Any,
) -> dict[str, Any]:
    """Parameters of `Blip(config)` from either format, not read yet. Raises WeightsError for what
    does not fit.

    Position embeddings of another image size than the config's are interpolated, as the original
    does when it loads a file. dtype: of the parameters; None = as they are stored.
    """
    layout = layout_of(tensors, what)
    params = convert.unread(tensors, names(config, layout), ignore=IGNORE, what=what, dtype=dtype)
    positions = params["vision"]["position_embedding"]
    side = config.vision.image_size // config.vision.patch_size
    tokens, stored = positions.shape[1], positions.dtype
    if tokens == round((tokens - 1) ** 0.5) ** 2 + 1 != side * side + 1:
        positions = interpolate_positions(jnp.float32(np.asarray(positions)), (side, side))
        params["vision"]["position_embedding"] = np.asarray(positions, stored)
    convert.check_shapes(params, convert.joint_shapes(Blip(config)), what)
    return params


def to_tensors(
    params: Mapping[str, Any], config: BlipConfig, layout: str = "huggingface"
) -> dict[str, np.ndarray]:
    """A state dict for transformers' BlipForImageTextRetrieval, or with salesforce's names."""
    return convert.to_source(jax.device_get(params), names(config, layout))


def resized(config: BlipConfig, image_size: int) -> BlipConfig:
    """The same model for another image size."""
    return dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, image_size=image_size)
    )


def _count(tensors: Mapping[str, Any], pattern: str) -> int:
    found = (re.fullmatch(pattern, name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
