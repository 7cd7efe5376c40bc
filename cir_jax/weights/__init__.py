"""Other people's weights: one way in, one way out.

backbone, params = weights.load("openai/clip-vit-large-patch14")
weights.save(Path("exported"), backbone, params)
"""

from cir_jax.weights.clip import load, load_architecture, save

__all__ = ["load", "load_architecture", "save"]
