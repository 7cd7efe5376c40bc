"""SigLIP in and out: round trips, transformers both ways, adapters, what does not fit."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.input import images
from cir_jax.models import lora
from cir_jax.models.lora import LoraConfig
from cir_jax.weights import convert, siglip
from tests.weights import siglip_worlds, worlds
from tests.weights.test_clip import digest, edit, equal

TEXTS = ["A photo of a red Cat!", "costs $5, *now*; it's two cats...", "", "cat, " * 100]


@pytest.fixture(scope="module", params=[1, 2])
def made(request, tmp_path_factory):
    return siglip_worlds.make(tmp_path_factory.mktemp("tokens"), request.param)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return siglip_worlds.make(tmp_path_factory.mktemp("tokens"), 1)


@pytest.fixture
def saved(tmp_path, first):
    """A directory that a test may break."""
    weights.save(tmp_path / "siglip", *first)
    return tmp_path / "siglip"


def png():
    """A picture that is not square, with an alpha channel."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 4), np.uint8)
    pixels[..., 3] = 255
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def features(backbone, params):
    """Of the picture, and of each text, from the file and the strings."""
    pixels = backbone.image_transform(images.decode(png(), "x.png"))[None]
    ids = backbone.tokenizer([backbone.tokenizer.plain(text) for text in TEXTS])

    @jax.jit
    def run(params):
        return backbone.encode_image(params, pixels), backbone.encode_text(params, ids)

    with jax.default_matmul_precision("highest"):
        return run(params)


def assert_close(got, expected):
    for one, other in zip(got, expected, strict=True):
        other = other.detach().numpy()
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


def test_a_directory_survives_a_round_trip(tmp_path, made):
    weights.save(tmp_path / "siglip", *made)
    backbone, params = weights.load(tmp_path / "siglip")
    assert equal(params, made[1]) and backbone.config == made[0].config
    assert backbone.image_transform == made[0].image_transform
    assert (backbone.family, backbone.context_length, backbone.dim) == ("siglip", 64, 32)
    assert params["logit_scale"].shape == params["logit_bias"].shape == ()
    assert (backbone.tokenizer(TEXTS) == made[0].tokenizer(TEXTS)).all()
    weights.save(tmp_path / "two", backbone, params)
    assert digest(weights.load(tmp_path / "two")[0]) == digest(backbone)
    names = {path.name for path in (tmp_path / "two").iterdir()}
    file = "spiece.model" if made[0].tokenizer.canonical else "tokenizer.json"
    assert names == {
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json",
        file,
    }  # fmt: skip
    architecture = weights.load_architecture(tmp_path / "two")
    assert architecture.config == backbone.config and architecture.weights_id == "two@untrained"
    moved = {**params, "logit_bias": params["logit_bias"] + 1}
    weights.save(tmp_path / "moved", backbone, moved)
    assert digest(weights.load(tmp_path / "moved")[0]) != digest(backbone)


def test_every_parameter_has_one_name(made):
    config, params = made[0].config, made[1]
    tensors = siglip.to_tensors(params, config)
    assert tensors["logit_scale"].shape == (1,)
    assert tensors["vision_model.head.attention.in_proj_weight"].shape == (96, 32)
    assert equal(siglip.to_params(tensors, config), params)
    names = siglip.names(config)
    assert equal(convert.to_ours(convert.to_source(params, names), names), params)


def test_precision_is_a_choice(saved):
    backbone, params = weights.load(saved, jnp.bfloat16, params_dtype=None)
    half = jax.eval_shape(
        lambda p: backbone.model.apply(
            {"params": p}, jnp.zeros((1, 18, 18, 3)), jnp.zeros((1, 64), jnp.int32)
        ),
        params,
    )
    assert {leaf.dtype for leaf in half} == {jnp.dtype(jnp.bfloat16)}
    weights.save(saved.parent / "half", backbone, params, np.float16)
    assert load_file(saved.parent / "half" / "model.safetensors")["logit_scale"].dtype == np.float16


# --- transformers


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    pytest.importorskip("sentencepiece")
    return pytest.importorskip("transformers")


def theirs(transformers, path, processor):
    """What transformers makes of the same file and strings: (image, texts)."""
    import torch

    model = transformers.SiglipModel.from_pretrained(path).eval()
    picture = Image.open(io.BytesIO(png()))
    inputs = processor(
        text=TEXTS,
        images=picture,
        padding="max_length",
        truncation=True,
        max_length=64,
        return_tensors="pt",
    )
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad():
        return (
            model.vision_model(pixel_values=pixels).pooler_output,
            model.text_model(input_ids=ids).pooler_output,
        )


def pil(transformers, path):
    """transformers' own processor, on PIL: torchvision resizes to other pixels."""
    return transformers.SiglipProcessor(
        transformers.SiglipImageProcessorPil.from_pretrained(path),
        transformers.AutoTokenizer.from_pretrained(path),
    )


