"""Equal layers, one after the other: as many copies in a compiled program, or one in a loop.

A loop is compiled once for all layers (`config.scan`; benchmarks/README.md says what that saves).
Parameters and their paths are the same either way, each layer its own; for the loop they are laid
side by side when a step begins. Numbers are the same but for rounding.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_scanned = contextvars.ContextVar("scanned", default=False)


@contextlib.contextmanager
def scanned(wanted: bool) -> Iterator[None]:
    """Inside, equal layers are a loop, or are not; for the time a function is traced."""
    token = _scanned.set(wanted)
    try:
        yield
    finally:
        _scanned.reset(token)


def run(
    layers: Sequence[nn.Module],
    step: Callable[..., jax.Array],
    x: jax.Array,
    each: Sequence[Any] | None = None,
) -> jax.Array:
    """x after `x = step(layer, x)` of all layers, whose parameters exist.

    each: something of each layer, trees of arrays of the same shapes: `step(layer, x, of_layer)`.
    """
    given = [()] * len(layers) if each is None else [(own,) for own in each]
    if not _scanned.get() or len(layers) < 2 or layers[0].is_initializing():
        for layer, own in zip(layers, given, strict=True):
            x = step(layer, x, *own)
        return x
    # unbound: its parameters are arguments of the loop
    layer = layers[0].clone(parent=None, name=None)
    variables = [own.variables for own in layers]

    def body(x: jax.Array, of_layer: Any) -> tuple[jax.Array, None]:
        variables, own = of_layer
        return nn.apply(step, layer)(variables, x, *own), None

    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(variables, given, strict=True))
    return jax.lax.scan(body, x, together)[0]
