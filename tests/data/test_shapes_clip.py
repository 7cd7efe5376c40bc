"""The CLIP that ships with the embedded world: whole, small, good, and readable by PyTorch."""

import jax
import numpy as np
import pytest

from cir_jax import weights
from cir_jax.composers.base import normalise
from cir_jax.input.images import decode
from data.shapes import captioned
from data.shapes.architecture import CONTEXT_LENGTH, write
from data.shapes.words import vocabulary
from tests.launch.binaries import ROOT

FOLDER = ROOT / "data" / "shapes" / "clip"


@pytest.fixture(scope="module")
def clip():
    return weights.load(str(FOLDER))


@pytest.fixture(scope="module")
def held_out(clip):
    """1,000 scenes of the validation split: pixels, and token ids of their detailed captions."""
    backbone, _ = clip
    records = list(captioned.records("pretrain", "val", 1000))
    pixels = [backbone.image_transform(decode(r["image"], "scene")) for r in records]
    return np.stack(pixels), backbone.tokenizer([r["captions"][0] for r in records])


def test_small_and_of_the_recorded_architecture(tmp_path):
    assert (FOLDER / "model.safetensors").stat().st_size <= 5_000_000
    write(tmp_path)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (FOLDER / name).read_text() == (tmp_path / name).read_text()


def test_knows_every_word(clip):
    tokenizer = clip[0].tokenizer
    unknown = tokenizer.id_of("xyzzy")
    assert tokenizer.context_length == CONTEXT_LENGTH
    assert all(tokenizer.id_of(word) != unknown for word in vocabulary())


def test_finds_held_out_scenes_by_their_captions(clip, held_out):
    backbone, params = clip
    pixels, token_ids = held_out
    images = normalise(jax.jit(backbone.encode_image)(params, pixels))
    texts = normalise(jax.jit(backbone.encode_text)(params, token_ids))
    best = np.asarray(texts @ images.T).argmax(axis=1)
    recall = np.mean(best == np.arange(1000))
    assert recall > 0.80  # 0.875 when it was made; the README of the folder says so


@pytest.mark.peer
def test_pytorch_gives_the_same_features(clip, held_out):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    backbone, params = clip
    pixels, token_ids = held_out[0][:8], held_out[1][:8]
    mean, std = np.asarray(backbone.image_transform.statistics, np.float32).reshape(2, 1, 1, 1, 3)
    floats = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    model = transformers.CLIPModel.from_pretrained(str(FOLDER), dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(token_ids).long(),
            pixel_values=torch.from_numpy(floats.astype(np.float32)),
        )
    for ours, expected in (
        (jax.jit(backbone.encode_image)(params, pixels), theirs.image_embeds),
        (jax.jit(backbone.encode_text)(params, token_ids), theirs.text_embeds),
    ):
        np.testing.assert_allclose(normalise(ours), expected.numpy(), atol=1e-5)


@pytest.mark.peer
def test_pytorch_tokenizes_alike(clip):
    transformers = pytest.importorskip("transformers")
    text = "a photo of a red star that has no circle"
    theirs = transformers.AutoTokenizer.from_pretrained(str(FOLDER))(text)["input_ids"]
    assert clip[0].tokenizer([text])[0, : len(theirs)].tolist() == theirs
