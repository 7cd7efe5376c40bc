"""Adapters that PEFT made, loaded on the base: features of a text and a PNG equal PEFT's own."""

import jax
import numpy as np
import pytest
from PIL import Image

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.models import lora
from tests.weights import worlds
from tests.weights.test_peft import drawn, rewritten, torch_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A saved CLIP, a text, a PNG: (directory, ours of them, PyTorch's of them).

    ours: (params) -> unit image and text features; theirs: (transformers' CLIPModel) -> the same.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("base")
    backbone, params = worlds.make()
    weights.save(path, backbone, drawn(params, 3))
    backbone, _ = weights.load(path)
    text = "a photo of a red cat"
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path / "cat.png")
    inputs = transformers.AutoTokenizer.from_pretrained(path)([text], return_tensors="pt")
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    inputs |= processor([Image.open(path / "cat.png")], return_tensors="pt")

    @jax.jit
    def encode(params, images, ids):
        return backbone.encode_image(params, images), backbone.encode_text(params, ids)

    def ours(params):
        images = backbone.image_transform(Image.open(path / "cat.png"))[None]
        made = encode(params, images, backbone.tokenizer([text]))
        return [np.asarray(x / np.linalg.norm(x)) for x in made]

    def theirs(model):
        model = getattr(model, "get_base_model", lambda: model)()
        with torch.no_grad():
            out = model.eval()(**inputs)
        return [out.image_embeds.numpy(), out.text_embeds.numpy()]

    return path, ours, theirs


def error(one, other):
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in zip(one, other, strict=True))


def trained(model):
    """A PEFT model whose adapter has moved from where it started."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(path, start, inputs=None, modules=("q_proj", "out_proj"), **fields):
    """transformers' model of `path` with PEFT's adapter, as its authors say to make one."""
    import peft as theirs
    from peft.tuners.lora import corda, loraga

    model = torch_model(path, "clip")
    made = {
        "corda": {"corda_config": theirs.tuners.lora.config.CordaConfig()},
        "lora_ga": {
            "lora_ga_config": theirs.tuners.lora.config.LoraGAConfig("A2rBr", stable_gamma=1)
        },
    }.get(start, {})
    settings = theirs.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(modules), init_lora_weights=start, **made, **fields
    )
    if start == "corda":
        corda.preprocess_corda(model, settings, run_model=lambda: inputs(model))
    if start == "lora_ga":
        loraga.preprocess_loraga(model, settings, lambda: inputs(model))
    return theirs.get_peft_model(model, settings)


@pytest.mark.peer
@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "lora_ga"])
def test_starts_that_change_the_base_load_when_peft_converted_them(tmp_path, world, start):
    """Refused as they are: they would give far other features. Converted: the original's."""
    path, ours, theirs = world

    def run(model):
        features = theirs(model)
        if start == "lora_ga":
            import torch

            ids = torch.tensor([[514, 64, 65, 515]])
            pixels = torch.ones(1, 3, 16, 16)
            out = model(input_ids=ids, pixel_values=pixels)
            (out.text_embeds.sum() + out.image_embeds.sum()).backward()
        return features

    model = adapted(path, start, run)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    expected = theirs(trained(model))
    model.save_pretrained(tmp_path / "plain")
    backbone, params = weights.load(path)
    with pytest.raises(WeightsError, match=f"init_lora_weights='{start}' changed the base weights"):
        weights.load_adapter(tmp_path / "plain", backbone)
    rewritten(tmp_path / "plain", {"init_lora_weights": True})
    adapter, config = weights.load_adapter(tmp_path / "plain", backbone)
    assert error(ours(lora.merge(params, adapter, config.scale)), expected) > 0.003
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    adapter, config = weights.load_adapter(tmp_path / "converted", backbone)
    assert (config.rank, config.alpha) == (8, 12)
    assert error(ours(lora.merge(params, adapter, config.scale)), expected) < 1e-5
    assert error(ours(params), expected) > 0.003


