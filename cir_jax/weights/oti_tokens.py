"""SEARLE's folders of optimised pseudo-words: words of images by their names.

    ema_oti_pseudo_tokens.pt  float32[n, token_dim], the averaged words, which are what is used
    oti_pseudo_tokens.pt      the same before averaging; not needed, and not written
    image_names.pkl           list of n names

Reading needs no PyTorch and runs no code of the files; writing needs it (extra `torch`).
"""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.input import pickles
from cir_jax.input.tables import Table
from cir_jax.storage.atomic import new_directory
from cir_jax.weights import convert, torch_files

WORDS, NAMES, SETTINGS = "ema_oti_pseudo_tokens.pt", "image_names.pkl", "hyperparameters.json"


def name_of(source: Sequence[Mapping[str, Any]], row: int) -> str:
    """What the image of a record is called: its field `name`.

    Else its `id`, with the table and split, as an id alone would also fit an image of another one.
    """
    record = source[row]
    if "name" in record:
        return record["name"].decode()
    of = f"{source.dataset}/{source.table}/{source.split}/" if isinstance(source, Table) else ""
    return f"{of}{record['id']}"


def read(directory: str | Path, token_dim: int) -> dict[str, np.ndarray]:
    """Name -> float32[token_dim].

    Raises WeightsError naming the file that is missing or damaged, or whose words are of another
    number or width.
    """
    directory = Path(directory).expanduser()
    for name in (WORDS, NAMES):
        if not (directory / name).is_file():
            raise WeightsError(
                f"{directory / name} is missing. Expected a folder of SEARLE's oti_inversion, with "
                f"{WORDS} and {NAMES}; of the words that a stage stored, launch/export_words.py "
                "writes one."
            )
    tensors = torch_files.read(directory / WORDS)
    if set(tensors) != {""}:
        raise WeightsError(f"{directory / WORDS}: expected one tensor, not {sorted(tensors)[:3]}.")
    words = np.asarray(
        convert.finite(tensors[""], "its tensor", str(directory / WORDS)), np.float32
    )
    try:
        names = pickles.load((directory / NAMES).read_bytes())
    except Exception as error:  # garbled pickles raise whatever their opcodes run into
        raise WeightsError(
            f"{directory / NAMES}: not a list of names ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{directory / NAMES}: expected a list of strings.")
    if words.shape != (len(names), token_dim):
        raise WeightsError(
            f"{directory}: {len(names)} names and words of shape {words.shape}; this backbone has "
            f"words of width {token_dim}. Words belong to the backbone that they were made with."
        )
    return dict(zip(names, words, strict=True))


def write(
    directory: Path, names: Sequence[str], words: np.ndarray, settings: Mapping[str, Any]
) -> None:
    """float32[n, token_dim] -> the folder, whole or not at all. Raises WeightsError without torch.

    Images without a word (NaN) are left out.
    """
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{directory}: .pt files are written by PyTorch: `pip install cir_jax[torch]`."
        ) from error
    good = np.isfinite(words).all(axis=1)
    kept = [str(name) for name, ok in zip(names, good, strict=True) if ok]
    with new_directory(directory) as scratch:
        torch.save(torch.from_numpy(np.array(words[good], np.float32)), scratch / WORDS)
        (scratch / NAMES).write_bytes(pickle.dumps(kept, protocol=4))
        (scratch / SETTINGS).write_text(json.dumps(dict(settings), indent=4, default=str) + "\n")
