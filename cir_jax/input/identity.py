"""What tells one list of images from another, for caches and for workdirs."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from cir_jax.input import masks

CROP = "crop"
"""Field of records of which only a part is meant; see `retrieval.features.open_image`."""


def features_of(backbone: Any) -> dict[str, str]:
    """What image features of a backbone depend on, for corpora of them; of two models in one, on
    the images' alone."""
    own = backbone.weights_id if backbone.joint else backbone.weights_id.partition("+")[0]
    return {"weights": own, "preprocessing": repr(backbone.image_transform)}


def source_identity(source: Sequence[Mapping[str, Any]], field: str) -> str:
    """What tells one list of images from another.

    A source with `identity()`, as a prepared table: that. Other records: a hash of the bytes
    themselves, and of the part of the image that is meant.
    """
    if hasattr(source, "identity"):
        made = f" {masks.NOISE}" if field == masks.FIELD else ""
        return f"{source.identity()}{made}"
    digest = hashlib.sha256()
    for i in range(len(source)):
        record = source[i]
        data = bytes(record[field])
        digest.update(len(data).to_bytes(8, "little") + data)
        if CROP in record:  # the same file, another part of it
            digest.update(f"black square {[int(x) for x in record[CROP]]}".encode())
    return f"records {digest.hexdigest()}"
