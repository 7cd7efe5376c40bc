"""PyTorch libraries to compare with, where they are installed; else the test is skipped.

PyPI has torchvision for CUDA only. Its Python code, transforms above all, runs beside a PyTorch for
CPUs once the two operators that it describes on import have a name. Until then it breaks whoever
imports it, transformers too, so `.ci/run` keeps it and what needs it in a directory of their own.
"""

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

APART = Path(sys.prefix) / "peers"
"""Made by `pip install --no-deps --target DIR torchvision timm open_clip_torch`."""


@functools.cache
def torchvision() -> ModuleType:
    """torchvision, whatever PyTorch there is."""
    torch = pytest.importorskip("torch")
    if APART.is_dir() and str(APART) not in sys.path:
        sys.path.append(str(APART))
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed")
    except RuntimeError:  # operator torchvision::nms does not exist
        torchvision.library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torchvision.library.define(name + signature)
        return importlib.import_module("torchvision")


@functools.cache
def timm() -> ModuleType:
    """timm, which imports torchvision."""
    torchvision()
    return pytest.importorskip("timm")


@functools.cache
def open_clip() -> ModuleType:
    """open_clip_torch, which imports torchvision and timm."""
    torchvision()
    return pytest.importorskip("open_clip")
