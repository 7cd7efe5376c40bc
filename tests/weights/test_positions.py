"""Other image sizes and longer texts: interpolated, stretched and folded position embeddings."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.input.images import ImageTransform
from cir_jax.models.backbone import Backbone
from cir_jax.models.clip import Clip
from cir_jax.weights import positions
from tests.weights import worlds

FAST = {"xla_backend_optimization_level": 0}  # compiled once and run once
LONG = " ".join(["a red cat and $ that is red"] * 20)


def make(image_size=32, context_length=24):
    """The random CLIP of `worlds`, of 4 x 4 patches and a few more words: (backbone, params)."""
    small, _ = worlds.make()
    vision = dataclasses.replace(small.config.vision, image_size=image_size)
    text = dataclasses.replace(small.config.text, max_position_embeddings=context_length)
    config = dataclasses.replace(small.config, vision=vision, text=text)
    small.tokenizer.context_length = context_length
    transform = ImageTransform(resize=image_size, crop=image_size)
    backbone = Backbone(Clip(config), small.tokenizer, transform, "tiny@0")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0))
    return backbone, jax.tree.map(lambda x: np.float32(rng.normal(0, 0.1, x.shape)), shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "clip"
    weights.save(path, *make())
    return path


def picture():
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    image = Image.fromarray(rng.integers(0, 255, (9, 14, 3), np.uint8))
    image.resize((140, 90)).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()))


def text_features(backbone, params, ids):
    return jax.jit(backbone.encode_text, compiler_options=FAST)(params, ids)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


# --- other image sizes


@pytest.mark.peer
@pytest.mark.parametrize("size", [56, 24])
def test_another_image_size_is_transformers(saved, size):
    """From a PNG, to larger and to smaller images."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.CLIPModel.from_pretrained(saved).eval()
    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    pixels = processor(picture(), return_tensors="np")["pixel_values"]
    with torch.no_grad():
        pooled = theirs.vision_model(torch.tensor(pixels), interpolate_pos_encoding=True)
        expected = theirs.visual_projection(pooled.pooler_output).numpy()
    backbone, params = weights.load(saved, image_size=size)
    image = backbone.image_transform(picture())[None]
    close(worlds.encode(backbone, params, image, backbone.tokenizer(["cat"]))[0], expected)


@pytest.mark.peer
def test_another_image_size_of_a_blip_is_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    weights.save(tmp_path / "blip", *worlds.make_blip(tmp_path, image_size=64))
    theirs = transformers.BlipForImageTextRetrieval.from_pretrained(tmp_path / "blip").eval()
    own, _ = weights.load(tmp_path / "blip")
    for size in (96, 48):
        backbone, params = weights.load(tmp_path / "blip", image_size=size)
        assert backbone.image_transform == dataclasses.replace(
            own.image_transform, resize=size, crop=size
        )
        assert backbone.weights_id != own.weights_id
        image = backbone.image_transform(picture())[None]
        assert image.shape == (1, size, size, 3)
        pixels = (image / np.float32(255) - backbone.image_transform.mean) / np.float32(
            backbone.image_transform.std
        )
        with torch.no_grad():
            expected = theirs.vision_model(
                torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2),
                interpolate_pos_encoding=True,
            ).last_hidden_state.numpy()
        run = jax.jit(backbone.visual_tokens, compiler_options=FAST)
        close(run(params, image), expected)


def test_a_resized_model_has_its_own_name_and_can_be_saved(tmp_path, saved):
    own, params = weights.load(saved)
    same, _ = weights.load(saved, image_size=32, context_length=24)
    larger, resized = weights.load(saved, image_size=56)
    assert same.weights_id == own.weights_id != larger.weights_id
    assert larger.config.vision.image_size == larger.image_transform.crop == 56
    assert resized["vision"]["position_embedding"].shape == (50, 128)
    np.testing.assert_array_equal(
        resized["vision"]["position_embedding"][0], params["vision"]["position_embedding"][0]
    )
    weights.save(tmp_path / "larger", larger, resized)
    assert weights.load(tmp_path / "larger")[0].weights_id.split("@")[1] in larger.weights_id
    assert weights.load_architecture(saved, image_size=56).config == larger.config


def test_the_halves_of_a_pair_are_resized_apart(saved):
    pair, params = weights.load(f"{saved}+{saved}", image_size=56, context_length=36)
    assert params["image"]["vision"]["position_embedding"].shape == (50, 128)
    assert params["text"]["text"]["position_embedding"].shape == (36, 64)
    assert pair.image_transform.crop == 56 and pair.context_length == 36
    other = weights.load_architecture(f"{saved}+{saved}", image_size=56, context_length=36)
    assert other.config == pair.config and other.text_model.config == pair.text_model.config


def test_image_sizes_that_cannot_be(tmp_path, saved):
    for size, nearest in ((50, "48 or 56"), (4, "8 or 16")):
        with pytest.raises(WeightsError, match=f"image_size={size}: no multiple .* 8. .*{nearest}"):
            weights.load(saved, image_size=size)
    weights.save(tmp_path / "rn", *worlds.make("resnet"))
    with pytest.raises(WeightsError, match="image_size=64: a ResNet takes images of 32 pixels"):
        weights.load(tmp_path / "rn", image_size=64)


