"""Checkpoints of the methods' authors: read into a composer, and written again.

    --config.init_from=official:PATH    evaluates these weights, or starts training from them
    --config.export_to=PATH             writes what was trained in the authors' format

Here is what is the same for all methods: the flag, and shapes that must be the composer's.
"""

from pathlib import Path
from typing import Any

import jax

from cir_jax.composers.base import Composer
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.weights import convert

FLAG = "official:"


def given(init_from: str) -> Path | None:
    """The path in `official:PATH`; None where init_from is something else."""
    if not init_from.startswith(FLAG):
        return None
    path = init_from.removeprefix(FLAG)
    if not path:
        raise ConfigError(f"config.init_from={init_from!r}: write {FLAG}PATH.")
    return Path(path).expanduser()


def load(composer: Composer, path: Path, frozen: Any) -> Any:
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


def save(composer: Composer, path: Path, params: Any, frozen: Any) -> None:
    """Writes an official checkpoint; `load` and the authors' code read it."""
    check_known(composer, f"config.export_to={path}")
    composer.write_official(path, params, frozen)


def check_known(composer: Composer, field: str) -> None:
    """Raises ConfigError when the method's authors have no format for such a backbone."""
    if not composer.official_format:
        family = composer.backbone.family
        on = f" on a {family} backbone" if type(composer).official_format else ""
        raise ConfigError(
            f"{field}: {type(composer).__name__}{on} has no official checkpoints that could be "
            "read or written."
        )
