"""LoRA adapters in PEFT's format: names and shapes, round trips, and PEFT itself."""

import json

import jax
import numpy as np
import pytest
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
    with pytest.raises(WeightsError, match=r"q_proj.lora_A.weight is for no module of blip@0"):
        weights.load_adapter(path, owners["blip"][0])
    wider, _ = worlds.make(text_width=128)
    with pytest.raises(WeightsError, match="adapts 64 -> 64, but the model has 128 -> 128 there"):
        weights.load_adapter(path, wider)
    tensors = load_file(path / peft.TENSORS)
    save_file({k: v for k, v in tensors.items() if "lora_A" in k}, path / peft.TENSORS)
    with pytest.raises(WeightsError, match="only lora_A of"):
        weights.load_adapter(path, owner)
    about = json.loads((path / peft.CONFIG).read_text())
    for change in ({"use_dora": True}, {"peft_type": "LOHA"}, {"bias": "all"}):
        (path / peft.CONFIG).write_text(json.dumps(about | change))
        with pytest.raises(WeightsError, match="expected a plain 'LORA'. Merge it in PyTorch"):
            weights.load_adapter(path, owner)


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
