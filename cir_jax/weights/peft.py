"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT names each adapted module as its PyTorch model does, so `PeftModel.from_pretrained(model, DIR)`
puts a saved adapter onto transformers' CLIPModel, BlipForImageTextRetrieval or T5EncoderModel, or
onto timm's encoder. Where PyTorch keeps query, key and value in one matrix (BLIP), their adapters
become one whose rank is the sum of theirs; its effect is the same.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from cir_jax.errors import WeightsError
from cir_jax.models import lora
from cir_jax.models.backbone import Backbone, Pair
from cir_jax.models.encoders import ImageEncoder, TextEncoder
from cir_jax.models.lora import LoraConfig
from cir_jax.models.resnet import ResNetConfig
from cir_jax.weights import blip, clip, convert, files, open_clip, t5, timm

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

_TENSOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
_PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False}
"""Settings of PEFT with another mathematics, and the value that has not."""

Owner = Backbone | TextEncoder | ImageEncoder


def save_adapter(path: Path, adapter: Mapping[str, Any], config: LoraConfig, owner: Owner) -> None:
    """Writes the directory `path`, whole or not at all.

    owner: the backbone or encoder whose parameters are adapted ("params" of a light encoder).
    Raises WeightsError for kernels that are no module of their own in the PyTorch model.
    """
    pairs = {name: _host(pair) for name, pair in lora.pairs(adapter).items()}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module, (parts, shape) in _modules(owner).items():
        if not any(part in pairs for part in parts):
            continue
        outputs = shape[-1]
        chosen = [(i, *pairs.pop(part)) for i, part in enumerate(parts) if part in pairs]
        # [rank, inputs], [parts * outputs, rank]: each part has its own columns
        down = np.concatenate([a.T for _, a, _ in chosen])
        up = np.zeros((len(parts) * outputs, len(down)), np.float32)
        column = 0
        for i, _, b in chosen:
            up[i * outputs : (i + 1) * outputs, column : column + len(b)] = b.T
            column += len(b)
        if len(shape) == 4:  # [rank, h * w * in] -> [rank, in, h, w]
            down = down.reshape(-1, *shape[:3]).transpose(0, 3, 1, 2)
            up = up[:, :, None, None]
        ranks[module] = len(down)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(down)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(up)
    if pairs:
        raise WeightsError(
            f"LoRA adapter: {', '.join(sorted(pairs)[:3])} is no module of its own in the PyTorch "
            "model, so PEFT cannot adapt it. Save the merged parameters (`weights.save`)."
        )
    other = {module: rank for module, rank in ranks.items() if rank != config.rank}
    about = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": owner.weights_id.partition("@")[0],
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        # the same scale, alpha / rank, for all
        "alpha_pattern": {module: config.scale * rank for module, rank in other.items()},
        "use_rslora": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **_PLAIN,
    }
    with files.new_directory(Path(path)) as scratch:
        save_file(tensors, scratch / TENSORS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def load_adapter(path: str | Path, owner: Owner) -> tuple[dict[str, Any], LoraConfig]:
    """The adapter in the directory `path`, for `lora.merge(params, adapter, config.scale)`.

    Raises WeightsError when it is no LoRA of PEFT, or not of this model.
    """
    path = Path(path)
    about = files.read_json(path / CONFIG)
    foreign = {k: about[k] for k, plain in _PLAIN.items() if about.get(k, plain) not in (plain, [])}
    if about.get("peft_type") != "LORA" or foreign:
        raise WeightsError(
            f"{path / CONFIG}: peft_type {about.get('peft_type')!r} {foreign or ''}: expected a "
            "plain 'LORA'. Merge it in PyTorch (merge_and_unload) and load the whole model."
        )
    file = path / TENSORS
    tensors = dict(files.read_tensors(file if file.is_file() else file.with_suffix(".bin")))
    modules, halves = _modules(owner), {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or match[1] not in modules:
            raise WeightsError(
                f"{path}: {name} is for no module of {owner.weights_id}. Use the model the adapter "
                f"was trained on ({about.get('base_model_name_or_path')})."
            )
        half = np.asarray(convert.finite(tensor, name, str(path)), np.float32)
        halves.setdefault(match[1], {})[match[2]] = half
    rank, alpha = about["r"], float(about["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)
    flat: dict[str, np.ndarray] = {}
    for module, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise WeightsError(f"{path}: only lora_{''.join(pair)} of {module}. Copy it again.")
        parts, shape = modules[module]
        down, up = pair["A"], pair["B"].reshape(pair["B"].shape[:2])
        if len(shape) == 4:
            down = down.transpose(0, 2, 3, 1).reshape(len(down), -1)
        if down.shape[1] != math.prod(shape[:-1]) or len(up) != len(parts) * shape[-1]:
            raise WeightsError(
                f"{path}: {module} adapts {down.shape[1]} -> {len(up)}, but the model has "
                f"{math.prod(shape[:-1])} -> {len(parts) * shape[-1]} there. Use the model the "
                f"adapter was trained on ({about.get('base_model_name_or_path')})."
            )
        own = _own_scale(about, module, len(down)) / scale
        for i, part in enumerate(parts):
            b = up[i * shape[-1] : (i + 1) * shape[-1]].T * own
            used = b.any(axis=1) if len(parts) > 1 and up.any() else np.ones(len(b), bool)
            if used.any():  # of a fused matrix, some parts may not be adapted
                flat[f"{part}/a"], flat[f"{part}/b"] = down.T[:, used], b[used]
    names = sorted(name.removesuffix("/a") for name in flat if name.endswith("/a"))
    config = LoraConfig(
        "|".join(map(re.escape, names)), rank, scale * rank, about.get("lora_dropout", 0.0)
    )
    return unflatten_dict(flat, sep="/"), config


def _own_scale(about: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank of one module; patterns are regular expressions for the end of its name."""
    alpha = about["lora_alpha"]
    for pattern, value in (about.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)


def _modules(owner: Owner) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """PyTorch module -> (our kernels in it, in their order; the shape of one of them)."""
    model = owner.model
    if isinstance(owner, Pair):
        raise WeightsError(
            f"backbone {owner.weights_id}: two models in one. Give the one that is adapted."
        )
    if isinstance(owner, ImageEncoder):
        table, shapes = timm.names(model), timm.shapes(model)
    elif isinstance(owner, TextEncoder):
        table, shapes = t5.names(model.config), t5.shapes(model)
    else:
        shapes = jax.eval_shape(owner.init, jax.random.key(0))
        if owner.family == "blip":
            table = blip.names(model.config)
        elif isinstance(model.config.vision, ResNetConfig):
            table = open_clip.names(model.config)
        else:
            table = clip.hf_names(model.config)
    flat, modules = convert.flatten(shapes), {}
    for name, (path, layout) in table.items():
        paths = convert.expand(path)
        shape = flat[paths[0]].shape
        grouped = len(shape) == 4 and shape[2] == 1 != shape[3]
        if name.endswith(".weight") and layout in ("linear", "conv") and not grouped:
            ours = ["/".join(one).removeprefix("params/") for one in paths]
            modules[name.removesuffix(".weight")] = (ours, shape)
    return modules


def _host(pair: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(jax.device_get(half), np.float32) for half in pair)
    return a, b