@pytest.mark.peer
@pytest.mark.parametrize("version", [1, 2])
def test_a_directory_of_transformers_has_its_features(tmp_path, transformers, version):
    """From a PNG and strings; images that patches do not fill; a text tower of another width."""
    import torch

    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if version == 1:
        (tmp_path / "spiece.model").write_bytes(siglip_worlds.trained_spiece())
        tokenizer = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
        text, resample = {"hidden_size": 32}, 3
    else:
        state = json.loads(siglip_worlds.gemma().to_str())["model"]
        tokenizer = transformers.Siglip2Tokenizer(
            vocab=state["vocab"],
            merges=list(map(tuple, state["merges"])),
            padding_side="right",
            add_bos_token=False,
            add_eos_token=True,
        )
        text, resample = {"hidden_size": 24, "projection_size": 32}, 2
    config = transformers.SiglipConfig(
        text_config={"vocab_size": len(tokenizer), **text, **shared},
        vision_config={"hidden_size": 32, "image_size": 22, "patch_size": 8, **shared},
    )
    torch.manual_seed(0)
    model = transformers.SiglipModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path / "theirs"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    size = {"height": 22, "width": 22}
    transformers.SiglipImageProcessorPil(size=size, resample=resample).save_pretrained(path)
    backbone, params = weights.load(path)
    assert backbone.image_transform.resample == resample and backbone.config.vision.image_size == 22
    assert (backbone.tokenizer.eos_id, backbone.tokenizer.pad_id) == (1, 2 - version)
    assert_close(features(backbone, params), theirs(transformers, path, pil(transformers, path)))
    if version == 2:  # another image size on request
        larger, resized = weights.load(path, image_size=40)
        pixels = np.random.default_rng(0).integers(0, 255, (1, 40, 40, 3), np.uint8)
        inputs = torch.tensor(pixels.transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32)
        with torch.inference_mode():
            model = transformers.SiglipModel.from_pretrained(path).eval()
            out = model.vision_model(inputs, interpolate_pos_encoding=True).pooler_output
        ours = jax.jit(larger.encode_image)(resized, pixels)
        np.testing.assert_allclose(ours, out, atol=1e-5 * np.abs(out.numpy()).max())
        assert weights.load(path, image_size=22)[0].weights_id == backbone.weights_id
        with pytest.raises(WeightsError, match="the texts of a SigLIP are always 64 tokens long"):
            weights.load(path, context_length=248)


@pytest.mark.peer
def test_transformers_loads_what_we_export(tmp_path, transformers, made):
    weights.save(tmp_path / "ours", *made)
    path = tmp_path / "ours"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = [text for text in TEXTS if "$" not in text]
    inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=64)
    assert set(inputs) == {"input_ids"}  # no mask: their model would hide the padding
    np.testing.assert_array_equal(made[0].tokenizer(texts), inputs["input_ids"])
    assert tokenizer.model_max_length == 64
    processor = transformers.AutoProcessor.from_pretrained(path)
    assert type(processor).__name__ == "SiglipProcessor"
    assert type(processor.image_processor).__name__.startswith("SiglipImageProcessor")
    assert_close(features(*made), theirs(transformers, path, pil(transformers, path)))


@pytest.mark.peer
def test_peft_merges_what_we_save_to_our_merged_weights(tmp_path, transformers, first):
    peft = pytest.importorskip("peft")
    backbone, params = first
    config = LoraConfig(rank=3, alpha=6.0)
    adapter = lora.init(jax.random.key(0), params, config.pattern, config.rank)
    # queries and values of both towers' layers, not of the pool, which PEFT cannot adapt
    assert len(lora.pairs(adapter)) == 4
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.2, x.shape)), adapter)
    weights.save(tmp_path / "base", backbone, params)
    weights.save_adapter(tmp_path / "adapter", adapter, config, backbone)
    got, _ = weights.load_adapter(tmp_path / "adapter", backbone)
    assert equal(got, adapter)
    model = transformers.SiglipModel.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    expected = siglip.to_tensors(lora.merge(params, adapter, config.scale), backbone.config)
    found = {name: tensor.detach().numpy() for name, tensor in adapted.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-5, err_msg=name)


# --- what does not fit


def test_the_pool_is_no_module_that_adapters_fit(tmp_path, first):
    backbone, params = first
    pattern = r"vision/pool/pool_attention/query/kernel"
    adapter = lora.init(jax.random.key(0), params, pattern, 2)
    with pytest.raises(WeightsError, match="vision/pool/pool_attention/query/kernel is no module"):
        weights.save_adapter(tmp_path / "adapter", adapter, LoraConfig(pattern, 2), backbone)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "model.safetensors is missing"),
        ("spiece.model", "tokenizer.json is missing: .*It is spiece.model of SigLIP, tokenizer.js"),
        ("preprocessor_config.json", "preprocessor_config.json is missing"),
    ],
)
def test_missing_files_are_named(saved, name, message):
    (saved / name).unlink()
    with pytest.raises(WeightsError, match=message):
        weights.load(saved)


