"""The smallest thing that trains: for tests of the loop and its checkpoints, compiled at once."""

import types

import jax
import jax.numpy as jnp
import optax

from cir_jax.composers.base import Composer
from cir_jax.input.images import ImageTransform
from cir_jax.input.pipeline import Part, Pipeline
from cir_jax.input.records import Images, Records
from cir_jax.sharding.mesh import make_mesh
from cir_jax.training.loop import Stage, Trainer
from tests import tiny as factory


class Brightness(Composer):
    """One parameter, times the brightness of the images."""

    trained = True

    def init(self, rng):
        return {"scale": jnp.ones(())}

    def loss(self, params, frozen, batch, rng, microbatches):
        loss = (params["scale"] * batch["reference_images"] / 255).mean()
        return loss, {"brightness": loss}


def trainer(steps: int = 4, batch_size: int = 8, **stage) -> Trainer:
    """Batches of 32 images in memory, on one device; a checkpoint every 2 steps."""
    composer = Brightness(types.SimpleNamespace(weights_id="none"))
    source = Records(factory.caption_table(32), ("image",), ImageTransform(16, 16))
    pipeline = Pipeline((Part("images", source, Images("images")),), batch_size=batch_size, seed=0)
    defaults = {"optimizer": optax.sgd(1e-3), "log_every": 1, "checkpoint_every": 2}
    stage = Stage("small", steps, seed=0, **(defaults | stage))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    return Trainer(stage, composer, {}, pipeline, mesh)