def test_positions_of_another_size_than_the_configs(saved, tmp_path):
    """Nothing is interpolated that was not asked for."""
    weights.save(tmp_path / "other", *make(image_size=48, context_length=36))
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    own = load_file(saved / "model.safetensors")
    for name, message in (
        ("vision", r"37 image tokens, and a config of 17 \(image_size=32, .*image_size=N"),
        ("text", "36 text tokens, and a config of 24. .*load with context_length=N"),
    ):
        mixed = tmp_path / name
        weights.save(mixed, *make())
        table = f"{name}_model.embeddings.position_embedding.weight"
        save_file(own | {table: tensors[table]}, mixed / "model.safetensors")
        with pytest.raises(WeightsError, match=f"model.safetensors: positions of {message}"):
            weights.load(mixed)


# --- longer texts


def test_positions_are_stretched_on_request(saved):
    own, params = weights.load(saved)
    backbone, longer = weights.load(saved, context_length=36)
    table, old = (p["text"]["position_embedding"] for p in (longer, params))
    assert table.shape == (36, 64) and backbone.context_length == 36
    np.testing.assert_array_equal(table[:21], old[:21])
    np.testing.assert_allclose(table[22], (old[20] + old[21]) / 2, atol=1e-7)
    np.testing.assert_allclose(table[35], old[23] + 0.75 * (old[23] - old[22]), atol=1e-7)
    assert backbone.tokenizer([LONG]).shape == (1, 36) and own.tokenizer([LONG]).shape == (1, 24)
    assert backbone.weights_id != own.weights_id
    # words that stand where they stood have the features that they had
    ids = own.tokenizer(worlds.TEXTS)
    close(text_features(backbone, longer, ids), text_features(own, params, ids))
    assert positions.stretched_length(77) == 248


def test_texts_that_cannot_be_stretched(saved, tmp_path):
    with pytest.raises(WeightsError, match="context_length=30: texts of 24 .* to 36, as Long-CLIP"):
        weights.load(saved, context_length=30)
    weights.save(tmp_path / "short", *worlds.make())
    with pytest.raises(WeightsError, match="context_length=4: texts of 16 tokens"):
        weights.load(tmp_path / "short", context_length=4)
    weights.save(tmp_path / "blip", *worlds.make_blip(tmp_path))
    with pytest.raises(WeightsError, match="context_length=248: the texts of a BLIP are not"):
        weights.load(tmp_path / "blip", context_length=248)


def long_clip(backbone, params):
    """As Long-CLIP's files: two tables, of which some rows are never used."""
    tensors = worlds.openai_tensors(backbone, params)
    first, rest = tensors["positional_embedding"].copy(), tensors["positional_embedding"].copy()
    first[20:], rest[:20] = 9, -9
    return tensors | {"positional_embedding": first, "positional_embedding_res": rest}


def test_a_long_clip_file_beside_its_vocabulary(tmp_path):
    """A bare state dict: sizes off the shapes, QuickGELU, one table of positions."""
    torch = pytest.importorskip("torch")
    backbone, params = make(context_length=248)
    file = tmp_path / "longclip-B.pt"
    tensors = long_clip(backbone, params)
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, file)
    worlds.write_merges(tmp_path)
    loaded, got = weights.load(file)
    assert loaded.config == backbone.config and loaded.context_length == 248
    np.testing.assert_array_equal(
        got["text"]["position_embedding"], params["text"]["position_embedding"]
    )
    ids = loaded.tokenizer([LONG])
    assert ids.shape[1] > 77
    close(text_features(loaded, got, ids), text_features(backbone, params, ids))
    weights.save(tmp_path / "hf", loaded, got)
    assert weights.load(tmp_path / "hf")[0].weights_id.split("@")[1] in loaded.weights_id
    assert weights.load_architecture(file).config == loaded.config
    tensors["positional_embedding_res"] = tensors["positional_embedding_res"][:77]
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, file)
    with pytest.raises(WeightsError, match=r"positional_embedding_res \(77, 64\): expected two"):
        weights.load(file)


@pytest.mark.peer
def test_a_long_clip_directory_is_transformers(tmp_path):
    """From a text of more than 77 tokens; its tokenizer still says 77, as those of fine-tunes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    backbone, params = make(context_length=248)
    weights.save(tmp_path / "long", backbone, params)
    file = tmp_path / "long" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 77}))
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "long").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "long")
    found, got = weights.load(tmp_path / "long")
    expected = tokenizer([LONG], truncation=True, max_length=248, return_tensors="np")["input_ids"]
    ids = found.tokenizer([LONG])
    assert expected.shape[1] > 77
    np.testing.assert_array_equal(ids[:, : expected.shape[1]], expected)
    with torch.no_grad():
        pooled = theirs.text_model(torch.tensor(expected)).pooler_output
        text = theirs.text_projection(pooled).numpy()
    close(text_features(found, got, ids), text)
