"""CLIP in Hugging Face format: names of its tensors, directory in and directory out."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from cir_jax.errors import WeightsError
from cir_jax.input.images import ImageTransform
from cir_jax.input.text import Tokenizer
from cir_jax.models.backbone import Backbone
from cir_jax.models.clip import Clip, ClipConfig, TowerConfig
from cir_jax.weights import convert

IGNORE = (r"(text|vision)_model\.embeddings\.position_ids",)
REPOSITORY = Path(__file__).resolve().parents[2]


def hf_names(config: ClipConfig) -> dict[str, convert.Target]:
    """Name table of transformers' CLIPModel."""
    names: dict[str, convert.Target] = {
        "logit_scale": (("logit_scale",), "same"),
        "visual_projection.weight": (("visual_projection", "kernel"), "linear"),
        "text_projection.weight": (("text_projection", "kernel"), "linear"),
    }

    def norm(source: str, *path: str) -> None:
        names[f"{source}.weight"] = ((*path, "scale"), "same")
        names[f"{source}.bias"] = ((*path, "bias"), "same")

    def linear(source: str, *path: str) -> None:
        names[f"{source}.weight"] = ((*path, "kernel"), "linear")
        names[f"{source}.bias"] = ((*path, "bias"), "same")

    def layers(source: str, tower: str, tower_config: TowerConfig) -> None:
        for i in range(tower_config.num_hidden_layers):
            old, new = f"{source}.encoder.layers.{i}", f"layers_{i}"
            for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
                linear(f"{old}.self_attn.{theirs}_proj", tower, new, "attention", ours)
            for part in ("fc1", "fc2"):
                linear(f"{old}.mlp.{part}", tower, new, part)
            for part in ("1", "2"):
                norm(f"{old}.layer_norm{part}", tower, new, f"norm{part}")

    text, vision = "text_model", "vision_model"
    names |= {
        f"{text}.embeddings.token_embedding.weight": (
            ("text", "token_embedding", "embedding"),
            "same",
        ),
        f"{text}.embeddings.position_embedding.weight": (("text", "position_embedding"), "same"),
        f"{vision}.embeddings.class_embedding": (("vision", "class_embedding"), "same"),
        f"{vision}.embeddings.patch_embedding.weight": (
            ("vision", "patch_embedding", "kernel"),
            "conv",
        ),
        f"{vision}.embeddings.position_embedding.weight": (
            ("vision", "position_embedding"),
            "same",
        ),
    }
    layers(text, "text", config.text)
    norm(f"{text}.final_layer_norm", "text", "final_norm")
    layers(vision, "vision", config.vision)
    norm(f"{vision}.pre_layrnorm", "vision", "pre_norm")  # spelled so in the original
    norm(f"{vision}.post_layernorm", "vision", "post_norm")
    return names


def resolve(name_or_path: str) -> Path:
    """Directory of a backbone: a path, a path relative to the repository, or a cached hub id.

    Raises WeightsError that says what to download and where to put it.
    """
    for path in (Path(name_or_path).expanduser(), REPOSITORY / name_or_path):
        if (path / "config.json").is_file():
            return path.resolve()
    if name_or_path.count("/") == 1 and not name_or_path.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name_or_path, allow_patterns=["*.json", "*.safetensors"]))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    else:
        reason = "no such directory with a config.json"
    raise WeightsError(
        f"backbone {name_or_path!r}: {reason}. "
        "Give a directory in Hugging Face format (config.json, "
        "model.safetensors, tokenizer.json, preprocessor_config.json), or download one where there "
        f"is a network, `hf download {name_or_path} --local-dir DIR`, and set "
        "--config.backbone=DIR."
    )


def load_architecture(name_or_path: str, dtype: Any = jnp.float32) -> Backbone:
    """Backbone of a Hugging Face directory without its weights (which need not be there)."""
    path = resolve(name_or_path)
    config = ClipConfig.from_dict(_json(path / "config.json"))
    return Backbone(
        model=Clip(config, dtype),
        tokenizer=Tokenizer.from_file(
            path / "tokenizer.json",
            context_length=config.text.max_position_embeddings,
            bos_id=config.text.bos_token_id,
            eos_id=_eos(config),
            pad_id=_pad(path, config),
        ),
        image_transform=ImageTransform.from_dict(_json(path / "preprocessor_config.json")),
        weights_id=f"{path.name}@untrained",
    )


def load(name_or_path: str, dtype: Any = jnp.float32) -> tuple[Backbone, dict[str, Any]]:
    """Backbone and parameters (float32; computes in `dtype`) of a Hugging Face directory.

    Raises WeightsError naming what is missing, unreadable or does not fit.
    """
    path = resolve(name_or_path)
    backbone = load_architecture(name_or_path, dtype)
    file = path / "model.safetensors"
    if not file.is_file():
        raise WeightsError(f"{file} is missing. Copy it from where {path / 'config.json'} is from.")
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors raises its own types
        raise WeightsError(f"{file}: unreadable ({error}). Download or copy it again.") from error
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    params = convert.to_ours(tensors, hf_names(backbone.config), ignore=IGNORE, what=str(file))
    convert.check_shapes(params, jax.eval_shape(backbone.init, jax.random.key(0)), str(file))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return dataclasses.replace(backbone, weights_id=f"{path.name}@{digest}"), params


def save(
    path: Path,
    backbone: Backbone,
    params: Any,
    dtype: Any = np.float32,
) -> None:
    """Writes a Hugging Face directory, whole or not at all; PyTorch's transformers loads it.

    dtype: of the stored tensors; float16 halves the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = backbone.config
    tensors = convert.to_source(jax.device_get(params), hf_names(config))
    tensors = {name: np.ascontiguousarray(array, dtype) for name, array in tensors.items()}
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        values = config.to_dict() | {"torch_dtype": np.dtype(dtype).name}
        files = {
            "config.json": values,
            "preprocessor_config.json": backbone.image_transform.to_dict(),
            "tokenizer_config.json": backbone.tokenizer.to_dict(),
        }
        for name, content in files.items():
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n")
        backbone.tokenizer.save(scratch / "tokenizer.json")
        os.chmod(scratch, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise WeightsError(
            f"{file} is missing: it belongs to the weights. Copy it from where they come from."
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"{file}: not valid JSON ({error}). Download or copy it again."
        ) from error


def _eos(config: ClipConfig) -> int:
    # OpenAI's published configs carry eos 2, which is no token; the end token is the last word
    eos = config.text.eos_token_id
    return config.text.vocab_size - 1 if eos == 2 else eos


def _pad(path: Path, config: ClipConfig) -> int:
    # the tokenizer's own padding token where it names one: the config's is often wrong
    file = path / "tokenizer_config.json"
    token = _json(file).get("pad_token") if file.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return _eos(config)
    import tokenizers

    found = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id(token)
    return _eos(config) if found is None else found
