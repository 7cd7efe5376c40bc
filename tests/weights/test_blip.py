"""BLIP in and out: both formats, tokenizer, preprocessing, precision, what does not fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.input import images
from cir_jax.weights import blip, convert
from tests.weights import worlds
from tests.weights.test_clip import digest, edit, equal

# what salesforce's files hold beside the model
EXTRA = {
    "visual_encoder_m.cls_token": (1, 1, 64),
    "text_encoder_m.encoder.layer.0.attention.self.query.weight": (64, 64),
    "vision_proj_m.weight": (16, 64),
    "text_proj_m.bias": (16,),
    "image_queue": (16, 8),
    "text_queue": (16, 8),
    "idx_queue": (1, 8),
    "ptr_queue": (1,),
    "queue_ptr": (1,),
    "temp": (),
    "text_decoder.bert.embeddings.word_embeddings.weight": (4, 4),
    "text_encoder.embeddings.position_ids": (1, 48),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return worlds.make_blip(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture
def saved(tmp_path, made):
    """A Hugging Face directory that a test may break."""
    weights.save(tmp_path / "blip", *made)
    return tmp_path / "blip"


def original(path, made, **more):
    """A file as salesforce's, with BERT's vocab.txt beside it."""
    worlds.make_blip(path.parent)
    tensors = blip.to_tensors(made[1], made[0].config, "salesforce")
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in EXTRA.items()}
    save_file(tensors | more, path)
    return path


def test_a_directory_survives_a_round_trip(tmp_path, saved, made):
    backbone, params = weights.load(saved)
    assert equal(params, made[1]) and backbone.config == made[0].config
    assert backbone.image_transform == images.blip(32)
    assert (backbone.family, backbone.context_length, backbone.dim) == ("blip", 35, 16)
    assert backbone.weights_id.startswith("blip@")
    weights.save(tmp_path / "two", backbone, params)
    for file in saved.iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    assert weights.load_architecture(saved).config == backbone.config


def test_the_original_file_is_the_same_model(tmp_path, saved, made):
    """Momentum copies, queues and the decoder are skipped by name."""
    path = original(tmp_path / "model_base.safetensors", made)
    backbone, params = weights.load(path)
    assert equal(params, made[1]) and backbone.config == made[0].config
    assert backbone.image_transform == images.blip(32)
    assert digest(backbone) == digest(weights.load(saved)[0])
    texts = ["a photo of $ that is red", "Cats, two"]
    np.testing.assert_array_equal(
        backbone.tokenizer(texts), weights.load(saved)[0].tokenizer(texts)
    )
    assert weights.load_architecture(path).config == backbone.config
    with pytest.raises(WeightsError, match="nothing takes .1.: surprise"):
        weights.load(original(path, made, surprise=np.zeros(3, np.float32)))


@pytest.mark.peer
def test_a_pth_file(tmp_path, made):
    torch = pytest.importorskip("torch")
    worlds.make_blip(tmp_path)
    tensors = blip.to_tensors(made[1], made[0].config, "salesforce")
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in EXTRA.items()}
    model = {name: torch.tensor(array) for name, array in tensors.items()}
    torch.save({"model": model, "config": {"vit": "base"}, "epoch": 5}, tmp_path / "base.pth")
    backbone, params = weights.load(tmp_path / "base.pth")
    assert equal(params, made[1]) and backbone.weights_id.startswith("base@")


def test_half_precision_by_choice(tmp_path, made):
    weights.save(tmp_path / "half", *made, jnp.bfloat16)
    wide, as_float = weights.load(tmp_path / "half")
    kept, as_stored = weights.load(tmp_path / "half", jnp.bfloat16, params_dtype=None)
    assert {x.dtype for x in jax.tree.leaves(as_float)} == {np.dtype(np.float32)}
    assert {x.dtype for x in jax.tree.leaves(as_stored)} == {np.dtype(jnp.bfloat16)}
    assert wide.weights_id == kept.weights_id
    near = zip(worlds.features(kept, as_stored), worlds.features(wide, as_float), strict=True)
    for ours, theirs in near:
        np.testing.assert_allclose(ours, theirs, atol=0.05 * np.abs(theirs).max())


def test_tokens_of_bert(made):
    tokenizer = made[0].tokenizer
    words = worlds.WORDPIECES
    row = tokenizer(["A Photo of $, that IS Cats"])[0]
    assert [words[i] for i in row if i] == "[CLS] a photo of $ , that is cat ##s [SEP]".split()
    assert len(row) == 16 and tokenizer.id_of("$") == words.index("$")
    # a special token in a text is text: it would end it too early
    assert (tokenizer(["red [SEP] cat"]) == tokenizer.eos_id).sum() == 1
    assert tokenizer(["a " * 60]).shape == (1, 35)


@pytest.mark.peer
def test_transformers_loads_what_we_export(tmp_path, made, saved):
    """Equal features, equal match, equal ids."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    backbone, params = weights.load(saved)
    model = transformers.BlipForImageTextRetrieval.from_pretrained(saved).eval()
    texts = ["a photo of $ , that is red", "make it two Cats"]
    ids = backbone.tokenizer(texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    theirs = tokenizer(texts, padding="max_length", max_length=ids.shape[1], return_tensors="pt")
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    processor = transformers.AutoImageProcessor.from_pretrained(saved)
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8))
    pixels = processor([picture] * 2, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    with torch.no_grad():
        inputs = {"input_ids": theirs["input_ids"], "attention_mask": theirs["attention_mask"]}
        cosine = model(pixel_values=pixels, use_itm_head=False, **inputs).itm_score
        logits = model(pixel_values=pixels, **inputs).itm_score
    x = pixels.permute(0, 2, 3, 1).numpy()

    @jax.jit
    def run(params):
        image, text = backbone.encode_image(params, x), backbone.encode_text(params, ids)
        image, text = (v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (image, text))
        tokens = backbone.visual_tokens(params, x)
        match = backbone.model.apply({"params": params}, ids, tokens, method="match")
        return image @ text.T, match

    ours, match = run(params)
    np.testing.assert_allclose(ours, cosine, atol=2e-5)
    np.testing.assert_allclose(match, logits, rtol=1e-4, atol=1e-4)


# --- what does not fit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "model.safetensors is missing"),
        ("tokenizer.json", "tokenizer.json is missing: .*hf download google-bert/bert-base-uncas"),
        ("preprocessor_config.json", "preprocessor_config.json is missing"),
    ],
)
def test_missing_files_are_named(saved, name, message):
    (saved / name).unlink()
    with pytest.raises(WeightsError, match=message):
        weights.load(saved)


