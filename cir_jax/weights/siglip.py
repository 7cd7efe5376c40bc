"""SigLIP, and SigLIP 2 of fixed resolution, in Hugging Face format."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.input import sentencepiece
from cir_jax.input.siglip_text import SiglipTokenizer
from cir_jax.input.text import read_tokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.models.siglip import Siglip, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from cir_jax.weights import beside, configs, convert, families, files, one_by_one, positions
from cir_jax.weights.clip import IGNORE, hf_layers
from cir_jax.weights.one_by_one import Shardings

ENDS = ("eos", "pad")

SCALARS = ("logit_scale", "logit_bias")
"""Tensors of one number in the files, scalars here."""

TOKENIZER = (
    "It is spiece.model of SigLIP, tokenizer.json of SigLIP 2: `hf download HUB_ID FILE "
    "--local-dir {}` with the hub id and the file of these weights."
)


def read(
    source: files.Source,
    dtype: Any,
    params_dtype: Any,
    shardings: Shardings | None = None,
    **sizes: int,
) -> tuple[Backbone, dict[str, Any]]:
    """Backbone and parameters; see `backbones.load`. sizes: the image_size that is asked for."""
    tensors, what = source.tensors(), source.what()
    if families.family(tensors) != "siglip":
        raise WeightsError(
            f"{what}: tensors of {families.describe(tensors)}, expected SigLIP with both towers."
        )
    own = architecture(source, dtype)
    params = unread(tensors, own.config, what, params_dtype)
    backbone = _sized(own, **sizes)
    if backbone is not own:
        vision = backbone.config.vision
        side = vision.image_size // vision.patch_size
        table = params["vision"]["position_embedding"]
        params["vision"]["position_embedding"] = positions.on_grid(
            np.asarray(table), side, first=False
        )
    settings = beside.settings(backbone.config, backbone.tokenizer)
    params, weights_id = one_by_one.read(source, params, settings, shardings)
    return dataclasses.replace(backbone, weights_id=weights_id), params


def architecture(source: files.Source, dtype: Any, **sizes: int) -> Backbone:
    """Backbone without its weights, which need not be there."""
    directory = source.directory
    if not source.kind:
        raise WeightsError(
            f"{source.file}: SigLIP and no config.json beside it. Copy config.json, "
            "preprocessor_config.json and the tokenizer from where it comes from."
        )
    config = _config(source)
    transform = beside.image_transform(directory, "siglip")
    tokenizer = read_siglip_tokenizer(directory, config.text.max_position_embeddings)
    beside.check(directory, tokenizer, transform, config)
    backbone = Backbone(Siglip(config, dtype), tokenizer, transform, f"{source.name}@untrained")
    return _sized(backbone, **sizes)


def _sized(backbone: Backbone, image_size: int = 0, context_length: int = 0) -> Backbone:
    if context_length:
        raise WeightsError(
            f"context_length={context_length}: the texts of a SigLIP are always "
            f"{backbone.context_length} tokens long, as in training."
        )
    same = image_size in (0, backbone.config.vision.image_size)
    return backbone if same else positions.for_images(backbone, image_size)


def write(path: Path, backbone: Backbone, params: Any, dtype: Any) -> None:
    """See `backbones.save`: a directory for transformers' SiglipModel and SiglipProcessor."""
    config, tokenizer = backbone.config.to_dict(), backbone.tokenizer
    ends = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    config["text_config"] |= {"bos_token_id": None, **ends}
    about = {
        files.HUGGING_FACE: config | {"torch_dtype": np.dtype(dtype).name},
        beside.PREPROCESSING: backbone.image_transform.to_dict(),
    }
    tensors = to_tensors(params, backbone.config)
    beside.write(path, "model.safetensors", tensors, about, tokenizer, dtype)


def _config(source: files.Source) -> SiglipConfig:
    values, file = source.config, source.directory / source.kind
    towers = {"text_config": SiglipTextConfig, "vision_config": SiglipVisionConfig}
    configs.check(values, frozenset(towers), file)
    for part, tower in towers.items():
        read = {"vision_use_head", *(field.name for field in dataclasses.fields(tower))}
        configs.check(values.get(part) or {}, frozenset(read), f"{file}: {part}")
    return SiglipConfig.from_dict(values)


