"""PyTorch libraries to compare with, where they are installed; else the test is skipped."""

import functools
import importlib
import importlib.util
from types import ModuleType

import pytest

_OPERATORS = ("nms", "qnms")


@functools.cache
def torchvision() -> ModuleType:
    """torchvision beside a PyTorch for CPUs.

    PyPI has it for CUDA only. Its Python code, transforms above all, runs without the compiled part
    once the two operators that it describes on import have a name.
    """
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        torchvision.library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPERATORS:
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torchvision.library.define(name + signature)
        return importlib.import_module("torchvision")


@functools.cache
def open_clip() -> ModuleType:
    """open_clip_torch, which imports torchvision and timm."""
    torchvision()
    return pytest.importorskip("open_clip")
