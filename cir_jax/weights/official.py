"""Checkpoints of the methods' authors: read into a composer, and written again.

    --config.init_from=official:PATH    evaluates these weights, or starts training from them
    --config.export_to=PATH             writes what was trained in the authors' format

What lies in a file is the method's own business (`Composer.read_official`); here is what is the
same for all: the flag, files that need no PyTorch to be read, shapes that must be the composer's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from cir_jax.errors import ConfigError, WeightsError
from cir_jax.weights import convert, torch_files

if TYPE_CHECKING:
    from cir_jax.composers.base import Composer

FLAG = "official:"


def given(init_from: str) -> Path | None:
    """The path in `official:PATH`; None where init_from is something else."""
    if not init_from.startswith(FLAG):
        return None
    path = init_from.removeprefix(FLAG)
    if not path:
        raise ConfigError(f"config.init_from={init_from!r}: write {FLAG}PATH.")
    return Path(path).expanduser()


def load(composer: "Composer", path: Path, frozen: Any) -> Any:
    """Trainable parameters (numpy) of `composer` from an official checkpoint.

    Raises ConfigError when the method has none, WeightsError when the file is missing, of another
    kind, or of another size; every tensor in it is accounted for.
    """
    check_known(composer, f"config.init_from={FLAG}{path}")
    if not path.exists():
        raise WeightsError(
            f"{path}: no such file. Download the method's weights and give {FLAG}PATH: "
            f"{composer.official_format}."
        )
    params = composer.read_official(path, frozen)
    expected = jax.eval_shape(composer.init, jax.random.key(0))
    backbone = composer.backbone
    # all formats store sizes only as shapes, so this is where another backbone shows
    what = f"{path} on the backbone {backbone.weights_id} ({backbone.dim}, {backbone.token_dim})"
    convert.check_shapes(params, expected, what)
    return params


def save(composer: "Composer", path: Path, params: Any, frozen: Any) -> None:
    """Writes an official checkpoint; `load` and the authors' code read it."""
    check_known(composer, f"config.export_to={path}")
    composer.write_official(path, params, frozen)


def check_known(composer: "Composer", field: str) -> None:
    """Raises ConfigError when the method's authors have no format for such a backbone."""
    if not composer.official_format:
        family = composer.backbone.family
        on = f" on a {family} backbone" if type(composer).official_format else ""
        raise ConfigError(
            f"{field}: {type(composer).__name__}{on} has no official checkpoints that could be "
            "read or written."
        )


def read(path: Path, part: str = "", ignore: Sequence[str] = ()) -> Mapping[str, np.ndarray]:
    """The state dict under the key `part` of a PyTorch file; "" = the file is one.

    ignore: keys of other parts that are known. Raises WeightsError when `part` is not there, or
    when the file holds tensors in parts that are not known.
    """
    parts = torch_files.read_parts(path)
    if part not in parts:
        keys = ", ".join(name or "(tensors)" for name in parts) or "no tensors"
        raise WeightsError(f"{path}: expected a state dict under {part!r}; it holds {keys}.")
    if extra := sorted(set(parts) - {part, *ignore}):
        raise WeightsError(f"{path}: holds parts that nothing takes: {', '.join(extra)}.")
    return parts[part]


def check_torch(field: str) -> None:
    """Raises ConfigError when PyTorch, which writes the files, is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{field}: only PyTorch writes its files: `pip install cir_jax[torch]`."
        ) from error


def write(path: Path, content: Mapping[str, Any]) -> None:
    """A PyTorch file of nested dictionaries of arrays and plain values; whole or not at all."""
    check_torch(str(path))
    import torch

    from cir_jax.retrieval.cache import write_atomically

    def tensors(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: tensors(value) for key, value in node.items()}
        if isinstance(node, np.ndarray | np.generic | jax.Array):
            return torch.from_numpy(np.array(node))  # a copy: arrays of JAX cannot be written to
        return node

    write_atomically(path, lambda file: torch.save(tensors(content), file))
