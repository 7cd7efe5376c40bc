"""Encoders that are no backbone: T5, and timm's light encoders, by directory, name or file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from cir_jax import weights
from cir_jax.errors import ConfigError, DataError, WeightsError
from cir_jax.models import light
from cir_jax.models.backbone import pixels
from cir_jax.models.t5 import T5Config, T5Encoder
from cir_jax.storage.places import SHIPPED
from cir_jax.weights import t5, timm
from tests.weights import worlds
from tests.weights.test_clip import edit, equal

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
T5 |= {"vocab_size": 40, "feed_forward_proj": "gated-gelu", "model_type": "t5"}
LIGHT = "mobilenetv2_035"


def random_tree(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.uniform(0.05, 0.3, x.shape)), shapes)


def write_t5(path):
    """A random T5 in Hugging Face format; returns its parameters."""
    path.mkdir()
    config = T5Config.from_dict(T5)
    params = random_tree(t5.shapes(T5Encoder(config)))
    save_file(t5.to_tensors(params, config), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(T5))
    pieces = [
        "<pad>",
        "</s>",
        "<unk>",
        "\u2581",
        "\u2581a",
        "\u2581red",
        "\u2581cat",
        "s",
        "\u2581$",
    ]
    scores = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return params


@pytest.fixture
def t5_directory(tmp_path):
    return tmp_path / "t5", write_t5(tmp_path / "t5")


@pytest.fixture(scope="module")
def light_variables():
    return random_tree(timm.shapes(light.create(LIGHT)))


@pytest.fixture
def light_directory(tmp_path, light_variables):
    path = tmp_path / "light"
    path.mkdir()
    tensors = timm.to_tensors(light_variables, light.create(LIGHT))
    tensors["classifier.weight"] = np.zeros((3, 4), np.float32)
    save_file(tensors, path / "model.safetensors")
    cfg = {"input_size": [3, 160, 160], "crop_pct": 0.95, "interpolation": "bicubic"}
    cfg |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop_mode": "center"}
    config = {"architecture": LIGHT, "num_classes": 1000, "pretrained_cfg": cfg}
    (path / "config.json").write_text(json.dumps(config))
    return path


# --- T5


def test_a_t5_directory(t5_directory):
    path, params = t5_directory
    encoder, got = weights.load_encoder(path)
    assert equal(got, params) and encoder.weights_id.startswith("t5@")
    assert (encoder.dim, encoder.context_length) == (32, 512)
    ids = encoder.tokenizer(["a red cats", "red"])
    assert ids.tolist() == [[4, 5, 6, 7, 1, 0, 0, 0], [5, 1, 0, 0, 0, 0, 0, 0]]
    assert encoder.tokenizer.id_of("$") == 8
    run = jax.jit(encoder.hidden_states)
    states = run(got, ids)
    longer = run(got, encoder.tokenizer(["a red cats", "red"], 12))
    words = ids != 0
    np.testing.assert_allclose(states[words], longer[:, :8][words], atol=1e-5)  # padding is masked
    half, stored = weights.load_encoder(path, "", jnp.bfloat16, params_dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(stored)} == {np.dtype(jnp.bfloat16)}
    assert jax.eval_shape(half.hidden_states, stored, ids).dtype == jnp.bfloat16


@pytest.mark.peer
def test_a_t5_directory_beside_transformers(t5_directory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    encoder, params = weights.load_encoder(t5_directory[0])
    model = transformers.T5EncoderModel.from_pretrained(t5_directory[0]).eval()
    ids = encoder.tokenizer(["a red cats", "red"])
    with torch.no_grad():
        mask = torch.tensor(ids != 0).long()
        expected = model(torch.tensor(ids).long(), attention_mask=mask).last_hidden_state.numpy()
    ours = np.asarray(jax.jit(encoder.hidden_states)(params, ids))
    words = ids != 0
    assert np.abs(ours - expected)[words].max() < 1e-5 * np.abs(expected).max()


def test_t5_that_does_not_fit(t5_directory):
    path, _ = t5_directory
    encoder, params = weights.load_encoder(path)
    with pytest.raises(DataError, match="row 0, position 1: token id 40 is not one of the model's"):
        encoder.hidden_states(params, np.array([[3, 40]]))
    with pytest.raises(DataError, match="batch of no texts"):
        encoder.hidden_states(params, np.zeros((0, 4), np.int32))
    edit(path / "config.json", vocab_size=5)
    with pytest.raises(WeightsError, match="the tokenizer has 9 tokens, the model only 5"):
        weights.load_encoder(path)
    edit(path / "config.json", vocab_size=40, num_heads=8)
    with pytest.raises(WeightsError, match=r"relative_bias \(32, 4\), expected \(32, 8\)"):
        weights.load_encoder(path)
    edit(path / "config.json", num_heads=4, feed_forward_proj="gated-silu")
    edit(path / "config.json", feed_forward_proj="gated-gelu", use_rms_norm=False)
    with pytest.raises(WeightsError, match="config.json: use_rms_norm=False: fields that are not"):
        weights.load_encoder(path)
    edit(path / "config.json", use_rms_norm=None, feed_forward_proj="gated-tanh")
    with pytest.raises(WeightsError, match="unknown activation of a T5 'tanh'"):
        weights.load_encoder(path)
    edit(path / "config.json", feed_forward_proj="gated-gelu")
    save_file(
        {**load_file(path / "model.safetensors"), "x": np.zeros(1)}, path / "model.safetensors"
    )
    with pytest.raises(WeightsError, match="nothing takes .1.: x"):
        weights.load_encoder(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="hf download google/flan-t5-small spiece.model --lo"):
        weights.load_encoder(path)


# --- light encoders


def test_a_timm_directory(light_directory, light_variables):
    encoder, variables = weights.load_encoder(light_directory)
    assert equal(variables, light_variables)
    transform = encoder.image_transform
    assert (transform.resize, transform.crop) == (168, 160) and transform.mean == (0.5, 0.5, 0.5)
    assert transform.round_offset and not transform.squash
    images = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
    normalised = (np.float32(images) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(pixels(images, transform), normalised, atol=1e-6)
    feature_map = jax.eval_shape(encoder.feature_map, variables, images)
    assert feature_map.shape == (2, 1, 1, encoder.dim)
    trained, stats = jax.eval_shape(encoder.train_feature_map, variables, images)
    assert trained.shape == feature_map.shape
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    with pytest.raises(DataError, match="batch of no images"):
        encoder.feature_map(variables, images[:0])


def test_a_file_with_its_name(light_directory, light_variables, tmp_path):
    file = tmp_path / "mobile.safetensors"
    (light_directory / "model.safetensors").rename(file)
    encoder, variables = weights.load_encoder(file, LIGHT)
    assert equal(variables, light_variables) and encoder.weights_id.startswith("mobile@")
    assert (encoder.image_transform.resize, encoder.image_transform.crop) == (256, 224)
    with pytest.raises(WeightsError, match="EfficientNet or MobileNetV2 of timm, and no config.js"):
        weights.load_encoder(file)
    with pytest.raises(WeightsError, match="mobile.safetensors: wrong shapes: .*expected"):
        weights.load_encoder(file, "mobilenetv2_050")
    with pytest.raises(ConfigError, match="unknown light encoder 'mobilenetv2_03'. Did you mean"):
        weights.load_encoder(file, "mobilenetv2_03")
    with pytest.raises(WeightsError, match="Missing tensors .*blocks"):
        weights.load_encoder(file, "efficientnet_b0")


def test_timms_names_are_hub_ids():
    for name in (
        "mobilenetv2_100",
        "mobilenetv2_100.ra_in1k",
        "hf_hub:timm/mobilenetv2_100.ra_in1k",
    ):
        assert timm.hub_id(name) == "timm/mobilenetv2_100.ra_in1k"
    assert timm.hub_id("efficientnet_b0.ns_jft") == "timm/efficientnet_b0.ns_jft"
    assert timm.hub_id("google/t5-v1_1-xl") == "google/t5-v1_1-xl"
    with pytest.raises(WeightsError, match="mobilenetv2_035': say which of timm's weights"):
        timm.hub_id(LIGHT)
    # of the encoders in the fixture of true shapes, the default transform is timm's
    shapes = json.loads((SHIPPED / "tests/golden/light_shapes.json").read_text())
    for name in timm.TAGS:
        known, transform = shapes[name], timm.image_transform(name, {})
        assert transform.crop == known["default_input_size"][1]
        assert transform.resize == int(transform.crop / known["crop_pct"])
        assert list(transform.mean) == known["default_mean"]
        assert list(transform.std) == known["default_std"]


def test_each_loader_names_the_other(light_directory, t5_directory, tmp_path):
    with pytest.raises(WeightsError, match="light/config.json: model_type 'timm', expected 'clip'"):
        weights.load(light_directory)
    with pytest.raises(WeightsError, match="t5/config.json: model_type 't5', .*load_encoder"):
        weights.load(t5_directory[0])
    weights.save(tmp_path / "clip", *worlds.make())
    with pytest.raises(WeightsError, match="model_type 'clip', expected 't5'.*weights.load"):
        weights.load_encoder(tmp_path / "clip")
    with pytest.raises(WeightsError, match="encoder 'nowhere': no such directory"):
        weights.load_encoder("nowhere")
    edit(light_directory / "config.json", pretrained_cfg={"crop_mode": "border"})
    with pytest.raises(WeightsError, match="crop_mode 'border' .*expected 'center' or 'squash'"):
        weights.load_encoder(light_directory)
