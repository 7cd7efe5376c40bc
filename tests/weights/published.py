"""What lies in published model directories, as values: file names, fields, quirks.

Sizes are the published ones; `small` shrinks them and keeps all else. A row is one file of one
model as somebody has it; a `.head` stands for the structure of a tokenizer.json without its words.
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import peers

START, END = "<|startoftext|>", "<|endoftext|>"

# what every config of older transformers says of generation, labels and output; nothing here
NOISE: dict[str, Any] = dict.fromkeys(
    "add_cross_attention do_sample early_stopping is_decoder is_encoder_decoder output_attentions "
    "output_hidden_states output_scores remove_invalid_values return_dict_in_generate "
    "tie_encoder_decoder torchscript use_bfloat16".split(),
    False,
)
NOISE |= dict.fromkeys(
    "architectures bad_words_ids decoder_start_token_id finetuning_task forced_bos_token_id "
    "forced_eos_token_id prefix problem_type sep_token_id task_specific_params tokenizer_class "
    "torch_dtype".split()
)
NOISE |= {"_name_or_path": "", "chunk_size_feed_forward": 0, "diversity_penalty": 0.0}
NOISE |= {"encoder_no_repeat_ngram_size": 0, "no_repeat_ngram_size": 0, "min_length": 0}
NOISE |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
NOISE |= {"length_penalty": 1.0, "max_length": 20, "num_beam_groups": 1, "num_beams": 1}
NOISE |= {"num_return_sequences": 1, "pruned_heads": {}, "repetition_penalty": 1.0}
NOISE |= {"return_dict": True, "temperature": 1.0, "tie_word_embeddings": True}
NOISE |= {"top_k": 50, "top_p": 1.0, "transformers_version": "4.12.0.dev0"}
NOISE_16 = NOISE | {"cross_attention_hidden_size": None, "transformers_version": "4.16.0.dev0"}
NOISE_22 = NOISE_16 | {"exponential_decay_length_penalty": None, "tf_legacy_loss": False}
NOISE_22 |= {"typical_p": 1.0, "transformers_version": "4.22.0.dev0"}
NOISE_29 = NOISE_22 | {"begin_suppress_tokens": None, "suppress_tokens": None}
NOISE_29 |= {"transformers_version": "4.29.2"}
NOISE_5 = {
    name: NOISE_22[name]
    for name in "add_cross_attention cross_attention_hidden_size decoder_start_token_id "
    "finetuning_task is_decoder prefix pruned_heads sep_token_id task_specific_params "
    "tie_encoder_decoder tie_word_embeddings tokenizer_class torchscript "
    "use_bfloat16".split()
}


def _tower(width: int, heads: int, layers: int, act: str) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": act,
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
    }


def text(
    width: int = 512, heads: int = 8, layers: int = 12, act: str = "quick_gelu", **more: Any
) -> dict[str, Any]:
    """A text tower: bos 0, eos 2, pad 1 as OpenAI's directories have it, unless `more` says more.

    A field that is None in `more` and no token is left out.
    """
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    sizes = {"max_position_embeddings": 77, "vocab_size": 49408, "projection_dim": width}
    config = _tower(width, heads, layers, act) | ids | sizes | {"model_type": "clip_text_model"}
    return _without(config | more, "pad_token_id", "projection_dim")


def vision(
    width: int = 768,
    heads: int = 12,
    layers: int = 12,
    patch: int = 32,
    act: str = "quick_gelu",
    **more: Any,
) -> dict[str, Any]:
    config = _tower(width, heads, layers, act) | {"image_size": 224, "patch_size": patch}
    config |= {"num_channels": 3, "projection_dim": 512, "model_type": "clip_vision_model"}
    return _without(config | more, "num_channels", "projection_dim")


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names or v is not None}


NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""Vision towers of older transformers say so."""


def clip(dim: int, text: Any, vision: Any, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": dim,
        "text_config": text,
        "vision_config": vision,
        **more,
    }


def _sizes(config: Mapping[str, Any], *more: str) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    return {name: config[name] for name in (*names, *more)}