@pytest.mark.peer
@pytest.mark.parametrize(
    "start, fields",
    [
        (True, {"rank_pattern": {r".*text_model.*q_proj": 2, "fc2": 6}, "use_rslora": True}),
        ("gaussian", {"alpha_pattern": {"^vision_model.*": 9, "q_proj": 1, "_proj": 30}}),
        ("orthogonal", {"layers_to_transform": [0], "task_type": "FEATURE_EXTRACTION"}),
        ("mica", {"exclude_modules": ["fc2"], "lora_dropout": 0.5}),
        (False, {"alpha_pattern": {"proj": 9}, "rank_pattern": {"j": 2, "l.*c2": 3}}),
    ],
)
def test_other_starts_load_as_they_are(tmp_path, world, start, fields):
    """With ranks and scales by pattern, as PEFT itself understands the patterns."""
    import peft as library

    path, ours, theirs = world
    model = trained(adapted(path, start, modules=["q_proj", "out_proj", "fc2"], **fields))
    model.save_pretrained(tmp_path)
    expected = theirs(model)
    # what PEFT makes of the file, where the patterns are sorted
    again = library.PeftModel.from_pretrained(torch_model(path, "clip"), tmp_path)
    backbone, params = weights.load(path)
    adapter, config = weights.load_adapter(tmp_path, backbone)
    got = ours(lora.merge(params, adapter, config.scale))
    assert error(got, theirs(again)) < 1e-5
    assert error(got, expected) < 1e-5
    assert error(ours(params), expected) > 0.003


@pytest.mark.peer
@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPVisionModelWithProjection", "add_adapter"])
def test_adapters_of_a_tower_alone(tmp_path, world, name):
    """Also with transformers' own `add_adapter`, which writes no class."""
    import peft as library
    import transformers

    path, ours, theirs = world
    own = name == "add_adapter"
    tower = getattr(transformers, "CLIPTextModel" if own else name).from_pretrained(path)
    settings = library.LoraConfig(r=2, target_modules=["v_proj", "patch_embedding"])
    if own:
        tower.add_adapter(settings)
        trained(tower).save_pretrained(tmp_path)
    else:
        trained(library.get_peft_model(tower, settings)).save_pretrained(tmp_path)
    backbone, params = weights.load(path)
    adapter, config = weights.load_adapter(tmp_path, backbone)
    side = "vision" if "Vision" in name else "text"
    assert list(adapter) == [side]
    assert ("patch_embedding" in adapter[side]) == (side == "vision")
    whole = torch_model(path, "clip")
    part = getattr(whole, f"{side}_model")
    source = tower.base_model if own else tower
    setattr(whole, f"{side}_model", getattr(source, f"{side}_model", source))
    assert part is not getattr(whole, f"{side}_model")
    assert error(ours(lora.merge(params, adapter, config.scale)), theirs(whole)) < 1e-5
    assert error(ours(params), theirs(whole)) > 0.01


@pytest.mark.peer
@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"target_modules": ["token_embedding", "q_proj"]},
            "embedding_A belongs to an adapted emb",
        ),
        ({"target_modules": ["position_embedding"]}, "embedding_A belongs to an adapted embedding"),
        ({"trainable_token_indices": {"token_embedding": [3]}}, "'trainable_token_indices'.*merge"),
        ({"use_dora": True}, "'use_dora': True.*merge_and_unload"),
        ({"lora_bias": True}, "'lora_bias': True"),
        ({"bias": "lora_only"}, "'bias': 'lora_only'"),
        ({"modules_to_save": ["visual_projection"]}, r"'modules_to_save': \['visual_projection'\]"),
    ],
)
def test_what_peft_saves_and_cannot_be_loaded_says_so(tmp_path, world, fields, message):
    import peft as library

    settings = library.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | fields)
    library.get_peft_model(torch_model(world[0], "clip"), settings).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=message):
        weights.load_adapter(tmp_path, weights.load(world[0])[0])
