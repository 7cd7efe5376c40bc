"""OpenAI's and OpenCLIP's CLIP: configs and tensor names (they share the names).

OpenAI files hold no config: sizes are read off the shapes, as its `build_model` does; all of them
want QuickGELU. OpenCLIP files want what `open_clip_config.json` says.
"""

import re
from collections.abc import Mapping
from typing import Any

from cir_jax.errors import WeightsError
from cir_jax.models.clip import ClipConfig, TextConfig, TowerConfig, VisionConfig
from cir_jax.models.resnet import ResNetConfig
from cir_jax.weights import convert

IGNORE = (r".*\.num_batches_tracked", r"(.*\.)?attn_mask")
OPENAI_CONSTANTS = ("input_resolution", "context_length", "vocab_size")
"""Stored beside the parameters by OpenAI's own archives, and by nothing else."""

ARGMAX = 2
"""The eos_token_id that pools the largest id, as both code bases do."""

# fields that can be written without changing the model
_INERT = {
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "patch_dropout",
    "output_tokens",
    "init_logit_scale",
    "custom_text",
    "timm_drop",
    "timm_drop_path",
}
_DEFAULTS = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "embed_cls": ()}


def names(config: ClipConfig) -> convert.Names:
    """Name table of `clip.model.CLIP` and `open_clip.CLIP`."""
    table = convert.Names(
        {
            "logit_scale": (("logit_scale",), "same"),
            "text_projection": (("text_projection", "kernel"), "same"),
            "token_embedding.weight": (("text", "token_embedding", "embedding"), "same"),
            "positional_embedding": (("text", "position_embedding"), "same"),
        }
    )
    _layers(table, "transformer", "text", config.text)
    table.norm("ln_final", "text", "final_norm")
    if isinstance(config.vision, ResNetConfig):
        _resnet(table, config.vision)
        return table
    table |= {
        "visual.proj": (("visual_projection", "kernel"), "same"),
        "visual.class_embedding": (("vision", "class_embedding"), "same"),
        "visual.positional_embedding": (("vision", "position_embedding"), "same"),
        "visual.conv1.weight": (("vision", "patch_embedding", "kernel"), "conv"),
    }
    _layers(table, "visual.transformer", "vision", config.vision)
    table.norm("visual.ln_pre", "vision", "pre_norm")
    table.norm("visual.ln_post", "vision", "post_norm")
    return table


def _layers(table: convert.Names, source: str, tower: str, config: TowerConfig) -> None:
    for i in range(config.num_hidden_layers):
        old, new = f"{source}.resblocks.{i}", f"layers_{i}"
        fused = (tower, new, "attention", ("query", "key", "value"))
        table[f"{old}.attn.in_proj_weight"] = ((*fused, "kernel"), "linear")
        table[f"{old}.attn.in_proj_bias"] = ((*fused, "bias"), "same")
        table.linear(f"{old}.attn.out_proj", tower, new, "attention", "out")
        table.linear(f"{old}.mlp.c_fc", tower, new, "fc1")
        table.linear(f"{old}.mlp.c_proj", tower, new, "fc2")
        for part in ("1", "2"):
            table.norm(f"{old}.ln_{part}", tower, new, f"norm{part}")


def _resnet(table: convert.Names, config: ResNetConfig) -> None:
    def numbered(source: str, path: tuple[str, ...]) -> None:
        for n in "123":
            table[f"{source}conv{n}.weight"] = ((*path, f"conv{n}", "kernel"), "conv")
            table.batch_norm(f"{source}bn{n}", *path, f"norm{n}")

    numbered("visual.", ("vision",))
    for stage, count in enumerate(config.layers):
        for i in range(count):
            source, path = f"visual.layer{stage + 1}.{i}.", ("vision", f"stages_{stage}_{i}")
            numbered(source, path)
            if i == 0:
                shortcut = f"{source}downsample"
                table[f"{shortcut}.0.weight"] = ((*path, "shortcut_conv", "kernel"), "conv")
                table.batch_norm(f"{shortcut}.1", *path, "shortcut_norm")
    pool = ("vision", "attention_pool")
    table["visual.attnpool.positional_embedding"] = ((*pool, "position_embedding"), "same")
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("c", "out")):
        table.linear(f"visual.attnpool.{theirs}_proj", *pool, ours)


