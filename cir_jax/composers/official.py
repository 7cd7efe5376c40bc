"""Checkpoints of the methods' authors: read into a composer, and written again.

    --config.init_from=official:PATH    evaluates these weights, or starts training from them
    --config.init_from=official:HUB/ID  likewise, or a directory, where the authors publish such
    --config.init_from=official:A,B     likewise of a method whose parts are in two files
    --config.export_to=PATH             writes what was trained in the authors' format

Here is what is the same for all methods: the flag, and shapes that must be the composer's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cir_jax.composers.base import Composer
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.weights import convert, files

FLAG = "official:"


def given(init_from: str) -> tuple[Path, ...]:
    """The paths in `official:PATH[,PATH]`; none where init_from is something else."""
    if not init_from.startswith(FLAG):
        return ()
    names = init_from.removeprefix(FLAG)
    paths = (names,) if Path(names).expanduser().exists() else names.split(",")
    if not all(paths):
        raise ConfigError(f"config.init_from={init_from!r}: write {FLAG}PATH.")
    return tuple(Path(path).expanduser() for path in paths)


def load(composer: Composer, paths: Path | Sequence[Path], frozen: Any) -> Any:
    """Trainable parameters (numpy) of `composer` from an official checkpoint, of one or more files.

    Raises ConfigError when the method has none, WeightsError when a file is missing, of another
    kind, or of another size, and when two hold the same; every tensor in it is accounted for.
    """
    paths = [paths] if isinstance(paths, Path) else paths
    said = ",".join(map(str, paths))
    check_known(composer, f"config.init_from={FLAG}{said}")
    params: dict[str, Any] = {}
    for path in paths:
        path = _located(composer, path)
        if not path.exists():
            raise WeightsError(
                f"{path}: no such file. Download the method's weights and give {FLAG}PATH: "
                f"{composer.official_format}."
            )
        found = composer.read_official(path, frozen)
        if twice := sorted(params.keys() & found.keys()):
            raise WeightsError(
                f"{path}: holds {twice[0]!r} of the method, as a file before it does."
            )
        params |= found
    params = composer.take_over(params, frozen)
    expected = jax.eval_shape(composer.init, jax.random.key(0))
    backbone = composer.backbone
    # all formats store sizes only as shapes, so this is where another backbone shows
    what = f"{said} on the backbone {backbone.weights_id} ({backbone.dim}, {backbone.token_dim})"
    convert.check_shapes(params, expected, what)
    return params


def _located(composer: Composer, path: Path) -> Path:
    """The file of a directory or hub id, where the method's authors publish such."""
    if not composer.official_files or path.is_file():
        return path
    found = files.one_of(path, composer.official_files)
    return (
        path if found is None and not path.is_dir() else found or path / composer.official_files[0]
    )


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
