"""Where files lie: cache, prepared data, and what comes with the library."""

import os
import re
from pathlib import Path

from cir_jax.storage.buckets import local, place

CACHE_VARIABLE = "CIR_JAX_CACHE"
DATA_VARIABLE = "CIR_JAX_DATA"
LIBRARY_VARIABLE = "CIR_JAX_LIBRARY"
PACKAGE = Path(__file__).resolve().parents[1]
BUNDLED = PACKAGE / "bundled"
SHIPPED = BUNDLED if BUNDLED.is_dir() else PACKAGE.parent
"""`experiments/` and the files of `data/shapes/`: in the repository, or in a wheel (`setup.py`)."""


def default_cache_dir() -> Path:
    """`$CIR_JAX_CACHE`, else `~/.cache/cir_jax/features`."""
    value = os.environ.get(CACHE_VARIABLE)
    return (
        local(value, f"${CACHE_VARIABLE}")
        if value
        else Path.home() / ".cache" / "cir_jax" / "features"
    )


def default_data_dir() -> Path:
    """`$CIR_JAX_DATA`, else `~/.cache/cir_jax/data`."""
    value = os.environ.get(DATA_VARIABLE)
    return place(value) if value else Path.home() / ".cache" / "cir_jax" / "data"


def default_uploads_dir() -> Path:
    """Where tables for a bucket are built, until they are whole."""
    return Path.home() / ".cache" / "cir_jax" / "uploads"


def default_compiled_dir() -> Path:
    """Where compiled programs are kept, if `$JAX_COMPILATION_CACHE_DIR` says nothing."""
    return Path.home() / ".cache" / "cir_jax" / "xla"


def default_library_dir() -> Path:
    """`$CIR_JAX_LIBRARY`, else `~/.cache/cir_jax/libraries`."""
    value = os.environ.get(LIBRARY_VARIABLE)
    return (
        local(value, f"${LIBRARY_VARIABLE}")
        if value
        else Path.home() / ".cache" / "cir_jax" / "libraries"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository's on the Hugging Face hub, ORG/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def places(name_or_path: str | Path) -> tuple[Path, Path]:
    """Where a path may lie: as it is given, or among what comes with the library."""
    return Path(name_or_path).expanduser(), SHIPPED / name_or_path
