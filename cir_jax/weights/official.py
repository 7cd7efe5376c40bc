"""Files of the methods' authors: PyTorch's format, read without PyTorch.

What lies in a file is the method's own business (`Composer.read_official`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cir_jax.errors import ConfigError, WeightsError
from cir_jax.storage.atomic import write_atomically
from cir_jax.weights import torch_files


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

    def tensors(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: tensors(value) for key, value in node.items()}
        if isinstance(node, np.ndarray | np.generic | jax.Array):
            return torch.from_numpy(np.array(node))  # a copy: arrays of JAX cannot be written to
        return node

    write_atomically(path, lambda file: torch.save(tensors(content), file))
