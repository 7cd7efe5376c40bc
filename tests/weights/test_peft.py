"""LoRA adapters in PEFT's format: names and shapes, round trips, and PEFT itself."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.models import light, lora
from cir_jax.models.encoders import ImageEncoder, TextEncoder
from cir_jax.models.lora import LoraConfig
from cir_jax.models.t5 import T5Config, T5Encoder
from cir_jax.weights import peft, t5, timm
from cir_jax.weights.convert import flatten
from tests.weights import worlds

ATTENTION = r".*/attention/(query|value)/kernel"


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.normal(0, 0.2, x.shape)), shapes)


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    """Name -> (owner, its params, a pattern of what is adapted)."""
    text = T5Encoder(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=20, num_layers=1))
    image = light.create("mobilenetv2_035")
    transform = timm.image_transform("mobilenetv2_035", {})
    return {
        "clip": (*worlds.make(), ATTENTION),
        "clip patches": (*worlds.make(), r"vision/patch_embedding/kernel"),
        "resnet": (*worlds.make("resnet"), r"vision/(attention_pool/(query|out)|.*conv1)/kernel"),
        "blip": (*worlds.make_blip(tmp_path_factory.mktemp("v")), ATTENTION),
        "t5": (TextEncoder(text, None, "t5@0"), drawn(t5.shapes(text)), r".*/(query|fc1)/kernel"),
        "light": (
            ImageEncoder(image, transform, "light@0"),
            drawn(timm.shapes(image)["params"]),
            r"(conv_stem|blocks\.1\.0/conv_pw)/kernel",
        ),
    }


def adapter_of(params, pattern, rank=3):
    return drawn(lora.init(jax.random.key(0), params, pattern, rank))


def difference(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    return max(np.abs(np.asarray(one[k]) - np.asarray(other[k])).max() for k in one)


@pytest.mark.parametrize("name", ["clip", "clip patches", "resnet", "blip", "t5", "light"])
def test_comes_back_as_it_was(tmp_path, owners, name):
    """Every family by path, convolutions and fused matrices too."""
    owner, params, pattern = owners[name]
    adapter, config = adapter_of(params, pattern), LoraConfig(pattern, 3, 6.0, 0.1)
    weights.save_adapter(tmp_path / "adapter", adapter, config, owner)
    got, got_config = weights.load_adapter(tmp_path / "adapter", owner)
    assert difference(got, adapter) == 0
    assert (got_config.rank, got_config.alpha, got_config.dropout) == (3, 6.0, 0.1)
    merged = lora.merge(params, got, got_config.scale)
    assert difference(merged, params) > 0.01
    # the pattern names what is adapted
    again = lora.init(jax.random.key(0), params, got_config.pattern, 3)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    assert sorted(f.name for f in tmp_path.glob("adapter/*")) == [peft.CONFIG, peft.TENSORS]


def test_names_and_shapes_are_pefts(tmp_path, owners):
    owner, params, _ = owners["clip"]
    pattern = r"text/layers_0/(attention/query|fc1)/kernel"
    weights.save_adapter(tmp_path, adapter_of(params, pattern), LoraConfig(pattern, 3), owner)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = "base_model.model.text_model.encoder.layers.0"
    assert {name: x.shape for name, x in tensors.items()} == {
        f"{layer}.self_attn.q_proj.lora_A.weight": (3, 64),
        f"{layer}.self_attn.q_proj.lora_B.weight": (64, 3),
        f"{layer}.mlp.fc1.lora_A.weight": (3, 64),
        f"{layer}.mlp.fc1.lora_B.weight": (256, 3),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and (config["r"], config["lora_alpha"]) == (3, 16.0)
    assert config["target_modules"] == [
        "text_model.encoder.layers.0.mlp.fc1",
        "text_model.encoder.layers.0.self_attn.q_proj",
    ]


def test_a_fused_matrix_is_one_module_of_the_summed_rank(tmp_path, owners):
    owner, params, pattern = owners["blip"]
    config = LoraConfig(pattern, 3, 6.0)
    weights.save_adapter(tmp_path, adapter_of(params, pattern), config, owner)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    module = "vision_model.encoder.layers.0.self_attn.qkv"
    assert tensors[f"base_model.model.{module}.lora_A.weight"].shape == (6, 64)
    up = tensors[f"base_model.model.{module}.lora_B.weight"]
    assert up.shape == (192, 6)
    assert not up[64:128].any() and not up[:64, 3:].any() and not up[128:, :3].any()  # no key
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["rank_pattern"] == {module: 6} and about["alpha_pattern"] == {module: 12.0}


def test_what_peft_cannot_say_and_what_is_not_ours(tmp_path, owners):
    owner, params, pattern = owners["clip"]
    fused = worlds.make("resnet")
    with pytest.raises(WeightsError, match="text/layers_0/attention/query/kernel is no module of"):
        weights.save_adapter(tmp_path / "x", adapter_of(fused[1], r"text/.*query/kernel"),
                             LoraConfig(), fused[0])  # fmt: skip
    image, variables, _ = owners["light"]
    with pytest.raises(WeightsError, match="conv_dw/kernel is no module of its own"):
        adapter = adapter_of(variables, r".*blocks\.1\.0/conv_dw/kernel")
        weights.save_adapter(tmp_path / "x", adapter, LoraConfig(), image)
    assert not (tmp_path / "x").exists()
    with pytest.raises(WeightsError, match="adapter_config.json is missing"):
        weights.load_adapter(tmp_path / "x", owner)
    path = tmp_path / "adapter"
    weights.save_adapter(path, adapter_of(params, pattern), LoraConfig(pattern, 3), owner)
    with pytest.raises(WeightsError, match=r"q_proj is for no module of blip@0"):
        weights.load_adapter(path, owners["blip"][0])
    wider, _ = worlds.make(text_width=128)
    with pytest.raises(WeightsError, match="adapts 64 -> 64, but the model has 128 -> 128 there"):
        weights.load_adapter(path, wider)
    tensors = load_file(path / peft.TENSORS)
    save_file({k: v for k, v in tensors.items() if "lora_A" in k}, path / peft.TENSORS)
    with pytest.raises(WeightsError, match="only lora_A of"):
        weights.load_adapter(path, owner)


def rewritten(path, change=None, rename=None):
    """The adapter at `path` with other settings, or its tensors under other names."""
    file, tensors = path / peft.CONFIG, load_file(path / peft.TENSORS)
    file.write_text(json.dumps(json.loads(file.read_text()) | (change or {})))
    save_file({rename(n) if rename else n: x for n, x in tensors.items()}, path / peft.TENSORS)
    return path


@pytest.fixture
def saved(tmp_path, owners):
    """(directory of an adapter of the text tower, its owner, its tree)."""
    owner, params, _ = owners["clip"]
    pattern = r"text/layers_0/(attention/query|fc1)/kernel"
    adapter = adapter_of(params, pattern)
    weights.save_adapter(tmp_path / "saved", adapter, LoraConfig(pattern, 3, 6.0), owner)
    return tmp_path / "saved", owner, adapter


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, r"\{'use_dora': True\}: expected a plain 'LORA' without.*merge_and_"),
        ({"bias": "all"}, r"\{'bias': 'all'\}"),
        ({"lora_bias": True}, r"\{'lora_bias': True\}"),
        ({"fan_in_fan_out": True}, r"\{'fan_in_fan_out': True\}"),
        ({"modules_to_save": ["visual_projection"]}, r"\{'modules_to_save': \['visual_proj"),
        ({"layer_replication": [[0, 1]]}, r"\{'layer_replication'"),
        ({"target_parameters": ["class_embedding"]}, r"\{'target_parameters'"),
        ({"trainable_token_indices": [3]}, r"\{'trainable_token_indices': \[3\]"),
        ({"alora_invocation_tokens": [3]}, r"\{'alora_invocation_tokens'"),
        (
            {"a_field_of_tomorrow": 2, "r": 3},
            r"\{'a_field_of_tomorrow': 2\}.*or that are not known",
        ),
        ({"peft_type": "LOHA"}, r"peft_type 'LOHA' : expected a plain 'LORA'"),
        *(
            (
                {"init_lora_weights": start, "base_model_name_or_path": "the/base"},
                rf"init_lora_weights='{start}' changed the base weights, so .* of the/base. To use "
                r"it, save it with PEFT's conversion .*initial_model_for_weight_conversion.*or "
                r"merge it in PyTorch \(merge_and_unload\), save the whole model and load that",
            )
            for start in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga")
        ),
        ({"init_lora_weights": "loftq"}, r"'loftq' changed the base .*To use it, merge it in PyT"),
        ({"init_lora_weights": "lottery"}, "'lottery' is not known here and may have changed the"),
        ({"r": 4}, "fc1 has rank 3, but adapter_config.json says 4"),
        (
            {"rank_pattern": {"fc1": 5}},
            r"fc1 has rank 3, but adapter_config.json says 5 \(r, rank_",
        ),
        ({"r": None}, "r=None, lora_alpha=6.0: expected positive numbers"),
        ({"lora_alpha": 0}, "r=3, lora_alpha=0: expected positive numbers"),
    ],
)
def test_what_would_give_other_numbers_is_refused(saved, change, message):
    path, owner, _ = saved
    with pytest.raises(WeightsError, match=message):
        weights.load_adapter(rewritten(path, change), owner)


def test_what_only_says_how_it_was_made_is_not(saved):
    path, owner, adapter = saved
    for start in (False, None, "gaussian", "eva", "orthogonal", "mica"):
        rewritten(path, {"init_lora_weights": start})
        assert difference(weights.load_adapter(path, owner)[0], adapter) == 0
    harmless = {"a_field_of_tomorrow": False, "eva_config": {"rho": 2.0}, "peft_version": "1.0"}
    assert difference(weights.load_adapter(rewritten(path, harmless), owner)[0], adapter) == 0


def test_every_setting_of_the_installed_peft_is_decided():
    """Read, known not to matter, or refused: nothing new comes in unnoticed."""
    pytest.importorskip("transformers")
    theirs = pytest.importorskip("peft").LoraConfig()
    values = theirs.to_dict()
    refused = {
        *("use_dora", "bias", "modules_to_save", "fan_in_fan_out", "lora_bias", "use_qalora"),
        *("megatron_config", "trainable_token_indices", "velora_config", "kasa_config"),
        *("alora_invocation_tokens", "monteclora_config", "layer_replication", "use_bdlora"),
        *("target_parameters", "arrow_config"),
    }
    assert values.keys() - refused - set(peft._READ + peft._INERT) == set()
    assert all(values[name] in (None, False, "none") for name in refused & values.keys())


@pytest.mark.parametrize(
    "rename, message",
    [
        (lambda n: n.replace("lora_", "lora_embedding_").removesuffix(".weight"),
         r"lora_embedding_[AB] belongs to an adapted embedding. To use the adapter, merge it in"),
        (lambda n: n.replace("lora_A.weight", "lora_magnitude_vector"), "magnitude_vector is none"),
        (lambda n: n.replace("lora_B.weight", "lora_B.bias"), "lora_B.bias is none"),
        (lambda n: n.replace("lora_B.weight", "base_layer.weight"), "base_layer.weight is none"),
        (lambda n: n.replace(".lora", ".base_layer.lora"), "base_layer.lora_[AB].weight is none"),
        (lambda n: n.replace("lora_B", "lora_B.one").replace("lora_A", "lora_A.two"),
         r"expected one adapter, found one, two. Save the one"),
        (lambda n: n.replace("self_attn.q_proj", "self_attn.qkv"), "qkv is for no module of tiny"),
        (lambda n: "one", "one is none"),
    ],
)  # fmt: skip
def test_tensors_that_are_none_of_a_plain_adapter(saved, rename, message):
    path, owner, _ = saved
    with pytest.raises(WeightsError, match=message):
        weights.load_adapter(rewritten(path, rename=rename), owner)


def test_names_as_people_save_them(saved, owners):
    """With the adapter's name; of a tower alone, decided by its class, else by its sizes."""
    path, owner, adapter = saved
    rewritten(path, rename=lambda n: n.replace("lora_A", "lora_A.mine").replace("_B", "_B.mine"))
    assert difference(weights.load_adapter(path, owner)[0], adapter) == 0
    rewritten(path, rename=lambda n: n.replace("text_model.", "").replace("mine.", ""))
    # the towers of this model are 64 and 128 wide
    assert difference(weights.load_adapter(path, owner)[0], adapter) == 0
    square, _ = worlds.make(text_width=128)
    wide = path.with_name("wide")
    both = adapter_of(jax.eval_shape(square.init, jax.random.key(0)), r"text/.*/query/kernel")
    weights.save_adapter(wide, both, LoraConfig(rank=3), square)
    rewritten(wide, rename=lambda n: n.replace("text_model.", ""))
    with pytest.raises(WeightsError, match="q_proj may be of text_model. or vision_model.. Say in"):
        weights.load_adapter(wide, square)
    for name, tower in (("CLIPTextModel", "text"), ("CLIPVisionModel", "vision")):
        rewritten(wide, {"auto_mapping": {"base_model_class": name}})
        assert list(weights.load_adapter(wide, square)[0]) == [tower]


