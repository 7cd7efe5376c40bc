"""What every field of an OpenCLIP config is to us: read, without effect, or of another network.

The fields are those of open_clip 3.3's `CLIP`, `CLIPVisionCfg` and `CLIPTextCfg`; a field that is
in none of these tables, such as one of a later version, is refused like one of another network.
"""

from collections.abc import Mapping
from typing import Any

from cir_jax.errors import WeightsError

MODEL, VISION, TEXT = "model_cfg", "vision_cfg", "text_cfg"

READ: Mapping[str, frozenset[str]] = {
    MODEL: frozenset({"embed_dim", VISION, TEXT, "quick_gelu", "init_logit_scale"}),
    VISION: frozenset(
        {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs",
         "norm_kwargs"}
    ),
    TEXT: frozenset(
        {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "act_kwargs",
         "norm_kwargs", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}
    ),
}  # fmt: skip

INERT: Mapping[str, frozenset[str]] = {
    MODEL: frozenset(
        {
            "custom_text",  # the tensors' names say it
            "nonscalar_logit_scale",  # their shapes do
            "init_logit_bias",  # added to every logit: no feature and no ranking has it
            "cast_dtype",
            "output_dict",
        }
    ),
    VISION: frozenset(
        {
            "patch_dropout",  # training
            "output_tokens",
            # of towers and pools that are refused by another field
            "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_pool",
            "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
        }
    ),
    TEXT: frozenset(
        {
            "output_tokens",
            "pad_id",  # of a padding mask and
            "eos_id",  # of a pool that are refused by another field
            "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
        }
    ),
}  # fmt: skip

_BLOCK: Mapping[str, tuple[Any, str]] = {
    "ls_init_value": (None, "layer scale"),
    "final_ln_after_pool": (False, "a norm behind the pool"),
    "block_type": (None, "open_clip's custom blocks"),
    "qk_norm": (False, "norms of queries and keys"),
    "scaled_cosine_attn": (False, "cosine attention"),
    "scale_heads": (False, "a scale per head"),
    "scale_attn_inner": (False, "a norm within attention"),
    "scale_attn": (False, "a norm behind attention"),
    "scale_fc": (False, "a norm within the MLP"),
}

PLAIN: Mapping[str, Mapping[str, tuple[Any, str]]] = {
    MODEL: {"multimodal_cfg": (None, "CoCa's captioner")},
    VISION: {
        **_BLOCK,
        "attentional_pool": (False, "attention pooling, as CoCa's"),
        "no_ln_pre": (False, "a tower without its first norm"),
        "pos_embed_type": ("learnable", "computed positions"),
        "pool_type": ("tok", "another pool than the class token"),
        "timm_model_name": (
            None,
            "an image tower of timm (SigLIP, PE-Core, MobileCLIP, EVA, ViTamin, ConvNeXt)",
        ),
    },
    TEXT: {
        **_BLOCK,
        "embed_cls": (False, "a class token of the text, as CoCa's"),
        "no_causal_mask": (False, "a text tower that sees what follows"),
        "pool_type": ("argmax", "another pool than the end token"),
        "proj_bias": (False, "a bias of the text projection"),
        "proj_type": ("linear", "a text tower without projection"),
        "hf_model_name": (None, "a text tower of transformers"),
    },
}
"""Part -> field -> the value of a plain CLIP, and what any other value asks for."""


def check(model: Mapping[str, Any], what: str) -> None:
    """Raises WeightsError naming every field of `model_cfg` that describes another network."""
    problems = []
    for part in (VISION, TEXT):
        if not isinstance(model[part], Mapping):
            raise WeightsError(f"{what}: {part}={model[part]!r}; expected the fields of a tower.")
    for part in (MODEL, VISION, TEXT):
        for name, value in (model if part == MODEL else model[part]).items():
            if name in READ[part] or name in INERT[part]:
                continue
            plain, needs = PLAIN[part].get(name, (None, "a field that this version does not know"))
            if not _equal(value, plain):
                field = name if part == MODEL else f"{part}.{name}"
                problems.append(f"{field}={value!r} ({needs})")
    if problems:
        raise WeightsError(
            f"{what}: a model that is not built here: {'; '.join(problems)}. Expected a CLIP with "
            "its own ViT or ModifiedResNet and causal text transformer."
        )


def _equal(value: Any, plain: Any) -> bool:
    # null is "off"; 0.0 is not "none": a layer scale of it is a layer scale
    return value == plain or (value is None and not plain)


def square(value: Any, name: str, what: str) -> int:
    """One side: 224, or [224, 224]. Raises WeightsError for what is not square."""
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise WeightsError(f"{what}: {VISION}.{name}={value}; expected a square.")
    return sides.pop()


def epsilon(tower: Mapping[str, Any], part: str, what: str) -> float:
    """Of the tower's norms. Raises WeightsError for other settings of theirs."""
    settings = tower.get("norm_kwargs") or {}
    if set(settings) - {"eps"}:
        raise WeightsError(f"{what}: {part}.norm_kwargs={settings}; expected eps alone.")
    return settings.get("eps", 1e-5)


def activation(tower: Mapping[str, Any], part: str, quick: bool, what: str) -> str:
    """The name of the tower's activation. Raises WeightsError for one that is not built here."""
    settings = tower.get("act_kwargs") or {}
    kinds = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
    kind = settings.get("approximate", "none")
    if set(settings) - {"approximate"} or kind not in kinds or (quick and settings):
        raise WeightsError(
            f"{what}: {part}.act_kwargs={settings}; expected nothing, or without quick_gelu "
            '{"approximate": "none"} or {"approximate": "tanh"}.'
        )
    return "quick_gelu" if quick else kinds[kind]


def cleaning(text: Mapping[str, Any], what: str) -> str:
    """How texts are cleaned before they are tokenised, a key of `input.text.CLEANING`.

    open_clip lower-cases where it tokenises itself; a tokenizer of Hugging Face (hf_tokenizer_name)
    does that itself, where it does. Raises WeightsError for settings that are not built here.
    """
    own = not text.get("hf_tokenizer_name")
    settings = {k: v for k, v in (text.get("tokenizer_kwargs") or {}).items() if v}
    kind = settings.pop("clean", "lower" if own else "whitespace")
    kinds = ("lower" if own else "whitespace", "canonicalize")
    if settings or kind not in kinds or text.get("tokenizer_mode"):
        given = {k: text[k] for k in ("tokenizer_mode", "tokenizer_kwargs") if text.get(k)}
        named = "without" if own else "with"
        raise WeightsError(
            f"{what}: {TEXT} has {given}, which is not built here; expected no tokenizer_mode, and "
            f"of tokenizer_kwargs only clean: {' or '.join(map(repr, kinds))} ({named} "
            "hf_tokenizer_name)."
        )
    return kind
