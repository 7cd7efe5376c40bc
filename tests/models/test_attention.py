"""Which attention kernel is taken, and that causal is the triangular mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.models import attention


def test_causal_is_the_triangular_mask_and_masks_add_to_it():
    query, key, value = np.random.default_rng(0).normal(size=(3, 2, 5, 2, 4)).astype(np.float32)
    triangle = np.tril(np.ones((5, 5), bool))[None, None]
    causal = attention.attend(query, key, value, causal=True)
    np.testing.assert_array_equal(causal, attention.attend(query, key, value, triangle))
    seen = np.arange(5) != 1
    both = attention.attend(query, key, value, seen[None, None, None], causal=True)
    np.testing.assert_array_equal(both, attention.attend(query, key, value, triangle & seen))
    # the first position attends to itself alone
    np.testing.assert_allclose(causal[:, 0], value[:, 0], rtol=1e-6)


@pytest.fixture
def asked(monkeypatch):
    """As if on a CUDA device: the implementations that were asked for, first to last."""
    calls, real = [], jax.nn.dot_product_attention

    def recorded(*args, implementation, **kwargs):
        calls.append(implementation)
        return real(*args, **kwargs)

    monkeypatch.setattr(attention, "_on_cuda", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    attention.fused_kernel.cache_clear()
    yield calls
    attention.fused_kernel.cache_clear()


def test_the_fused_kernel_is_for_half_precision_without_a_mask(asked):
    half, full = jnp.ones((1, 4, 2, 8), jnp.bfloat16), jnp.ones((1, 4, 2, 8))
    jax.jit(lambda x: attention.attend(x, x, x, causal=True))(half)
    assert asked == ["cudnn", "cudnn"]  # one to see that it compiles
    attention.attend(half, half, half, causal=True)
    assert asked[2:] == ["cudnn"]
    attention.attend(full, full, full)
    attention.attend(half, half, half, jnp.ones((1, 1, 4, 4), bool))
    attention.attend(half[:, :1], half, half)  # other lengths were not tried
    assert asked[3:] == ["xla", "xla", "xla"]


def test_a_card_without_the_kernel_gets_the_other_and_says_so(monkeypatch, caplog):
    """This machine's own JAX refuses the kernel: there is no such card."""
    monkeypatch.setattr(attention, "_on_cuda", lambda: True)
    attention.fused_kernel.cache_clear()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 2, 8)), jnp.bfloat16)
    mixed = jax.jit(attention.attend)(x, x, x)
    attention.fused_kernel.cache_clear()
    assert "does not take (length, heads, head_dim) (4, 2, 8) in bfloat16" in caplog.text
    np.testing.assert_array_equal(mixed, jax.jit(jax.nn.dot_product_attention)(x, x, x))