def test_files_as_people_save_them(saved):
    torch = pytest.importorskip("torch")
    path, owner, adapter = saved
    tensors = {n: torch.tensor(x).bfloat16() for n, x in load_file(path / peft.TENSORS).items()}
    (path / peft.TENSORS).unlink()
    with pytest.raises(WeightsError, match=r"adapter_model.safetensors"):
        weights.load_adapter(path, owner)
    torch.save(tensors, path / "adapter_model.bin")
    got, _ = weights.load_adapter(path, owner)
    assert 0 < difference(got, adapter) < 4e-3  # bfloat16 has 8 bits
    from safetensors.torch import save_file as save_torch

    save_torch(tensors, path / peft.TENSORS)
    (path / "adapter_model.bin").write_bytes(b"not this one")
    assert difference(weights.load_adapter(path, owner)[0], got) == 0


def test_a_backbone_given_an_adapter_directory(tmp_path, owners):
    owner, params, pattern = owners["clip"]
    weights.save_adapter(tmp_path, adapter_of(params, pattern), LoraConfig(pattern, 3), owner)
    with pytest.raises(WeightsError, match="a PEFT adapter"):
        weights.load(tmp_path / peft.TENSORS)


# --- PEFT itself


@pytest.fixture
def torch():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    return pytest.importorskip("torch")


