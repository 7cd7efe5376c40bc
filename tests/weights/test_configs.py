"""What configs and tokenizer files say, as transformers takes it, or refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from cir_jax.models.transformer import ACTIVATIONS
from cir_jax.weights import beside, configs
from tests.weights import worlds

START, END = worlds.VOCABULARY - 2, worlds.VOCABULARY - 1


@pytest.fixture
def saved(tmp_path):
    """A Hugging Face directory that a test may break."""
    weights.save(tmp_path / "clip", *worlds.make())
    return tmp_path / "clip"


def edit(path, **changes):
    """Sets fields of a JSON file; a dictionary changes the fields of the one that is there."""
    values = json.loads(path.read_text())
    for name, value in changes.items():
        inner = values.get(name)
        values[name] = inner | value if isinstance(value, dict) and inner else value
    path.write_text(json.dumps(values))


# --- tokens


@pytest.mark.parametrize(
    "says", [{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}, {"eos_token_id": END}, {}]
)
def test_start_and_end_come_from_the_tokenizer(saved, says):
    """As published: 0, 2 and 1; right; missing. The features are the same, to the bit."""
    expected = worlds.features(*weights.load(saved))
    values = json.loads((saved / "config.json").read_text())
    text = {k: v for k, v in values["text_config"].items() if not k.endswith("_token_id")} | says
    (saved / "config.json").write_text(json.dumps(values | {"text_config": text}))
    backbone, params = weights.load(saved)
    ids = backbone.tokenizer(worlds.TEXTS)
    assert ids[:, 0].tolist() == [START, START] and (ids == END).any(axis=1).all()
    assert backbone.config.text.bos_token_id == START
    for ours, theirs in zip(worlds.features(backbone, params), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_other_tokens_are_other_weights(saved):
    """What was stored under them, features and words, is not taken up."""
    first = weights.load(saved)[0].weights_id
    edit(saved / "tokenizer_config.json", pad_token="$")
    second = weights.load(saved)[0].weights_id
    edit(saved / "tokenizer_config.json", bos_token="*")
    third = weights.load(saved)[0].weights_id
    assert len({first, second, third}) == 3


@pytest.mark.peer
def test_transformers_makes_the_same_ids_of_what_was_saved(tmp_path, saved):
    """BPE and one token per word; without a post-processor in the file that was read, too."""
    transformers = pytest.importorskip("transformers")
    content = json.loads((saved / "tokenizer.json").read_text())
    (saved / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    for source in (saved, "data/shapes/clip"):
        backbone, params = weights.load(source)
        weights.save(tmp_path / "again", backbone, params)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
        texts = ["a red cat", "$ that is red", ""]
        length = backbone.context_length
        expected = theirs(texts, padding="max_length", max_length=length, truncation=True)
        assert backbone.tokenizer(texts, length).tolist() == expected["input_ids"]
        shutil.rmtree(tmp_path / "again")


# --- fields


def test_the_older_dictionaries_replace_the_newer(saved):
    """Every field of text_config, by the class's default where the dictionary leaves it out."""
    both = {"hidden_size": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "eos_token_id": 2}
    config = ClipConfig.from_dict(
        {
            "text_config": both,
            "text_config_dict": {"hidden_size": 16},
            "vision_config": {"hidden_size": 24, "hidden_act": "gelu"},
            "vision_config_dict": None,
        }
    )
    assert config.text == TextConfig(hidden_size=16)
    assert config.vision == VisionConfig(hidden_size=24, hidden_act="gelu")
    assert ClipConfig.from_dict({"vision_config_dict": {"patch_size": 16}}).vision.patch_size == 16


@pytest.mark.peer
def test_configs_are_read_as_transformers_does():
    configuration = pytest.importorskip("transformers.models.clip.configuration_clip")
    tower = {"hidden_size": 16, "num_attention_heads": 2, "hidden_act": "gelu"}
    for values in (
        {"text_config": tower, "vision_config": tower},
        {"text_config": tower, "text_config_dict": None, "vision_config_dict": {"patch_size": 16}},
        {"text_config": tower, "text_config_dict": {"hidden_size": 32}, "projection_dim": 24},
        {"text_config": {**tower, "layer_norm_eps": 1e-6}, "text_config_dict": {}},
    ):
        ours = ClipConfig.from_dict(values)
        theirs = configuration.CLIPConfig(**values)
        for part in ("text", "vision"):
            expected = getattr(theirs, f"{part}_config")
            for name, value in vars(getattr(ours, part)).items():
                assert value == getattr(expected, name), (values, part, name)


def test_the_joint_dimension_is_that_of_the_tensors(saved):
    """Published configs say it in four places, some of them wrong."""
    edit(saved / "config.json", projection_dim=512, text_config={"projection_dim": 7})
    assert weights.load(saved)[0].dim == 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rms_norm": True}, "config.json: use_rms_norm=True: fields that are not known here"),
        ({"text_config": {"qkv_bias": False}}, "config.json: text_config: qkv_bias=False"),
        ({"vision_config": {"num_channels": 4}}, "vision_config: num_channels=4"),
        ({"text_config_dict": {"rope_theta": 1}}, "text_config_dict: rope_theta=1"),
        ({"quantization_config": {"bits": 4}}, "Give the weights as they were before quantisation"),
        ({"text_config": {"num_attention_heads": 0}}, "num_attention_heads=0: expected a whole"),
        ({"text_config": {"hidden_size": "64"}}, "hidden_size='64': expected a whole number, 1"),
        ({"vision_config": {"image_size": [16, 8]}}, r"image_size=\[16, 8\]: expected a whole"),
        ({"vision_config": {"layer_norm_eps": 0}}, "layer_norm_eps=0: expected a number between"),
        ({"vision_config": {"hidden_act": "swiglu"}}, "unknown activation 'swiglu'"),
        ({"text_config": [1]}, "config.json: text_config: expected a JSON object"),
    ],
)
def test_fields_that_cannot_be(saved, changes, message):
    edit(saved / "config.json", **changes)
    with pytest.raises(WeightsError, match=message):
        weights.load(saved)


