"""What the tests of all trained inversion networks need."""

import jax
import jax.numpy as jnp
import numpy as np

from cir_jax.sharding import mesh as meshes
from cir_jax.sharding import placement

ROWS = 16


def features(backbone, rows=ROWS, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, backbone.dim)) * 3


def loss_and_gradient(composer, params, frozen, batch, microbatches=1):
    """Compiled on one device."""
    function = jax.jit(
        jax.value_and_grad(lambda p, f, b, r: composer.loss(p, f, b, r, microbatches)[0])
    )
    return function(params, frozen, batch, jax.random.key(1))


def assert_same(ours, theirs, rtol=1e-5, least=1e-6):
    """Losses and gradients: relative to the largest entry of each array.

    least: what counts as its size at least; a tower has gradients that are zero but for rounding,
    those of the keys' biases.
    """
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), least))


def assert_independent_of_devices_and_parts(composer, params, frozen, batch, rtol=1e-5, least=1e-6):
    """Loss and gradient of the batch at once on eight devices are those in two parts on one device.

    Rows of a device are others than rows of a part: what depended on either would show.
    """
    expected = loss_and_gradient(composer, params, frozen, batch, microbatches=2)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected[1])) > 0
    assert_same(on_devices(composer, params, frozen, batch), expected, rtol, least)


def on_devices(composer, params, frozen, batch):
    """`loss_and_gradient` on eight."""
    mesh = meshes.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    placed = (placement.place(mesh, params), placement.place(mesh, frozen))
    batch = placement.global_batch(mesh, jax.tree.map(np.asarray, batch))
    return loss_and_gradient(composer, *placed, batch)


def with_tail(ids, length, pad=0):
    """The same texts at the full length: padding columns that no bucketed batch has."""
    missing = length - ids.shape[-1]
    return jnp.pad(
        jnp.asarray(ids), [(0, 0)] * (ids.ndim - 1) + [(0, missing)], constant_values=pad
    )