def read_siglip_tokenizer(directory: Path, positions: int) -> SiglipTokenizer:
    """The tokenizer beside the weights. positions: of the text tower.

    Raises WeightsError when there is none, it is another model's, or pads in front.
    """
    about = directory / "tokenizer_config.json"
    settings = files.read_json(about) if about.is_file() else {}
    if (side := settings.get("padding_side", "right")) != "right":
        raise WeightsError(
            f"{about}: padding_side {side!r}: SigLIP was trained on texts padded on the right, and "
            "reads the padding. Set padding_side to 'right'."
        )
    file, content = directory / "spiece.model", b""
    if file.is_file():
        tokenizer, content = sentencepiece.read(file, extra_ids=0), file.read_bytes()
    else:
        file = directory / "tokenizer.json"
        tokenizer = read_tokenizer(file, TOKENIZER.format(directory))
    canonical = tokenizer.token_to_id("<eos>") is None
    usual = ("</s>", "</s>") if canonical else ("<eos>", "<pad>")
    ends = [
        _token(settings.get(f"{name}_token")) or own for name, own in zip(ENDS, usual, strict=True)
    ]
    ids = dict(zip(ENDS, map(tokenizer.token_to_id, ends), strict=True))
    if None in ids.values():
        raise WeightsError(
            f"{file}: no token {' or '.join(dict.fromkeys(ends))}, so it belongs to another model. "
            + TOKENIZER.format(directory)
        )
    return SiglipTokenizer(
        tokenizer,
        # as padding="max_length" does: the tokenizer's own length, where it has one
        context_length=min(positions, int(settings.get("model_max_length") or positions)),
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        canonical=canonical,
        lower=settings.get("do_lower_case", True),
        model=content,
    )


def _token(value: Any) -> str | None:
    """A token of tokenizer_config.json, which some write as a dictionary."""
    return value.get("content") if isinstance(value, Mapping) else value


def names(config: SiglipConfig) -> convert.Names:
    """Name table of transformers' SiglipModel."""
    text, vision, head = "text_model", "vision_model", "vision_model.head"
    parts = ("vision", "pool", "pool_attention", ("query", "key", "value"))
    table = convert.Names(
        {
            **{name: ((name,), "same") for name in SCALARS},
            f"{text}.embeddings.token_embedding.weight": (
                ("text", "token_embedding", "embedding"),
                "same",
            ),
            f"{vision}.embeddings.patch_embedding.weight": (
                ("vision", "patch_embedding", "kernel"),
                "conv",
            ),
            f"{vision}.embeddings.patch_embedding.bias": (("vision", "patch_bias"), "same"),
            f"{head}.probe": (("vision", "pool", "probe"), "same"),
            f"{head}.attention.in_proj_weight": ((*parts, "kernel"), "linear"),
            f"{head}.attention.in_proj_bias": ((*parts, "bias"), "same"),
        }
    )
    for source, tower, its in ((text, "text", config.text), (vision, "vision", config.vision)):
        positions = f"{source}.embeddings.position_embedding.weight"
        table[positions] = ((tower, "position_embedding"), "same")
        hf_layers(table, source, tower, its)
    table.norm(f"{text}.final_layer_norm", "text", "final_norm")
    table.linear(f"{text}.head", "text_projection")
    table.norm(f"{vision}.post_layernorm", "vision", "post_norm")
    table.linear(f"{head}.attention.out_proj", "vision", "pool", "pool_attention", "out")
    table.norm(f"{head}.layernorm", "vision", "pool", "norm")
    for part in ("fc1", "fc2"):
        table.linear(f"{head}.mlp.{part}", "vision", "pool", part)
    return table


def to_params(
    tensors: Mapping[str, np.ndarray],
    config: SiglipConfig,
    what: str = "SigLIP weights",
    dtype: Any = None,
) -> dict[str, Any]:
    """As `unread`, and read. Raises WeightsError for numbers that are none, too."""
    return convert.read(unread(tensors, config, what, dtype))


def unread(
    tensors: Mapping[str, np.ndarray],
    config: SiglipConfig,
    what: str,
    dtype: Any,
) -> dict[str, Any]:
    """Parameters of `Siglip(config)`, not read yet. Raises WeightsError for what
    does not fit.

    dtype: of the parameters; None = as they are stored.
    """
    params = convert.unread(tensors, names(config), ignore=IGNORE, what=what, dtype=dtype)
    for name in SCALARS:
        if params[name].shape == (1,):
            params[name] = np.asarray(params[name]).reshape(())
    convert.check_shapes(params, convert.joint_shapes(Siglip(config)), what)
    return params


def to_tensors(params: Mapping[str, Any], config: SiglipConfig) -> dict[str, np.ndarray]:
    """A state dict for transformers' SiglipModel."""
    tensors = convert.to_source(jax.device_get(params), names(config))
    return tensors | {name: tensors[name].reshape(1) for name in SCALARS}
