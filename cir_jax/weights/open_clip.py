"""OpenAI's and OpenCLIP's CLIP: configs and tensor names (they share the names).

OpenAI files hold no config: sizes are read off the shapes, as its `build_model` does; all of them
want QuickGELU. OpenCLIP files want what `open_clip_config.json` says.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.input.text import Tokenizer
from cir_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from cir_jax.models.resnet import ResNetConfig
from cir_jax.models.transformer import TowerConfig
from cir_jax.weights import convert, positions
from cir_jax.weights import open_clip_fields as fields
from cir_jax.weights.lazy import Lazy, Stored, reader

IGNORE = (
    r".*\.num_batches_tracked",
    r"(.*\.)?attn_mask",
    r"logit_bias",  # of a sigmoid loss: added to every logit
)
OPENAI_CONSTANTS = ("input_resolution", "context_length", "vocab_size")
"""Stored beside the parameters by OpenAI's own archives, and by nothing else."""

ARGMAX = 2
"""The eos_token_id that pools the largest id, as both code bases do."""

_LONG = "positional_embedding_res"
"""Long-CLIP's second table of text positions; nothing else has one."""


_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


def plain(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The same tensors under the names of OpenAI's model, nothing read yet.

    OpenCLIP's CustomTextCLIP calls its text tower `text.`; a temperature of one element is a
    scalar.
    """
    readers: dict[str, Callable[[], np.ndarray | Stored]] = {}
    for name in tensors:
        short = name.removeprefix("text.")
        moved = short.startswith(_TEXT) and short not in tensors
        readers[short if moved else name] = reader(tensors, name)
    if scale := readers.get("logit_scale"):
        readers["logit_scale"] = lambda: _scalar(np.asarray(scale()))
    return Lazy(readers)


def _scalar(array: np.ndarray) -> np.ndarray:
    return array.reshape(()) if np.shape(array) == (1,) else array


def is_long_clip(tensors: Mapping[str, Any]) -> bool:
    """Whether these are Long-CLIP's own: OpenAI's names and QuickGELU, two tables of positions."""
    return _LONG in tensors


def folded(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Long-CLIP's two tables of positions as the one that they amount to; others as they are."""
    if not is_long_clip(tensors):
        return tensors
    readers = {name: reader(tensors, name) for name in tensors if name != _LONG}
    readers["positional_embedding"] = lambda: positions.of_long_clip(
        tensors["positional_embedding"], tensors[_LONG]
    )
    return Lazy(readers)


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
    fields.check(model, what)
    vision, text = model[fields.VISION], model[fields.TEXT]
    quick = bool(model.get("quick_gelu"))
    width, layers = vision.get("width", 768), vision.get("layers", 12)
    head_width = vision.get("head_width", 64)
    size = fields.square(vision.get("image_size", 224), "image_size", what)
    if isinstance(layers, list | tuple):
        heads = width * 32 // head_width
        image_tower: Any = ResNetConfig(tuple(layers), width, heads, size)
    else:
        image_tower = VisionConfig(
            hidden_size=width,
            intermediate_size=int(width * vision.get("mlp_ratio", 4.0)),
            num_hidden_layers=layers,
            num_attention_heads=width // head_width,
            hidden_act=fields.activation(vision, fields.VISION, quick, what),
            layer_norm_eps=fields.epsilon(vision, fields.VISION, what),
            image_size=size,
            patch_size=fields.square(vision.get("patch_size", 16), "patch_size", what),
        )
    text_width, vocab = text.get("width", 512), text.get("vocab_size", 49408)
    return ClipConfig(
        text=TextConfig(
            hidden_size=text_width,
            intermediate_size=int(text_width * text.get("mlp_ratio", 4.0)),
            num_hidden_layers=text.get("layers", 12),
            num_attention_heads=text.get("heads", 8),
            hidden_act=fields.activation(text, fields.TEXT, quick, what),
            layer_norm_eps=fields.epsilon(text, fields.TEXT, what),
            vocab_size=vocab,
            max_position_embeddings=text.get("context_length", 77),
            bos_token_id=vocab - 2,
            eos_token_id=ARGMAX,
            pad_token_id=0,
        ),
        vision=image_tower,
        projection_dim=model["embed_dim"],
        logit_scale_init_value=model.get("init_logit_scale", ClipConfig.logit_scale_init_value),
    )


def to_open_clip(config: ClipConfig, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The `model_cfg` of an `open_clip_config.json`, with what its tokenizer is told.

    Raises WeightsError for activations that the format cannot say.
    """
    text, vision = config.text, config.vision
    towers = [text, *([] if isinstance(vision, ResNetConfig) else [vision])]
    if len({tower.hidden_act == "quick_gelu" for tower in towers}) > 1:
        raise WeightsError("OpenCLIP has one activation for both towers; these differ.")

    def kinds(tower: TowerConfig) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if tower.layer_norm_eps != 1e-5:
            found["norm_kwargs"] = {"eps": tower.layer_norm_eps}
        if tower.hidden_act == "gelu_pytorch_tanh":
            found["act_kwargs"] = {"approximate": "tanh"}
        elif tower.hidden_act not in ("gelu", "quick_gelu"):
            raise WeightsError(f"OpenCLIP's config has no word for {tower.hidden_act!r}.")
        return found

    if isinstance(vision, ResNetConfig):
        head_width = vision.width * 32 // vision.num_attention_heads
        image_tower: dict[str, Any] = {"layers": list(vision.layers), "head_width": head_width}
        image_tower |= {"width": vision.width, "image_size": vision.image_size}
    else:
        image_tower = {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
        } | kinds(vision)
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": image_tower,
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        }
        | kinds(text)
        | (_tokenizer_fields(tokenizer) if tokenizer else {}),
    }


def _tokenizer_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    # open_clip's own tokenizer pads with 0, one of Hugging Face with a token of its own
    named = (
        {"hf_tokenizer_name": "."} if tokenizer.pad_id or tokenizer.cleaning == "whitespace" else {}
    )
    usual = fields.cleaning(named, "")
    kwargs = {} if tokenizer.cleaning == usual else {"clean": tokenizer.cleaning}
    return named | ({"tokenizer_kwargs": kwargs} if kwargs else {})


def read_tokenizer(
    directory: Path, text: Mapping[str, Any], config: TextConfig, what: str
) -> Tokenizer:
    """The tokenizer that open_clip makes of a `text_cfg`, out of the files in `directory`.

    Raises WeightsError for settings that are not built here, and for a vocabulary whose last two
    tokens are not CLIP's start and end: the pooled token is the one with the largest id.
    """
    last = config.vocab_size - 1
    name = text.get("hf_tokenizer_name")
    tokenizer = Tokenizer.from_directory(
        directory,
        context_length=config.max_position_embeddings,
        pad_id=None if name else 0,  # its own tokenizer fills up with zeros
    )
    tokenizer.cleaning = fields.cleaning(text, what)
    if not name:
        return tokenizer
    marks = [tokenizer.token_id(token) for token in ("<|startoftext|>", "<|endoftext|>")]
    if marks != [last - 1, last]:
        raise WeightsError(
            f"{what}: hf_tokenizer_name={name!r}, whose <|startoftext|> and <|endoftext|> are "
            f"tokens {marks}; expected {last - 1} and {last}, CLIP's. Other vocabularies are not "
            "built here."
        )
    return tokenizer


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
