"""Operations of products, against those that can be counted by hand."""

import jax
import jax.numpy as jnp

from cir_jax.training import flops

X, W = jax.ShapeDtypeStruct((8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3), jnp.float32)
ONE = 2 * 8 * 3 * 3


def count(function, *args):
    return flops.of_products(jax.jit(function).trace(*args).jaxpr)


def test_a_product_and_its_gradients():
    assert count(lambda x, w: x @ w, X, W) == ONE
    assert count(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), W, X) == 2 * ONE
    assert count(jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), (0, 1)), X, W) == 3 * ONE


def test_batched_products():
    batched = jax.ShapeDtypeStruct((5, 8, 3), jnp.float32)
    assert count(lambda x, w: jnp.einsum("bik,kj->bij", x, w), batched, W) == 5 * ONE


def test_loops_count_as_often_as_they_run_and_the_dearest_branch():
    def loop(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]

    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert count(loop, X, W) == 7 * ONE
    assert count(jax.checkpoint(loop), X, W) == 7 * ONE
    assert count(branch, X, W) == 2 * ONE


def test_convolutions():
    images = jax.ShapeDtypeStruct((2, 10, 10, 4), jnp.float32)

    def convolve(images, kernel, groups=1, stride=1):
        return jax.lax.conv_general_dilated(
            *(images, kernel, (stride, stride), "VALID"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    kernel = jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)
    assert count(convolve, images, kernel) == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    each = jax.ShapeDtypeStruct((3, 3, 1, 4), jnp.float32)  # depthwise
    assert count(lambda x, k: convolve(x, k, 4), images, each) == 2 * (2 * 8 * 8 * 4) * 9
    # of patches, the gradient by the images asks for as many: between patches it puts zeros
    patches = jax.ShapeDtypeStruct((2, 2, 4, 6), jnp.float32)
    asked = 2 * (2 * 5 * 5 * 6) * (2 * 2 * 4)
    gradient = jax.grad(lambda x, k: jnp.sum(convolve(x, k, stride=2) ** 2))
    assert count(gradient, images, patches) == 2 * asked