def from_open_clip(model: Mapping[str, Any], what: str = "open_clip_config.json") -> ClipConfig:
    """From the `model_cfg` of an `open_clip_config.json`.

    Raises WeightsError for fields that describe another model than a CLIP.
    """
    vision, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
    top = {k: v for k, v in model.items() if k not in ("vision_cfg", "text_cfg")}
    act = "quick_gelu" if top.pop("quick_gelu", False) else "gelu"
    dim, size = top.pop("embed_dim"), vision.pop("image_size", 224)
    width, layers = vision.pop("width", 768), vision.pop("layers", 12)
    head_width, ratio = vision.pop("head_width", 64), vision.pop("mlp_ratio", 4.0)
    patch = vision.pop("patch_size", 16)

    def eps(tower: dict[str, Any]) -> float:
        return (tower.pop("norm_kwargs", None) or {}).get("eps", 1e-5)

    if isinstance(layers, list | tuple):
        heads = width * 32 // head_width
        image_tower: Any = ResNetConfig(tuple(layers), width, heads, size)
    else:
        image_tower = VisionConfig(
            hidden_size=width,
            intermediate_size=int(width * ratio),
            num_hidden_layers=layers,
            num_attention_heads=width // head_width,
            hidden_act=act,
            layer_norm_eps=eps(vision),
            image_size=size,
            patch_size=patch,
        )
    text_width, vocab = text.pop("width", 512), text.pop("vocab_size", 49408)
    config = ClipConfig(
        text=TextConfig(
            hidden_size=text_width,
            intermediate_size=int(text_width * text.pop("mlp_ratio", 4.0)),
            num_hidden_layers=text.pop("layers", 12),
            num_attention_heads=text.pop("heads", 8),
            hidden_act=act,
            layer_norm_eps=eps(text),
            vocab_size=vocab,
            max_position_embeddings=text.pop("context_length", 77),
            bos_token_id=vocab - 2,
            eos_token_id=ARGMAX,
            pad_token_id=0,
        ),
        vision=image_tower,
        projection_dim=dim,
    )
    other = {
        name: value
        for part in (top, vision, text)
        for name, value in part.items()
        if value and name not in _INERT and value not in _DEFAULTS.get(name, ())
    }
    if other:
        raise WeightsError(
            f"{what}: {other} describe a model that is not built here; expected a CLIP with its "
            "own ViT or ModifiedResNet and text transformer."
        )
    return config


def to_open_clip(config: ClipConfig) -> dict[str, Any]:
    """The `model_cfg` of an `open_clip_config.json`."""
    text, vision = config.text, config.vision

    def norm(tower: TowerConfig) -> dict[str, Any]:
        usual = tower.layer_norm_eps == 1e-5
        return {} if usual else {"norm_kwargs": {"eps": tower.layer_norm_eps}}

    if isinstance(vision, ResNetConfig):
        head_width = vision.width * 32 // vision.num_attention_heads
        tower: dict[str, Any] = {"layers": list(vision.layers), "head_width": head_width}
        tower |= {"width": vision.width, "image_size": vision.image_size}
    else:
        if vision.hidden_act != text.hidden_act:
            raise WeightsError("OpenCLIP has one activation for both towers; these differ.")
        tower = {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
        } | norm(vision)
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": tower,
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        }
        | norm(text),
    }


def from_openai(arguments: Mapping[str, Any]) -> ClipConfig:
    """From the arguments of OpenAI's `clip.model.CLIP`; heads of the image tower are 64 wide."""
    vision = {
        "layers": arguments["vision_layers"],
        "width": arguments["vision_width"],
        "image_size": arguments["image_resolution"],
    }
    if not isinstance(vision["layers"], list | tuple):
        vision["patch_size"] = arguments["vision_patch_size"]
    return from_open_clip(
        {
            "embed_dim": arguments["embed_dim"],
            "quick_gelu": True,
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": arguments["context_length"],
                "vocab_size": arguments["vocab_size"],
                "width": arguments["transformer_width"],
                "heads": arguments["transformer_heads"],
                "layers": arguments["transformer_layers"],
            },
        }
    )


def from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> ClipConfig:
    """From the shapes of an OpenAI state dict: all sizes follow, heads being 64 wide."""

    def count(pattern: str) -> int:
        return len({m[1] for name in shapes if (m := re.match(pattern, name))})

    context, width = shapes["positional_embedding"]
    if "visual.proj" in shapes:
        vision_width, _, _, patch = shapes["visual.conv1.weight"]
        layers: Any = count(r"visual\.transformer\.resblocks\.(\d+)\.")
        cells, unit = shapes["visual.positional_embedding"][0] - 1, patch
    else:
        vision_width, patch = shapes["visual.layer1.0.conv1.weight"][0], None
        layers = [count(rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
        cells, unit = shapes["visual.attnpool.positional_embedding"][0] - 1, 32
    return from_openai(
        {
            "embed_dim": shapes["text_projection"][1],
            "image_resolution": round(cells**0.5) * unit,
            "vision_layers": layers,
            "vision_width": vision_width,
            "vision_patch_size": patch,
            "context_length": context,
            "vocab_size": shapes["token_embedding.weight"][0],
            "transformer_width": width,
            "transformer_heads": max(width // 64, 1),
            "transformer_layers": count(r"transformer\.resblocks\.(\d+)\."),
        }
    )