def _large(dim: int | None, dict_dim: int | None, noise: Any = NOISE_16, **more: Any) -> Any:
    """L/14: `projection_dim` in the towers, and in the dicts that win over them, or nowhere."""
    towers = text(768, 12), vision(1024, 16, 24, 14, num_channels=more.pop("num_channels", None))
    towers = tuple(_without(tower | {"projection_dim": dim}, "projection_dim") for tower in towers)
    dicts = _sizes(towers[0]), _sizes(towers[1], "patch_size")
    dicts = tuple(_without(each | {"projection_dim": dict_dim}, "projection_dim") for each in dicts)
    more = {"_name_or_path": "clip-vit-large-patch14/", "torch_dtype": "float32"} | more
    return clip(
        768,
        noise | towers[0],
        noise | towers[1] | NO_IDS,
        text_config_dict=dicts[0],
        vision_config_dict=dicts[1],
        transformers_version=None,
        **more,
    )


def one(architecture: str, tower: Any, version: str, dtype: str, name: Any = None) -> Any:
    """A directory of one tower: its fields at the top level."""
    named = {} if name is None else {"_name_or_path": name}
    return {**named, "architectures": [architecture], **tower, "torch_dtype": dtype} | {
        "transformers_version": version
    }


# --- tokenizers


def token(content: str = END, normalized: bool = True, tagged: bool = False) -> dict[str, Any]:
    form = {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False}
    return form | {"single_word": False} | ({"__type": "AddedToken"} if tagged else {})


def special(end: bool = True, pad: Any = END, unknown: bool | None = None) -> dict[str, Any]:
    """special_tokens_map.json; end, unknown: whether those tokens are "normalized"."""
    unknown = end if unknown is None else unknown
    return {"bos_token": token(START), "eos_token": token(END, end), "pad_token": pad} | {
        "unk_token": token(END, unknown)
    }


CLIP_TOKENIZER = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
CLIP_TOKENIZER |= {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}


def tagged(pad: str = END, **more: Any) -> dict[str, Any]:
    """tokenizer_config.json with tokens as tagged objects, and padding as a string."""
    names = {"bos_token": START, "eos_token": END, "unk_token": END}
    tokens = {name: token(content, tagged=True) for name, content in names.items()}
    return CLIP_TOKENIZER | tokens | {"pad_token": pad} | more


def plain(pad: str = END, **more: Any) -> dict[str, Any]:
    """tokenizer_config.json with tokens as strings."""
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    return CLIP_TOKENIZER | tokens | more


def decoder(end: bool, *pad: str) -> dict[str, Any]:
    """The field added_tokens_decoder."""
    tokens = {"0": token(pad[0], False)} if pad else {}
    tokens |= {"49406": token(START), "49407": token(END, end)}
    return {"added_tokens_decoder": {i: t | {"special": True} for i, t in tokens.items()}}


SPACES = {"clean_up_tokenization_spaces": True}
PROCESSOR = {"processor_class": "CLIPProcessor"}
BACKEND = {"backend": "tokenizers", "is_local": False}
MAP_FILE = {"special_tokens_map_file": "./special_tokens_map.json"}

# tokenizer.json without its words: (regex names the special tokens, end is normalized, merges are
# strings), the last two of which are later forms
OLD, NEWER = ("clip", False, False, True), ("clip", True, False, True)
VISION_ONLY, PAIRS = ("clip", True, True, True), ("clip", True, False, False)

# --- images

