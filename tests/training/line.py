"""The smallest thing that trains: two numbers, on rows made of their position."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cir_jax.composers.base import Composer
from cir_jax.sharding.mesh import make_mesh
from cir_jax.training.loop import Stage, Trainer


class Line(Composer):
    trained = True

    def __init__(self, width: int = 8):
        super().__init__(types.SimpleNamespace(weights_id="none@0"))
        self.width = width

    def init(self, rng):
        return {"slope": jax.random.normal(rng, (self.width, 8)), "offset": jnp.zeros((1, 8))}

    def encode(self, params, frozen, batch, rngs):
        return batch["x"] @ params["slope"][:1] + params["offset"] - 2 * batch["x"]

    def objective(self, params, rows):
        return jnp.square(rows).mean(), {}


@dataclasses.dataclass
class Rows:
    """Batch b is a function of b; `before` is called with b, such as to send a signal."""

    batch_size: int = 8
    before: object = None
    data: str = "rows"

    def example(self):
        return {"x": np.zeros((self.batch_size, 1), np.float32)}

    def batches(self, start, stop):
        for number in range(start, stop):
            if self.before:
                self.before(number + 1)
            rows = np.random.default_rng(number).normal(size=(8, 1)).astype(np.float32)
            yield {"x": np.split(rows, jax.process_count())[jax.process_index()]}

    def contents(self):
        return {}  # of tables: there are none

    def __repr__(self):
        return self.data


def trainer(steps=4, width=8, before=None, ema=0.0, optimizer=None, **stage):
    devices = jax.devices()[: jax.process_count()]  # one of each
    mesh = make_mesh({"data": len(devices), "fsdp": 1, "tensor": 1}, devices)
    defaults = {"log_every": 1, "checkpoint_every": 2}
    optimizer = optimizer or optax.adam(1e-2)
    stage = Stage("line", steps, seed=0, optimizer=optimizer, ema=ema, **(defaults | stage))
    return Trainer(stage, Line(width), {}, Rows(before=before), mesh)
