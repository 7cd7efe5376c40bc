"""SEARLE's folders of optimised pseudo-words."""

import pickle

import numpy as np
import pytest

from cir_jax.errors import WeightsError
from cir_jax.weights import oti_tokens


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("torch")
    words = np.arange(12, dtype=np.float32).reshape(3, 4)
    words[1] = np.nan
    oti_tokens.write(tmp_path / "words", ["a", "b", "c"], words, {"oti_steps": 350})
    return tmp_path / "words"


def test_a_folder_is_what_the_released_code_reads_and_comes_back(folder):
    import torch

    with (folder / "image_names.pkl").open("rb") as file:
        assert pickle.load(file) == ["a", "c"]  # the one without a word is left out
    assert torch.load(folder / "ema_oti_pseudo_tokens.pt", weights_only=True).shape == (2, 4)
    words = oti_tokens.read(folder, 4)
    assert list(words) == ["a", "c"] and words["c"].tolist() == [8, 9, 10, 11]


def test_folders_that_cannot_be_used(folder):
    with pytest.raises(WeightsError, match="this backbone has words of width 5"):
        oti_tokens.read(folder, 5)
    names = folder / "image_names.pkl"
    for content, message in (
        (pickle.dumps(["a", print]), "not a list of names .*it names builtins.print"),
        (pickle.dumps({"a": 1}), "expected a list of strings"),
        (b"\x8d\0\0\0\0\2\0\0\0", "not a list of names .*expected 8589934592 bytes"),
        (pickle.dumps(["a"]), "1 names and words of shape"),
    ):
        names.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            oti_tokens.read(folder, 4)
    import torch

    torch.save(torch.full((2, 4), torch.nan), folder / oti_tokens.WORDS)
    with pytest.raises(
        WeightsError, match="tokens.pt: its tensor holds 8 of 8 values that are NaN"
    ):
        oti_tokens.read(folder, 4)
    names.unlink()
    with pytest.raises(WeightsError, match="image_names.pkl is missing.*export_words.py"):
        oti_tokens.read(folder, 4)