def test_a_file_without_its_tokenizer(tmp_path, made):
    path = original(tmp_path / "model_base.safetensors", made)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(
        WeightsError, match=f"bert-base-uncased tokenizer.json --local-dir {tmp_path}"
    ):
        weights.load(path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n")
    with pytest.raises(WeightsError, match="SEP. and .PAD. are 2 and 0, the model's 102 and 0"):
        weights.load(path)
    shutil.copy(_clip_tokenizer(tmp_path), tmp_path / "tokenizer.json")
    with pytest.raises(WeightsError, match=r"no token \[CLS\], \[SEP\], \[PAD\], so it belongs to"):
        weights.load(path)


def _clip_tokenizer(path):
    weights.save(path / "clip", *worlds.make())
    return path / "clip" / "tokenizer.json"


def test_leftovers_shapes_and_other_models(saved):
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors | {"text_decoder_x": np.zeros(2, np.float32)}, saved / "model.safetensors")
    with pytest.raises(
        WeightsError, match="model.safetensors: .*nothing takes .1.: text_decoder_x"
    ):
        weights.load(saved)
    wrong = tensors | {"text_proj.weight": np.zeros((16, 63), np.float32)}
    save_file(wrong, saved / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"text_projection/kernel \(63, 16\), expected \(64, 16\)"
    ):
        weights.load(saved)
    writer = {n: t for n, t in tensors.items() if not n.startswith(("text_encoder", "text_proj"))}
    save_file(writer, saved / "model.safetensors")
    with pytest.raises(WeightsError, match="BLIP without the contrastive text encoder"):
        weights.load(saved)
    save_file(tensors, saved.parent / "alone.safetensors")
    with pytest.raises(WeightsError, match="Hugging Face names and no config.json beside it"):
        weights.load(saved.parent / "alone.safetensors")
    edit(saved / "preprocessor_config.json", size={"height": 48, "width": 48})
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(WeightsError, match="images of 48 pixels, but the model takes 32"):
        weights.load(saved)


def test_another_resolution_is_interpolated(saved, made):
    """transformers' and salesforce's way: the config's size decides, the positions follow."""
    config = json.loads((saved / "config.json").read_text())
    edit(saved / "config.json", vision_config=config["vision_config"] | {"image_size": 64})
    edit(saved / "preprocessor_config.json", size={"height": 64, "width": 64})
    backbone, params = weights.load(saved)
    assert params["vision"]["position_embedding"].shape == (1, 17, 64)
    picture = np.zeros((1, 64, 64, 3), np.uint8)
    assert jax.eval_shape(backbone.encode_image, params, picture).shape == (1, 16)


def test_every_parameter_has_one_name_in_each_format(made):
    for layout in ("huggingface", "salesforce"):
        table = blip.names(made[0].config, layout)
        assert equal(convert.to_ours(convert.to_source(made[1], table), table), made[1])
