"""Configs of OpenCLIP's models: its own numbers from a directory, or a message."""

import copy
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.input import images
from cir_jax.input.text import OPENAI_VOCABULARY
from cir_jax.models.backbone import pixels
from tests import peers
from tests.weights.published import MEAN, STD, near, picture, random_tensors

pytestmark = pytest.mark.peer

CAPTIONS = ["a red cat", "It's $ , but 2 DOGS  run", "look ! a dog!", "a photo of $", "x"]
TEXT = {"context_length": 77, "vocab_size": 49408}
STATISTICS = {"mean": MEAN["image_mean"], "std": STD["image_std"]}


def vit(dim, width, layers, patch, text, heads, depth=12, quick=False, **more):
    sizes = {"image_size": 224, "layers": layers, "width": width, "patch_size": patch}
    flag = {"quick_gelu": True} if quick else {}
    text_cfg = TEXT | {"width": text, "heads": heads, "layers": depth}
    return {"embed_dim": dim, **flag, "vision_cfg": sizes | more, "text_cfg": text_cfg}


def resnet(dim, layers, width, size, text, heads, quick=False):
    config = vit(dim, width, layers, None, text, heads, quick=quick)
    config["vision_cfg"]["image_size"] = size
    return config


def timm(dim, name, size, text, pool="avg", proj=None, vision=(), **more):
    named = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool}
    vision = named | {"timm_proj": proj, "image_size": size} | dict(vision)
    return {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text, "custom_text": True, **more}


def _text(width, heads, layers=12, length=77, **more):
    sizes = {"context_length": length, "width": width, "heads": heads, "layers": layers}
    return TEXT | sizes | more


_MOBILE = {"text": _text(512, 8, no_causal_mask=True), "size": 256}
_MOBILE |= {"vision": {"timm_drop": 0.0, "timm_drop_path": 0.0}}


def _siglip(version, words, **more):
    text = _text(768, 12, length=64, vocab_size=words, no_causal_mask=True, proj_bias=True)
    text |= {"hf_tokenizer_name": f"timm/ViT-B-16-{version}", "pool_type": "last"}
    text |= {"tokenizer_kwargs": {"clean": "canonicalize"}, "norm_kwargs": {"eps": 1e-6}, **more}
    name = "vit_base_patch16_siglip_224"
    return timm(768, name, 224, text, "map", "none", init_logit_bias=-10)


SAME = {
    "RN50": resnet(1024, [3, 4, 6, 3], 64, 224, 512, 8),
    "RN50-quickgelu": resnet(1024, [3, 4, 6, 3], 64, 224, 512, 8, True),
    "RN50x4": resnet(640, [4, 6, 10, 6], 80, 288, 640, 10),
    "RN50x4-quickgelu": resnet(640, [4, 6, 10, 6], 80, 288, 640, 10, True),
    "ViT-B-32": vit(512, 768, 12, 32, 512, 8),
    "ViT-B-32-quickgelu": vit(512, 768, 12, 32, 512, 8, quick=True),
    "ViT-L-14": vit(768, 1024, 24, 14, 768, 12),
    "ViT-L-14-quickgelu": vit(768, 1024, 24, 14, 768, 12, quick=True),
    "ViT-H-14": vit(1024, 1280, 32, 14, 1024, 16, 24, head_width=80),
    "ViT-bigG-14": vit(1280, 1664, 48, 14, 1280, 20, 32, head_width=104, mlp_ratio=4.9231),
}
REFUSED = {
    "MobileCLIP-S1": (timm(512, "fastvit_mci1", **_MOBILE), "fastvit_mci1"),
    "MobileCLIP2-S0": (timm(512, "fastvit_mci0", **_MOBILE), "fastvit_mci0"),
    "PE-Core-B-16": (
        timm(1024, "vit_pe_core_base_patch16_224", 224, _text(1024, 16, 24, 32), "map"),
        "vit_pe_core_base_patch16_224",
    ),
    "PE-Core-L-14-336": (
        timm(1024, "vit_pe_core_large_patch14_336", 336, _text(1024, 16, 24, 32), "map"),
        "vit_pe_core_large_patch14_336",
    ),
    "PE-Core-T-16-384": (
        timm(512, "vit_pe_core_tiny_patch16_384", 384, _text(512, 8, 12, 32), "map"),
        "vit_pe_core_tiny_patch16_384",
    ),
    "ViT-B-16-SigLIP": (_siglip("SigLIP", 32000), "vit_base_patch16_siglip_224"),
    "ViT-B-16-SigLIP2": (
        _siglip("SigLIP2", 256000, act_kwargs={"approximate": "tanh"}),
        "vit_base_patch16_siglip_224",
    ),
}
PIX2STRUCT = {
    "ckpt_path": "/somewhere/clip_vit_l_14_adapted.pth",
    "model_cfg": vit(768, 1024, 24, 14, 768, 12, npatch=400, direct_intput_patch=True),
    "preprocess_cfg": STATISTICS,
}
BIOMED = {
    "config.json": {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "type_vocab_size": 2,
        "vocab_size": 30522,
    },
    "open_clip_config.json": {
        "model_cfg": timm(
            512,
            "vit_base_patch16_224",
            224,
            {
                "hf_model_name": "/somewhere/BiomedBERT/config.json",
                "hf_tokenizer_name": "/somewhere/BiomedCLIP",
                "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "context_length": 256,
            },
            "",
            "linear",
        ),
        "preprocess_cfg": STATISTICS,
    },
    "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "cls_token": "[CLS]"}
    | {"sep_token": "[SEP]", "pad_token": "[PAD]", "model_max_length": 10**30},
    "special_tokens_map.json": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
}
del BIOMED["open_clip_config.json"]["model_cfg"]["custom_text"]


