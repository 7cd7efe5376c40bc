"""Diffusion pipelines of the package diffusers (PyTorch), from directories and hub ids."""

import dataclasses
import hashlib
import importlib
from collections.abc import Mapping
from typing import Any

from cir_jax.errors import ConfigError, WeightsError

KARLO = "UnCLIPImageVariationPipeline"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """run: the pipeline of diffusers, on a GPU in float16 if there is one. kind: its class.
    parameters: a hash of all that it computes with."""

    run: Any
    kind: str
    parameters: str


def load(kinds: tuple[str, ...], name: str, flag: str, scheduler: str = "") -> Pipeline:
    """kinds: classes of diffusers that will do. name: what their `from_pretrained` reads. flag:
    where the user gave it, in messages. scheduler: class of another than the weights come with.

    Raises ConfigError where diffusers or PyTorch are not installed, WeightsError where there is no
    such pipeline.
    """
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{flag}={name}: {str(error).splitlines()[0]}. It takes diffusers and PyTorch: "
            "pip install 'cir_jax[synth]'."
        ) from error
    wanted = " or ".join(kinds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    try:
        index = diffusers.DiffusionPipeline.load_config(name)
        kind = index["_class_name"]
        if kind == KARLO and kind in kinds:
            run = _karlo(name, index, dtype)
        elif kind in kinds:
            options = {} if dtype == torch.float32 else {"torch_dtype": dtype}
            run = _kind(kind).from_pretrained(name, **options)
    except Exception as error:  # diffusers, transformers and the hub raise many types
        raise WeightsError(
            f"{flag}={name}: no {wanted} there "
            f"({(str(error).strip().splitlines() or [type(error).__name__])[0]}). Give a directory "
            "as diffusers saves it, or a hub id where there is a network."
        ) from error
    if kind not in kinds:
        raise WeightsError(f"{flag}={name}: a {kind}, expected {wanted}.")
    if scheduler:
        run.scheduler = _kind(scheduler).from_config(
            run.scheduler.config, timestep_spacing="linspace"
        )
    digest = hashlib.sha256()
    for part, module in sorted(run.components.items()):
        if not isinstance(module, torch.nn.Module):
            continue
        module.eval().requires_grad_(False)
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part} {key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    run.set_progress_bar_config(disable=True)
    return Pipeline(run.to(device), kind, digest.hexdigest()[:24])


def _kind(name: str) -> Any:
    return getattr(importlib.import_module("diffusers"), name)


def _karlo(name: str, index: Mapping[str, Any], dtype: Any) -> Any:
    """Part by part: recent diffusers does not find the class of text_proj, which is its own."""
    transformers = importlib.import_module("transformers")
    place = _kind(KARLO).__module__.rpartition(".")[0]
    own = {
        "text_proj": importlib.import_module(f"{place}.text_proj").UnCLIPTextProjModel,
        "feature_extractor": transformers.CLIPImageProcessor,  # it had another name once
    }

    def part(key: str, library: str, kind: str) -> Any:
        found = own.get(key) or getattr(importlib.import_module(library), kind)
        made = found.from_pretrained(name, subfolder=key)
        other = getattr(made, "dtype", dtype) != dtype
        return made.to(dtype) if other else made

    return _kind(KARLO)(**{k: part(k, *v) for k, v in index.items() if isinstance(v, list | tuple)})