def test_tokenizers_that_do_not_fit(saved):
    (saved / "spiece.model").unlink()
    weights.save(saved.parent / "clip", *worlds.make())
    shutil.copy(saved.parent / "clip" / "tokenizer.json", saved)
    with pytest.raises(WeightsError, match="tokenizer.json: no token </s>, so it belongs to anoth"):
        weights.load(saved)
    siglip_worlds.tokenizer(saved, 2).save(saved / "tokenizer.json")
    (saved / "spiece.model").unlink(missing_ok=True)
    (saved / "tokenizer_config.json").unlink()
    with pytest.raises(WeightsError, match=r"siglip: the tokenizer has \d+ tokens, the model only"):
        weights.load(saved)
    (saved / "tokenizer_config.json").write_text('{"padding_side": "left"}')
    with pytest.raises(
        WeightsError, match="tokenizer_config.json: padding_side 'left': SigLIP was"
    ):
        weights.load(saved)


def test_settings_of_the_tokenizer_are_honoured(saved):
    """A length of its own, as padding="max_length" takes it; case; tokens in either spelling."""
    edit(saved / "tokenizer_config.json", model_max_length=16, do_lower_case=False)
    tokenizer = weights.load_architecture(saved).tokenizer
    assert tokenizer(["a cat"]).shape == (1, 16)
    assert (tokenizer(["a CAT"]) != tokenizer(["a cat"])).any()
    assert tokenizer.to_dict()["do_lower_case"] is False
    edit(saved / "tokenizer_config.json", model_max_length=10**30, pad_token={"content": "<pad>"})
    tokenizer = weights.load_architecture(saved).tokenizer
    assert (tokenizer.context_length, tokenizer.eos_id, tokenizer.pad_id) == (64, 1, 0)
    edit(saved / "tokenizer_config.json", pad_token="<none>")
    with pytest.raises(WeightsError, match="spiece.model: no token </s> or <none>"):
        weights.load_architecture(saved)


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        ("vision", {"vision_use_head": False}, "vision_use_head=False: no head that embeds"),
        ("vision", {"num_channels": 1}, "num_channels=1 .only 3 is built here"),
        ("vision", {"image_size": [18, 36]}, r"image_size=\[18, 36\]: expected a whole number"),
        ("text", {"projection_size": 24}, "text features of 24 and image features of 32"),
        ("text", {"projection_size": None}, "text features of 24 and image features of 32"),
        ("text", {"hidden_act": "swish"}, "activation 'swish'"),
    ],
)
def test_configs_of_other_networks_are_refused(saved, tower, changes, message):
    config = json.loads((saved / "config.json").read_text())
    name = f"{tower}_config"
    edit(saved / "config.json", **{name: config[name] | changes})
    with pytest.raises(WeightsError, match=message):
        weights.load(saved)


def test_relatives_are_refused_by_name(saved):
    edit(saved / "config.json", model_type="siglip2")
    with pytest.raises(WeightsError, match=r"config.json: model_type 'siglip2', .*NaFlex.*224\."):
        weights.load(saved)
    edit(saved / "config.json", model_type="siglip_vision_model")
    with pytest.raises(
        WeightsError, match="'siglip_vision_model', expected 'clip' or 'blip' or 'si"
    ):
        weights.load(saved)
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors, saved.parent / "alone.safetensors")
    with pytest.raises(
        WeightsError, match="alone.safetensors: SigLIP and no config.json beside it"
    ):
        weights.load(saved.parent / "alone.safetensors")
    with pytest.raises(
        WeightsError, match="weights of siglip, expected CLIP. Only the towers of tw"
    ):
        edit(saved / "config.json", model_type="siglip")
        weights.load(f"{saved}+{saved}")


def test_leftovers_shapes_and_other_models(saved, first):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"surprise": np.zeros(2, np.float32)}, file)
    with pytest.raises(WeightsError, match="model.safetensors: .*nothing takes .1.: surprise"):
        weights.load(saved)
    save_file({n: t for n, t in tensors.items() if n != "logit_bias"}, file)
    with pytest.raises(WeightsError, match="Missing tensors .1.: logit_bias"):
        weights.load(saved)
    wide = np.zeros((5, 32), np.float32)
    save_file(tensors | {"vision_model.embeddings.position_embedding.weight": wide}, file)
    with pytest.raises(
        WeightsError, match=r"vision/position_embedding \(5, 32\), expected \(4, 32\)"
    ):
        weights.load(saved)
    save_file({n: t for n, t in tensors.items() if n.startswith("vision_model")}, file)
    with pytest.raises(WeightsError, match="expected SigLIP with both towers"):
        weights.load(saved)
    save_file(tensors, file)
    edit(saved / "preprocessor_config.json", size={"height": 24, "width": 24})
    with pytest.raises(WeightsError, match="images of 24 pixels, but the model takes 18"):
        weights.load(saved)