def test_fields_that_say_nothing(saved):
    first = weights.load(saved)[0].weights_id
    edit(
        saved / "config.json",
        **{"_name_or_path": "/home/me", "_commit_hash": None, "torch_dtype": "float16"},
        text_config={"attention_dropout": 0.1, "max_length": 20, "unheard_of": None},
        vision_config={"image_size": [16, 16], "pruned_heads": {}, "num_channels": 3},
    )
    assert weights.load(saved)[0].weights_id == first


@pytest.mark.peer
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"])
def test_activations_are_transformers(act):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.activations").ACT2FN[act]
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    expected = theirs(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[act](x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.peer
def test_every_field_that_transformers_writes_is_known():
    """A new version of it may write more; whether they change the network is to be looked up."""
    transformers = pytest.importorskip("transformers")
    for family in ("CLIP", "Blip"):
        for part in ("Text", "Vision"):
            theirs = getattr(transformers, f"{family}{part}Config")().to_dict()
            read = frozenset({"projection_dim", *vars(TextConfig()), *vars(VisionConfig())})
            configs.check(theirs, read | {"encoder_hidden_size", "sep_token_id"}, family + part)
    configs.check(transformers.T5Config().to_dict(), weights.t5.FIELDS, "T5")


@pytest.mark.peer
def test_images_that_patches_do_not_fill(saved):
    """The pixels on the right and below count for nothing, as of a convolution."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    edit(saved / "config.json", vision_config={"image_size": 21})
    edit(
        saved / beside.PREPROCESSING,
        size={"shortest_edge": 21},
        crop_size={"height": 21, "width": 21},
    )
    backbone, params = weights.load(saved)
    pixels = np.random.default_rng(0).integers(0, 255, (1, 21, 21, 3), np.uint8)
    mean, std = backbone.image_transform.statistics
    inputs = ((pixels / np.float32(255) - mean) / std).astype(np.float32)
    with torch.inference_mode():
        model = transformers.CLIPModel.from_pretrained(saved).eval()
        pooled = model.vision_model(torch.from_numpy(inputs.transpose(0, 3, 1, 2))).pooler_output
        expected = model.visual_projection(pooled).numpy()
    got = jax.jit(backbone.encode_image)(params, pixels)
    # within 1e-5 as a user compiles; tests compile cheaply (tests/conftest.py), here to 2e-5
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


# --- one tower


@pytest.fixture
def towers(tmp_path):
    """As diffusers lays them out: {half: directory}, and the whole model that they are parts of."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    weights.save(tmp_path / "whole", *worlds.make())
    whole = transformers.CLIPModel.from_pretrained(tmp_path / "whole")
    text = transformers.CLIPTextModel(whole.config.text_config)
    image = transformers.CLIPVisionModelWithProjection(whole.config.vision_config)
    for part in (text, image):
        state = whole.state_dict()
        named = {
            name: state[name if name in state else f"text_model.{name}"]
            for name in part.state_dict()
        }
        part.load_state_dict(named)
    with torch.inference_mode():
        text.save_pretrained(tmp_path / "text_encoder_2")
        image.save_pretrained(tmp_path / "image_encoder")
    for folder, names in (
        ("tokenizer_2", ("tokenizer.json", "tokenizer_config.json")),
        ("feature_extractor", (beside.PREPROCESSING,)),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            shutil.copy(tmp_path / "whole" / name, tmp_path / folder)
    return tmp_path


@pytest.mark.peer
def test_towers_alone_make_a_pair(towers):
    """Flat configs and tensors without the tower's prefix; parts of diffusers lie beside."""
    pair, params = weights.load(f"{towers / 'image_encoder'}+{towers / 'text_encoder_2'}")
    whole, whole_params = weights.load(f"{towers / 'whole'}+{towers / 'whole'}")
    for half in ("image", "text"):
        ours, theirs = params[half], whole_params[half]
        assert jax.tree.all(
            jax.tree.map(np.array_equal, ours, theirs | {"logit_scale": ours["logit_scale"]})
        )
    assert pair.tokenizer.identity == whole.tokenizer.identity
    assert pair.image_transform == whole.image_transform
    assert pair.config.vision == whole.config.vision and pair.dim == 24
    assert pair.text_model.config.text == whole.text_model.config.text
    assert (
        weights.load_architecture(
            f"{towers / 'image_encoder'}+{towers / 'text_encoder_2'}"
        ).token_dim
        == 64
    )


@pytest.mark.peer
def test_a_tower_alone_is_no_backbone(towers):
    image, text = towers / "image_encoder", towers / "text_encoder_2"
    with pytest.raises(WeightsError, match="model_type 'clip_text_model', one tower of a CLIP"):
        weights.load(text)
    with pytest.raises(WeightsError, match="'clip_text_model', expected the image tower of a CLIP"):
        weights.load(f"{text}+{image}")
    shutil.rmtree(towers / "tokenizer_2")
    with pytest.raises(WeightsError, match="text_encoder_2/tokenizer.json is missing"):
        weights.load(f"{image}+{text}")
