"""Durations in steps, epochs, examples or percent, so that a recipe survives another batch size."""

import re

from cir_jax.errors import ConfigError

_UNITS = {"k": 1_000, "m": 1_000_000, "": 1}


def to_steps(
    value: int | str,
    *,
    field: str,
    batch_size: int,
    epoch_examples: int,
    total_steps: int | None = None,
) -> int:
    """Steps of `value`: 500, "500 steps", "2 epochs", "300k examples" or "10%" (of `total_steps`).

    Raises ConfigError naming `field`.
    """
    if isinstance(value, int) and value >= 0:
        return value
    match = re.fullmatch(
        r"\s*([0-9]+\.?[0-9]*)\s*([km]?)\s*(steps?|epochs?|examples?|%|)\s*", str(value).lower()
    )
    if not match:
        raise ConfigError(
            f"config.{field}={value!r} is no duration. "
            'Write 500, "500 steps", "2 epochs", "300k examples" or "10%".'
        )
    number, unit = float(match[1]) * _UNITS[match[2]], match[3].rstrip("s")
    if unit in ("step", ""):
        return round(number)
    if unit == "epoch":
        return max(1, round(number * epoch_examples / batch_size))
    if unit == "example":
        return max(1, round(number / batch_size))
    if total_steps is None:
        raise ConfigError(f"config.{field}={value!r}: a share of what? Write steps or epochs here.")
    return round(number / 100 * total_steps)
