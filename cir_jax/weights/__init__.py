"""Other people's weights: one way in, one way out.

backbone, params = weights.load("openai/clip-vit-large-patch14")
weights.save(Path("exported"), backbone, params)
encoder, variables = weights.load_encoder("mobilenetv2_100")
weights.save_adapter(Path("adapter"), adapter, lora_config, backbone)
"""

from cir_jax.weights.backbones import hub_ids, load, load_architecture, save
from cir_jax.weights.encoders import load_encoder
from cir_jax.weights.peft import load_adapter, save_adapter

__all__ = [
    "hub_ids",
    "load",
    "load_adapter",
    "load_architecture",
    "load_encoder",
    "save",
    "save_adapter",
]