def small(config):
    """One layer, two heads; what is no size stays."""
    config = copy.deepcopy(config) | {"embed_dim": 12}
    vision, text = config["vision_cfg"], config["text_cfg"]
    if isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 4, "image_size": vision["image_size"] - 160}
    else:
        vision |= {"layers": 1, "width": 2 * vision.get("head_width", 64)}
    text |= {"layers": 1, "width": 16, "heads": 2}
    return config


def write(path, model_cfg, tensors):
    """A directory as on the hub; the words are OpenAI's, from open_clip's package."""
    config = {"model_cfg": model_cfg, "preprocess_cfg": STATISTICS}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "open_clip_model.safetensors")
    return path


@pytest.mark.parametrize("name", SAME)
def test_open_clip(tmp_path, name):
    """A string and a PNG through both, which read the same directory."""
    import torch

    open_clip = peers.open_clip()
    config = small(SAME[name])
    made = random_tensors(open_clip.CLIP(**config))
    # variances
    made = {k: v.abs() + 0.1 if k.endswith("running_var") else v for k, v in made.items()}
    path = write(tmp_path, config, {k: v.numpy() for k, v in made.items()})
    vocabulary = open_clip.tokenizer.default_bpe()
    (path / OPENAI_VOCABULARY).write_bytes(Path(vocabulary).read_bytes())
    png = picture(path)

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{path}")
    model.eval()
    backbone, params = weights.load(path)
    ids = backbone.tokenizer(CAPTIONS, 77)
    theirs = open_clip.get_tokenizer(f"local-dir:{path}")(CAPTIONS)
    np.testing.assert_array_equal(ids, theirs)
    x = preprocess(Image.open(png))[None]
    transform = backbone.image_transform
    ours = transform(images.read(png))[None]
    near(pixels(ours, transform), x.permute(0, 2, 3, 1), 1e-6)
    with torch.no_grad():
        image, text = model.encode_image(x), model.encode_text(theirs)
    run = jax.jit(lambda p: (backbone.encode_image(p, ours), backbone.encode_text(p, ids)))
    for features, expected in zip(run(params), (image, text), strict=True):
        near(features, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_towers_of_timm_are_refused_by_name(tmp_path, name):
    config, tower = REFUSED[name]
    stem = {"visual.trunk.stem.weight": np.zeros((2, 2), np.float32)}
    write(tmp_path, config, stem | {"text.token_embedding.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(WeightsError, match=rf"open_clip_config.json: .*not built here: .*{tower}"):
        weights.load(tmp_path)


def test_other_models_with_an_open_clip_config(tmp_path):
    tensors = {"visual.conv1.weight": np.zeros((2, 2), np.float32)}
    write(tmp_path, PIX2STRUCT["model_cfg"], tensors)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(PIX2STRUCT))
    with pytest.raises(WeightsError, match=r"not built here: .*npatch.*direct_intput_patch"):
        weights.load(tmp_path)
    for file, value in BIOMED.items():
        (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(
        WeightsError, match=r"open_clip_config.json: .*not built here: .*hf_model_name"
    ):
        weights.load(tmp_path)


def test_every_row_is_in_a_case():
    assert len(SAME) + len(REFUSED) == 17
    assert len(BIOMED) + 1 == 5  # its tokenizer.json is never read
