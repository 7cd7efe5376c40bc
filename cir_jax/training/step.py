"""What happens to a batch: the one train step of all composers."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cir_jax.composers.base import Composer
from cir_jax.models import chunks, layers
from cir_jax.sharding import constraints, placement
from cir_jax.sharding import mesh as meshes
from cir_jax.sharding.together import Together
from cir_jax.training import optimizers

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. `ema` is an empty tree when there is no averaging."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    rng: jax.Array

    @property
    def scored(self) -> Any:
        """The parameters that are evaluated and handed to the next stage."""
        return self.ema if jax.tree.leaves(self.ema) else self.params


def train_step(
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    mesh: Mesh,
    composer: Composer,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    microbatches: int,
    only: str = ".*",
    scan: bool = False,
) -> tuple[TrainState, Metrics]:
    """One update on the global batch. Randomness depends on the step only: resumed runs repeat.

    only: paths of the parameters that `optimizer` trains. scan: equal layers are a loop.
    """
    rng = jax.random.fold_in(state.rng, state.step)

    def loss_of(params: Any) -> tuple[jax.Array, Metrics]:
        return composer.loss(optimizers.held(params, only), frozen, batch, rng, microbatches)

    with chunks.whole(), layers.scanned(scan), constraints.rows_over(mesh):
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params, metrics = composer.settled(optax.apply_updates(state.params, updates), metrics)
    ema = (
        jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, state.ema, params)
        if jax.tree.leaves(state.ema)
        else state.ema
    )
    metrics = metrics | {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, ema, opt_state, state.rng), metrics


def init_state(
    composer: Composer,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema: bool,
    params: Any = None,
    frozen: Any = None,
) -> TrainState:
    """A fresh state; `params` continue another stage or checkpoint instead of `composer.start`.

    frozen: None = `composer.init`, of the same shapes.
    """
    init_rng, train_rng = jax.random.split(jax.random.key(seed))
    if params is None:
        params = composer.init(init_rng) if frozen is None else composer.start(init_rng, frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # a copy: donated buffers must not be shared
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        opt_state=optimizer.init(params),
        rng=train_rng,
    )


class Step:
    """`train_step`, compiled once per batch shape; `traces` counts the compilations."""

    def __init__(self, mesh: Mesh, state: Any, frozen: Any, **bound: Any):
        """state, frozen: trees of arrays or of shapes. The state lies as the rules say, `frozen` as
        its arrays do (`config.frozen`), or by the rules where it is on no mesh."""
        self.traces = 0
        self.state_shardings = placement.parameter_shardings(mesh, state)
        self.frozen_shardings = placement.own_shardings(mesh, frozen)

        def counted(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
            self.traces += 1
            return train_step(state, frozen, batch, mesh=mesh, **bound)

        self._run = Together(
            jax.jit(
                counted,
                in_shardings=(
                    self.state_shardings,
                    self.frozen_shardings,
                    meshes.batch_sharding(mesh),
                ),
                out_shardings=(self.state_shardings, meshes.replicated(mesh)),
                donate_argnums=0,
            )
        )

    def __call__(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        return self._run(state, frozen, batch)

    def lower(self, state: Any, frozen: Any, batch: Any) -> jax.stages.Lowered:
        """Lowered from shapes alone."""
        return self._run.lower(state, frozen, batch)

    def trace(self, state: Any, frozen: Any, batch: Any) -> jax.stages.Traced:
        """Traced from shapes alone, for ahead-of-time compilation."""
        return self._run.trace(state, frozen, batch)


def sharded(mesh: Mesh, make: Callable[..., Any], *args: Any) -> Any:
    """Runs `make(*args)` compiled, its results born sharded by the rules: no host copy."""
    shardings = placement.parameter_shardings(mesh, jax.eval_shape(make, *args))
    return Together(jax.jit(make, out_shardings=shardings))(*args)