MEAN = {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
STD = {"image_std": [0.26862954, 0.26130258, 0.27577711]}
CLIP_IMAGES = {"do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
CLIP_IMAGES |= MEAN | STD
EXTRACTOR = {"feature_extractor_type": "CLIPFeatureExtractor"}
INTS = CLIP_IMAGES | EXTRACTOR | {"crop_size": 224, "size": 224}
FULL = CLIP_IMAGES | {"do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255}
FULL |= {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}
CLIP_PROCESSOR = {"image_processor_type": "CLIPImageProcessor"}

# --- rows

B16, B32 = "openai__clip-vit-base-patch16", "openai__clip-vit-base-patch32"
L14, XENOVA = "openai__clip-vit-large-patch14", "Xenova__clip-vit-base-patch32"
SD15, SD21 = "runwayml__stable-diffusion-v1-5__", "stabilityai__stable-diffusion-2-1__"
SD3 = "stabilityai__stable-diffusion-3-medium-diffusers__"
SDXL = "stabilityai__stable-diffusion-xl-base-1.0__"
PLAYGROUND = "playgroundai__playground-v2.5-1024px-aesthetic__"
CASCADE, FLUX = "stabilityai__stable-cascade-prior__", "black-forest-labs__FLUX.1-dev__"
IP_ADAPTER = "h94__IP-Adapter__"

_LARGE_TEXT = text(768, 12)
_TEXT, _PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
_VISION = "CLIPVisionModelWithProjection"
_G_TEXT = text(1280, 20, 32, "gelu")
_HERE = "openai/clip-vit-large-patch14"


def _base(noise: Any, version: dict[str, Any], channels: int | None = 3, **more: Any) -> Any:
    images = vision(num_channels=channels) | (NO_IDS if "is_decoder" in noise else {})
    return clip(512, noise | version | text(**more), noise | version | images)


CLIP: dict[str, dict[str, Any]] = {
    B16: {
        "config.json": _base(NOISE, {}, None)
        | {"text_config_dict": None, "vision_config_dict": {"patch_size": 16}}
        | {"vision_config": NOISE | vision(patch=16, num_channels=None) | NO_IDS}
        | {"torch_dtype": "float32", "transformers_version": None},
        "preprocessor_config.json": INTS,
        "special_tokens_map.json": special(),
        "tokenizer.json.head": OLD,
        "tokenizer_config.json": tagged(name_or_path="openai/clip-vit-base-patch16", **MAP_FILE),
    },
    B32: {
        "config.from-clip.md.json": _base(NOISE_16, {}, None)
        | {"text_config_dict": None, "vision_config_dict": None, "transformers_version": None},
        "config.resaved-4.52.4.json": _base({}, {"torch_dtype": "float32"}, pad_token_id=None)
        | {"torch_dtype": "float32", "transformers_version": "4.52.4"},
        "config.resaved-4.57.0.json": _base({}, {"dtype": "float32"}, pad_token_id=None)
        | {"dtype": "float32", "transformers_version": "4.57.0"},
        "config.resaved-5.0.0.json": _base(NOISE_5, {"dtype": "float32"})
        | {"dtype": "float32", "transformers_version": "5.0.0"},
        "config.visiononly-4.35.2.json": one(
            _VISION, vision(), "4.35.2", "float32", "openai/clip-vit-base-patch32"
        ),
        "preprocessor_config.resaved-4.57.0.json": FULL | CLIP_PROCESSOR | PROCESSOR,
        "preprocessor_config.visiononly-4.35.2.json": FULL
        | CLIP_PROCESSOR
        | PROCESSOR
        | EXTRACTOR
        | {"use_square_size": False},
        "processor_config.resaved-5.0.0.json": PROCESSOR
        | {
            "image_processor": FULL
            | {"image_processor_type": "CLIPImageProcessorFast", "data_format": "channels_first"}
        },
        "special_tokens_map.resaved-4.57.0.json": special(False, token(END, False)),
        "special_tokens_map.taggui.json": special(),
        "special_tokens_map.visiononly-4.35.2.json": special(),
        "tokenizer.resaved-4.57.0.json.head": PAIRS,
        "tokenizer.resaved-5.0.0.json.head": PAIRS,
        "tokenizer.taggui.json.head": NEWER,
        "tokenizer.visiononly-4.35.2.json.head": VISION_ONLY,
        "tokenizer_config.resaved-4.57.0.json": plain(
            **decoder(False), clean_up_tokenization_spaces=False, extra_special_tokens={}
        )
        | PROCESSOR,
        "tokenizer_config.resaved-5.0.0.json": plain(**BACKEND),
        "tokenizer_config.taggui.json": tagged(**SPACES),
        "tokenizer_config.visiononly-4.35.2.json": plain(**decoder(True), **SPACES, **PROCESSOR),
    },
    XENOVA: {
        "config.json": _base(NOISE_29, {})
        | {"_commit_hash": "e6a30b60", "_name_or_path": "openai/clip-vit-base-patch32"}
        | {"transformers_version": None},
        "preprocessor_config.json": FULL
        | EXTRACTOR
        | {"image_processor_type": "CLIPFeatureExtractor"},
        "special_tokens_map.json": special(),
        "tokenizer.json.head": NEWER,
        "tokenizer_config.json": tagged(**SPACES, **PROCESSOR),
    },
    L14: {
        "config.json": _large(768, 768),
        "config@e45c025.json": _large(768, 768),
        "config@352f696.json": _large(768, None),
        "config@54e5da6.json": _large(None, None),
        "config@e4d7ab3.json": _large(None, None),
        # a comma behind the last field of each dict
        "config@eb96ff9.json": _large(768, 768),
        "config.textonly-4.26.json": one(_TEXT, _LARGE_TEXT, "4.26.0", "float32", _HERE),
        "config.resaved-4.51.3.json": one(_TEXT, _LARGE_TEXT, "4.51.3", "float32"),
        "config.resaved-v5.json": clip(
            768,
            NOISE_5
            | _LARGE_TEXT
            | {"bos_token_id": 49406, "eos_token_id": 49407, "dtype": "float32"},
            NOISE_5 | vision(1024, 16, 24, 14, projection_dim=768, dtype="float32") | NO_IDS,
            dtype="float32",
            transformers_version="5.5.4",
        ),
        "preprocessor_config.json": INTS,
        "processor_config.resaved-v5.json": PROCESSOR | {"image_processor": FULL | CLIP_PROCESSOR},
        "special_tokens_map.json": special(),
        "special_tokens_map.resaved-4.51.3.json": special(False, token(END, False)),
        "tokenizer.json.head": OLD,
        "tokenizer.resaved-v5.json.head": PAIRS,
        "tokenizer_config.json": tagged(name_or_path="openai/clip-vit-base-patch32", **MAP_FILE),
        "tokenizer_config.resaved-4.51.3.json": plain(
            **decoder(False), clean_up_tokenization_spaces=False, extra_special_tokens={}
        ),
        "tokenizer_config.resaved-v5.json": plain(**BACKEND, **PROCESSOR),
    },
    SD15 + "feature_extractor": {"preprocessor_config.json": INTS | {"do_convert_rgb": True}},
    SD15 + "safety_checker": {
        "config.json": _large(None, None, NOISE_22, num_channels=3)
        | {"architectures": ["StableDiffusionSafetyChecker"], "_commit_hash": "4bb648a6"}
        | {"_name_or_path": "CompVis/stable-diffusion-safety-checker"}
    },
    SD15 + "text_encoder": {
        "config.json": one(_TEXT, _LARGE_TEXT, "4.22.0.dev0", "float32", _HERE)
    },
    SD15 + "tokenizer": {
        "special_tokens_map.json": special(),
        "tokenizer_config.json": tagged(name_or_path=_HERE, **MAP_FILE),
    },
    SD21 + "feature_extractor": {"preprocessor_config.json": INTS | {"do_convert_rgb": True}},
    SD21 + "text_encoder": {
        "config.json": one(
            _TEXT,
            text(1024, 16, 23, "gelu", projection_dim=512),
            "4.25.0.dev0",
            "float32",
            "hf-models/stable-diffusion-v2-768x768/text_encoder",
        )
    },
    SD21 + "tokenizer": {
        "special_tokens_map.json": special(pad="!"),
        "tokenizer_config.json": tagged(
            name_or_path="hf-models/stable-diffusion-v2-768x768/tokenizer", **MAP_FILE
        ),
    },
    SD3 + "text_encoder": {"config.json": one(_PROJECTED, _LARGE_TEXT, "4.41.2", "float16")},
    SD3 + "text_encoder_2": {"config.json": one(_PROJECTED, _G_TEXT, "4.41.2", "float16")},
    SD3 + "tokenizer_2": {
        "special_tokens_map.json": special(False, token("!", False)),
        "tokenizer_config.json": plain("!", **decoder(False, "!"), **SPACES),
    },
    SDXL + "text_encoder": {"config.json": one(_TEXT, _LARGE_TEXT, "4.32.0.dev0", "float16")},
    SDXL + "text_encoder_2": {"config.json": one(_PROJECTED, _G_TEXT, "4.32.0.dev0", "float16")},
    SDXL + "tokenizer": {
        "special_tokens_map.json": special(),
        "tokenizer_config.json": tagged(**SPACES),
    },
    SDXL + "tokenizer_2": {
        "special_tokens_map.json": special(pad="!"),
        "tokenizer_config.json": tagged("!", **SPACES),
    },
    PLAYGROUND + "text_encoder": {"config.json": one(_TEXT, _LARGE_TEXT, "4.35.2", "float32")},
    PLAYGROUND + "text_encoder_2": {"config.json": one(_PROJECTED, _G_TEXT, "4.35.2", "float32")},
    PLAYGROUND + "tokenizer": {
        "special_tokens_map.json": special(pad=token(END, False)),
        "tokenizer_config.json": plain(**decoder(True), **SPACES),
    },
    PLAYGROUND + "tokenizer_2": {
        "special_tokens_map.json": special(pad="!"),
        "tokenizer_config.json": plain("!", **decoder(True, "!"), **SPACES),
    },
    CASCADE + "feature_extractor": {"preprocessor_config.json": FULL | CLIP_PROCESSOR},
    CASCADE + "image_encoder": {
        "config.json": one(
            _VISION, vision(1024, 16, 24, 14, projection_dim=768), "4.38.2", "bfloat16", _HERE
        )
    },
    CASCADE + "text_encoder": {
        "config.json": one(
            _PROJECTED,
            _G_TEXT | {"bos_token_id": 49406, "eos_token_id": 49407},
            "4.38.2",
            "bfloat16",
            "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        )
    },
    CASCADE + "tokenizer": {
        "special_tokens_map.json": special(False, token(END, False)),
        "tokenizer.json.head": NEWER,
        "tokenizer_config.json": plain(**decoder(False), **SPACES),
    },
    FLUX + "text_encoder": {"config.json": one(_TEXT, _LARGE_TEXT, "4.43.3", "bfloat16", _HERE)},
    IP_ADAPTER + "image_encoder": {
        "config.json": one(
            _VISION,
            vision(1280, 16, 32, 14, "gelu", projection_dim=1024),
            "4.28.0.dev0",
            "float16",
            "./image_encoder",
        )
    },
}
"""Model -> file -> contents, all of CLIP in Hugging Face's form."""


def small(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config for a tiny model: only sizes change, a wrong one stays wrong.

    A dict that names no size (B/16's) would mean the class's own, a ViT-B; it gets the tiny ones.
    """
    config, dim = copy.deepcopy(dict(config)), config.get("projection_dim")
    widths = {"text": 16, "vision": 24}

    def shrink(tower: dict[str, Any], kind: str) -> None:
        tower["hidden_size"] = widths[kind]
        tower["intermediate_size"] = 2 * widths[kind]
        tower["num_attention_heads"], tower["num_hidden_layers"] = 2, 1
        if tower.get("projection_dim") == dim:
            tower["projection_dim"] = 12

    if "text_config" not in config:
        projected = config["architectures"][0].endswith("WithProjection")
        shrink(config, config["model_type"].split("_")[1])
        config["projection_dim"] = 12 if projected else dim
        return config
    for name in ("text_config", "vision_config", "text_config_dict", "vision_config_dict"):
        if config.get(name) is not None:
            shrink(config[name], name.split("_")[0])
    return config | {"projection_dim": 12}


def place(model: str, file: str) -> str:
    """Where a row lies in a copy of its repository: versions and marks of copies left out."""
    folder = model.split("__")[2:]
    return "/".join([*folder, re.match(r"\w+", file)[0] + ".json"])  # type: ignore[index]


def transformers() -> Any:
    """The library; its image processors import torchvision where there is one."""
    peers.torchvision()
    return pytest.importorskip("transformers")


def picture(folder: Path) -> Path:
    """A PNG that is no square, and transparent in places."""
    pixels = np.random.default_rng(0).integers(0, 255, (230, 301, 4), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder / "picture.png"


def random_tensors(model: Any, dtype: Any = None) -> dict[str, Any]:
    """The state dict of a PyTorch model, random: what a config does not reach would show."""
    import torch

    rng = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=rng).mul_(0.3).to(dtype or tensor.dtype)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }


def near(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Equal, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < tolerance, error
