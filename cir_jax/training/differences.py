"""In what a stored description (of a run, of stored words) differs from the one wanted now."""

from collections.abc import Mapping
from typing import Any


def differing_fields(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    free: tuple[str, ...] = (),
    prefix: str = "",
) -> list[str]:
    """ "field (was a, is b)" for each field that differs and is not `free` to."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}{key}"
        if name in free:
            continue
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differing_fields(before, now, free, f"{name}.")
        elif before != now:
            found.append(f"{name} (was {_said(before)}, is {_said(now)})")
    return found


def _said(value: Any) -> str:
    return "{...}" if isinstance(value, Mapping) and value else repr(value)