def torch_model(path, family):
    import transformers

    name = {"clip": "CLIPModel", "blip": "BlipForImageTextRetrieval"}[family]
    return getattr(transformers, name).from_pretrained(path).eval()


def torch_weights(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.peer
@pytest.mark.parametrize("family", ["clip", "blip"])
def test_peft_merges_what_we_save_to_our_merged_weights(tmp_path, torch, owners, family):
    import peft as theirs

    owner, params, pattern = owners[family]
    adapter, config = adapter_of(params, pattern), LoraConfig(pattern, 3, 6.0)
    weights.save(tmp_path / "base", owner, params)
    weights.save_adapter(tmp_path / "adapter", adapter, config, owner)
    merged = lora.merge(params, adapter, config.scale)
    weights.save(tmp_path / "merged", owner, merged)
    adapted = theirs.PeftModel.from_pretrained(torch_model(tmp_path / "base", family),
                                               tmp_path / "adapter")  # fmt: skip
    got = torch_weights(adapted.merge_and_unload())
    expected = torch_weights(torch_model(tmp_path / "merged", family))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(got[name], tensor, atol=1e-5, err_msg=name)
    base = torch_weights(torch_model(tmp_path / "base", family))
    assert max(np.abs(got[name] - base[name]).max() for name in got) > 0.01


@pytest.mark.peer
@pytest.mark.parametrize("rslora", [False, True])
def test_we_merge_what_peft_saves(tmp_path, torch, owners, rslora):
    """Also fused matrices all of whose parts are adapted, ranks of their own, another scale."""
    import peft as theirs

    owner, params, _ = owners["blip"]
    weights.save(tmp_path / "base", owner, params)
    settings = theirs.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["qkv", "query", "text_proj"],
        rank_pattern={"qkv": 5},
        alpha_pattern={"text_proj": 9},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = theirs.get_peft_model(torch_model(tmp_path / "base", "blip"), settings)
    model.save_pretrained(tmp_path / "adapter")
    adapter, config = weights.load_adapter(tmp_path / "adapter", owner)
    weights.save(tmp_path / "merged", owner, lora.merge(params, adapter, config.scale))
    ours = torch_weights(torch_model(tmp_path / "merged", "blip"))
    for name, tensor in torch_weights(model.merge_and_unload()).items():
        np.testing.assert_allclose(ours[name], tensor, atol=1e-5, err_msg=name)


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
    assert error(ours(lora.merge(params, adapter, config.scale)), expected) > 0.02
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    adapter, config = weights.load_adapter(tmp_path / "converted", backbone)
    assert (config.rank, config.alpha) == (8, 12)
    assert error(ours(lora.merge(params, adapter, config.scale)), expected) < 1e-5
    assert error(ours(params), expected) > 0.02


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
    assert error(ours(params), expected) > 0.02


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
