"""Which model some tensors are of, told by names that only its format has."""

from collections.abc import Mapping
from typing import Any

SIGNATURES = {
    "SigLIP (Hugging Face names)": ("text_model.head.weight", "vision_model.head.probe"),
    "CLIP (Hugging Face names)": ("text_model.embeddings.token_embedding.weight",),
    "CLIP (OpenAI or OpenCLIP names)": ("token_embedding.weight", "visual.conv1.weight"),
    "CLIP (OpenCLIP's CustomTextCLIP)": ("text.token_embedding.weight", "visual.conv1.weight"),
    "BLIP (Hugging Face names)": ("vision_model.embeddings.class_embedding", "vision_proj.weight"),
    "BLIP (original names)": ("visual_encoder.cls_token",),
    "BLIP that writes text": (
        "vision_model.embeddings.class_embedding",
        "text_decoder.cls.predictions.bias",
    ),
    "ARTEMIS (official names)": ("txt_enc.embed.weight", "Transform_m.0.weight"),
    "T5": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "CompoDiff's denoiser": ("net.to_text_embeds.0.weight",),
    "an EfficientNet or MobileNetV2 of timm": ("conv_stem.weight",),
    "an EfficientViT of timm": ("patch_embed.conv1.conv.weight",),
    "a MobileViTV2 of timm": ("stem.conv.weight",),
}
"""Format -> tensors that only it has; the first word is the family."""


def describe(tensors: Mapping[str, Any]) -> str:
    """The format, a key of SIGNATURES, or what some of the tensors are called."""
    names = list(tensors)
    if any(".lora_A." in name for name in names):
        return "a PEFT adapter"
    for label, marks in SIGNATURES.items():
        if all(mark in tensors for mark in marks):
            return label
    return f"an unknown model ({', '.join(names[:3])} ...)"


def family(tensors: Mapping[str, Any]) -> str:
    """ "clip", "blip", "siglip", "artemis", "t5", or "" for all others."""
    first = describe(tensors).split()[0].lower()
    return first if first in ("clip", "blip", "siglip", "artemis", "t5") else ""
