"""Images that a prepared table does not hold, but names: `prepare.py --images=link`.

In place of the encoded image the field has `MAGIC`, the size of the file in bytes, and its path.
"""

from pathlib import Path
from typing import Any

from cir_jax.errors import DataError

MAGIC = b"cir_jax link "


def make(path: Path, size: int) -> bytes:
    """What stands in the field."""
    return MAGIC + f"{size} {path.absolute()}".encode()


def followed(value: Any, what: str) -> Any:
    """The image that the field means; other values as they are. `what` names the record.

    Raises DataError when the file is gone or has another size.
    """
    if not isinstance(value, bytes) or not value.startswith(MAGIC):
        return value
    size, _, path = value[len(MAGIC) :].decode().partition(" ")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"{what}: its image {path} cannot be read ({error.strerror}). The table was prepared "
            "with --images=link, so the files must stay; bring them back, or prepare again."
        ) from error
    if len(data) != int(size):
        raise DataError(
            f"{what}: its image {path} has {len(data)} bytes, {size} when the table was prepared "
            "with --images=link. Prepare again."
        )
    return data
