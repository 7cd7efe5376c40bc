"""Errors a user can cause. Each message names the file, record, field or flag, and the remedy."""

import difflib
from collections.abc import Iterable


class CirError(ValueError):
    """Base of all errors that bad input raises; the binaries print it without a traceback."""


class ConfigError(CirError):
    """A config field, preset, flag or experiment is unknown, or its value cannot work."""


class DataError(CirError):
    """A dataset, table, record or image is missing, unknown or unreadable."""


class WeightsError(CirError):
    """Pretrained weights are missing, belong to another model, or do not fit it."""


class CheckpointError(CirError):
    """A workdir or checkpoint is missing, corrupt, or belongs to another run."""


class MeshError(CirError):
    """Devices, mesh axes and batch sizes do not fit each other."""


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    """Message for an unknown name: the closest valid one first, then all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}.{hint} Valid: {', '.join(names) or '(none)'}."
