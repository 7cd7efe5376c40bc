"""The way in for encoders that are no backbone: T5 and timm's light image encoders."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from cir_jax.errors import WeightsError
from cir_jax.input.images import ImageTransform
from cir_jax.input.text import Tokenizer
from cir_jax.models import light
from cir_jax.models.encoders import ImageEncoder, TextEncoder
from cir_jax.models.t5 import T5Config, T5Encoder
from cir_jax.weights import beside, configs, families, files, one_by_one, t5, timm
from cir_jax.weights.one_by_one import Shardings


def load_encoder(
    name_or_path: str | Path,
    architecture: str = "",
    dtype: Any = jnp.float32,
    *,
    params_dtype: Any = jnp.float32,
) -> tuple[TextEncoder | ImageEncoder, dict[str, Any]]:
    """A T5 encoder and its params, or a light image encoder and its {params, batch_stats}.

    name_or_path: a directory or hub id in Hugging Face format (T5, timm), timm's name of a light
        encoder ("mobilenetv2_100", then "timm/mobilenetv2_100.ra_in1k" on the hub), or a file.
    architecture: timm's name, for a file with no config.json beside it.
    dtype, params_dtype: as for `load`; batch statistics count as parameters.
    Raises WeightsError naming what is missing, unreadable, another model's, or does not fit.
    """
    given = str(name_or_path)
    if not any(path.exists() for path in files.places(given)):
        given = timm.hub_id(given)
    source = files.find(given, "encoder")
    if source.model_type == "t5" and not architecture:
        return load_t5(source, dtype, params_dtype)
    if source.model_type == "timm" or architecture:
        return _light(source, architecture, dtype, params_dtype)
    if not source.kind:
        found = families.describe(source.tensors())
        raise WeightsError(
            f"{source.file}: tensors of {found}, and no config.json beside it. Give timm's name "
            'of a light encoder, load_encoder(FILE, "mobilenetv2_100"), or T5\'s whole directory.'
        )
    raise WeightsError(
        f"{source.directory / source.kind}: model_type {source.model_type!r}, expected 't5' or "
        "timm's config. CLIP, BLIP and SigLIP are backbones: `weights.load`."
    )


def untrained(name: str, dtype: Any = jnp.float32) -> ImageEncoder:
    """The light encoder `name` (timm's, or ours) without weights: `model.init` makes some.

    Raises ConfigError for an unknown name.
    """
    transform = timm.image_transform(name, {})
    model = light.create(name, dtype, **_sizes(name, transform))
    return ImageEncoder(model, transform, f"{name}@untrained")


def t5_architecture(source: files.Source, dtype: Any = jnp.float32) -> tuple[T5Encoder, Tokenizer]:
    """A T5 without its weights. Raises WeightsError as `load_encoder`."""
    configs.check(source.config, t5.FIELDS, source.directory / source.kind)
    config = T5Config.from_dict(source.config)
    tokenizer = Tokenizer.by_tokens(
        beside.directory_of(source.directory, "text_encoder", "tokenizer"),
        context_length=t5.CONTEXT_LENGTH,
        bos=None,
        eos="</s>",
        pad="<pad>",
        remedy=t5.TOKENIZER.format(source.directory),
    )
    if tokenizer.vocab_size > config.vocab_size:
        raise WeightsError(
            f"{source.directory}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.vocab_size}. Use the tokenizer that comes with the weights."
        )
    return T5Encoder(config, dtype), tokenizer


def load_t5(
    source: files.Source, dtype: Any, params_dtype: Any, shardings: Shardings | None = None
) -> tuple[TextEncoder, dict[str, Any]]:
    """As `load_encoder`, of a T5's source. shardings: see `backbones.load`."""
    model, tokenizer = t5_architecture(source, dtype)
    config = model.config
    params = t5.unread(source.tensors(), config, source.what(), params_dtype)
    about = (
        *(config.dense_act_fn, config.is_gated_act, config.num_heads, config.layer_norm_epsilon),
        tokenizer.identity,
    )
    params, weights_id = one_by_one.read(source, params, about, shardings)
    return TextEncoder(model, tokenizer, weights_id), params


def _light(
    source: files.Source, architecture: str, dtype: Any, params_dtype: Any
) -> tuple[ImageEncoder, dict[str, Any]]:
    config = source.config if source.model_type == "timm" else {}
    # a tag ("mobilenetv2_100.ra_in1k") says what it was trained on
    name = (architecture or config["architecture"]).partition(".")[0]
    transform = timm.image_transform(name, config.get("pretrained_cfg", {}))
    model = light.create(name, dtype, **_sizes(name, transform))
    variables = timm.to_variables(source.tensors(), model, source.what(), params_dtype)
    weights_id = files.content_id(source.name, variables, name)
    return ImageEncoder(model, transform, weights_id), variables


def _sizes(name: str, transform: ImageTransform) -> dict[str, int]:
    """Fields of the config that depend on the images."""
    return {"image_size": transform.crop} if name.startswith("efficientvit") else {}
