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
from cir_jax.storage.atomic import new_directory
from cir_jax.weights import blip, clip, convert, files, open_clip, siglip, t5, timm

PREFIX = "base_model.model."
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

_TENSOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.(?:([^.]+)\.)?weight")
"""Module, half, and the adapter's name where a whole state dict was saved."""

_PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False}
"""Settings of PEFT with another mathematics, and the value that has not."""

_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_READ += ("lora_dropout", "init_lora_weights", "auto_mapping", "base_model_name_or_path")

_INERT = (
    # which model and modules: the tensors' names say it
    *("revision", "task_type", "peft_version", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    # how it was made or runs there; or of use only beside a setting that is refused
    *("inference_mode", "runtime_config", "megatron_core", "qalora_group_size"),
    *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
)
"""Settings that do not change what an adapter computes. Any other that is set is refused."""

_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base weights alone."""

_CONVERTED = re.compile("pissa(_niter_.*)?|corda|olora|lora_ga")
"""Those that take the adapter's start out of the base weights; PEFT can put it back."""

MERGE = "merge it in PyTorch (merge_and_unload), save the whole model and load that"

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
    with new_directory(Path(path)) as scratch:
        save_file(tensors, scratch / TENSORS, metadata={"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def load_adapter(path: str | Path, owner: Owner) -> tuple[dict[str, Any], LoraConfig]:
    """The adapter in the directory `path`, for `lora.merge(params, adapter, config.scale)`.

    It may have been made on the whole model or on one of its towers. Raises WeightsError when it
    is no LoRA of PEFT, not of this model, or has settings that `merge` does not honour: anything
    but alpha / r * B A on linear layers and convolutions, or an initialisation that changed the
    base weights (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ).
    """
    path = Path(path)
    about = files.read_json(path / CONFIG)
    _check(path / CONFIG, about)
    halves, modules = _halves(path, about), _modules(owner)
    tower = _tower(path, about, halves, modules)
    rank = about["r"]
    scale = _scale(about, about["lora_alpha"], rank)
    flat: dict[str, np.ndarray] = {}
    for module, pair in halves.items():
        if tower + module not in modules:
            raise WeightsError(
                f"{path}: {module} is for no module of {owner.weights_id} that an adapter can be "
                f"loaded for. Use the model it was trained on "
                f"({about.get('base_model_name_or_path')})."
            )
        parts, shape = modules[tower + module]
        if not _fits(pair, parts, shape):
            raise WeightsError(
                f"{path}: {module} adapts {_sizes(pair)}, but the model has "
                f"{math.prod(shape[:-1])} -> {len(parts) * shape[-1]} there. Use the model the "
                f"adapter was trained on ({about.get('base_model_name_or_path')})."
            )
        down, up = pair["A"], pair["B"].reshape(pair["B"].shape[:2])
        if len(shape) == 4:
            down = down.transpose(0, 2, 3, 1).reshape(len(down), -1)
        own = _own_scale(path, about, module, len(down)) / scale
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


def _check(file: Path, about: Mapping[str, Any]) -> None:
    """Raises WeightsError unless the adapter is plain, and its own as to the base weights."""
    foreign = {
        name: value
        for name, value in about.items()
        if name not in _READ + _INERT and value not in (_PLAIN.get(name), None, False, [], {}, "")
    }
    if about.get("peft_type") != "LORA" or foreign:
        raise WeightsError(
            f"{file}: peft_type {about.get('peft_type')!r} {foreign or ''}: expected a plain "
            f"'LORA' without settings that change its mathematics or that are not known here. To "
            f"use it, {MERGE}."
        )
    start = about.get("init_lora_weights", True)
    start = start.lower() if isinstance(start, str) else start
    if start not in _STARTS:
        known = isinstance(start, str) and (_CONVERTED.fullmatch(start) or start == "loftq")
        convert_it = (
            "save it with PEFT's conversion to a plain one, save_pretrained(DIR, "
            "path_initial_model_for_weight_conversion=ADAPTER_BEFORE_TRAINING), or "
        )
        raise WeightsError(
            f"{file}: init_lora_weights={about['init_lora_weights']!r} "
            + ("changed" if known else "is not known here and may have changed")
            + " the base weights, so the adapter does not fit those of "
            f"{about.get('base_model_name_or_path')}. To use it, "
            + (convert_it if known and start != "loftq" else "")
            + f"{MERGE}."
        )
    rank, alpha = about.get("r"), about.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float) or rank < 1 or alpha <= 0:
        raise WeightsError(
            f"{file}: r={rank!r}, lora_alpha={alpha!r}: expected positive numbers. Copy it again."
        )


def _halves(path: Path, about: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """PyTorch module, as the file calls it -> {"A": [rank, ...], "B": [outputs, rank, ...]}."""
    file = path / TENSORS
    pickled = file.with_suffix(".bin")
    halves: dict[str, dict[str, np.ndarray]] = {}
    adapters = set()
    for name, tensor in files.read_tensors(
        pickled if pickled.is_file() and not file.is_file() else file
    ).items():
        match = _TENSOR.fullmatch(name)
        if match is None or ".base_layer" in name:
            kind = "belongs to an adapted embedding" if "lora_embedding" in name else "is none"
            raise WeightsError(
                f"{path}: expected nothing but the lora_A and lora_B of linear layers and "
                f"convolutions; {name} {kind}. To use the adapter, {MERGE}."
            )
        adapters.add(match[3])
        half = np.asarray(convert.finite(tensor, name, str(path)), np.float32)
        halves.setdefault(match[1], {})[match[2]] = half
    if len(adapters) > 1:
        raise WeightsError(
            f"{path}: expected one adapter, found {', '.join(sorted(map(str, adapters)))}. Save "
            "the one that is wanted, save_pretrained(DIR, selected_adapters=[NAME])."
        )
    if not halves:
        raise WeightsError(f"{path}: the adapter has no tensors. Save or copy it again.")
    for module, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise WeightsError(f"{path}: only lora_{''.join(pair)} of {module}. Copy it again.")
    return halves


def _tower(
    path: Path,
    about: Mapping[str, Any],
    halves: Mapping[str, Mapping[str, np.ndarray]],
    modules: Mapping[str, tuple[list[str], tuple[int, ...]]],
) -> str:
    """What the whole model's names have before those of the file: "", or one tower's "NAME.".

    transformers names the modules of a tower by themselves, CLIPTextModel, without it.
    """
    if any(module in modules for module in halves):
        return ""
    roots = sorted({module.partition(".")[0] + "." for module in modules})
    towers = [root for root in roots if all(root + module in modules for module in halves)]
    made_on = (about.get("auto_mapping") or {}).get("base_model_class") or ""
    if said := [root for root in towers if root.partition("_")[0] in made_on.lower()]:
        towers = said
    if len(towers) > 1:
        towers = [
            root
            for root in towers
            if all(_fits(pair, *modules[root + module]) for module, pair in halves.items())
        ] or towers
    if len(towers) > 1:
        raise WeightsError(
            f"{path}: {next(iter(halves))} may be of {' or '.join(towers)}. Say in {CONFIG} which "
            'model it was made on, "auto_mapping": {"base_model_class": "CLIPTextModel"}.'
        )
    return "".join(towers)


def _sizes(pair: Mapping[str, np.ndarray]) -> str:
    down, up = pair["A"], pair["B"]
    ranks = "" if len(down) == np.size(up, 1) else f" (ranks {len(down)} and {np.size(up, 1)})"
    return f"{math.prod(down.shape[1:])} -> {len(up)}{ranks}"


def _fits(pair: Mapping[str, np.ndarray], parts: list[str], shape: tuple[int, ...]) -> bool:
    """Whether the halves are those of our kernels `parts`, of `shape` each."""
    rank, *inputs = pair["A"].shape
    kernel = [shape[-2], *shape[:-2]]  # PyTorch has the input channels first
    ones = (1,) * (len(shape) - 2)
    return inputs == kernel and pair["B"].shape == (len(parts) * shape[-1], rank, *ones)


def _own_scale(path: Path, about: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank of one module. Raises WeightsError when its rank is not the config's."""
    expected = _pattern(about, "rank_pattern", module, about["r"])
    if rank != expected:
        raise WeightsError(
            f"{path}: {module} has rank {rank}, but {CONFIG} says {expected} (r, rank_pattern). "
            "Copy both files again from one place."
        )
    return _scale(about, _pattern(about, "alpha_pattern", module, about["lora_alpha"]), rank)


def _pattern(about: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The value for a module; the first pattern counts that is the end of its name."""
    for pattern, value in (about.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _scale(about: Mapping[str, Any], alpha: float, rank: int) -> float:
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
        elif owner.family == "siglip":
            table = siglip.names(model.config)
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
