import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.errors import ConfigError, WeightsError
from cir_jax.models import light
from cir_jax.models.light import depthwise
from cir_jax.models.light.blocks import BatchNorm
from cir_jax.models.light.efficientvit import EfficientVitConfig, bias_offsets
from cir_jax.models.light.mobilevit import resize
from cir_jax.weights import timm as weights
from tests import parity
from tests.parity_core import nhwc

GOLDEN = parity.ROOT / "tests" / "golden"


def load(name):
    return parity.Fixture.read(GOLDEN / f"{name}.npz")


def test_batch_norm_trains_as_in_pytorch():
    """Numbers of torch.nn.BatchNorm2d(2) after one batch: momentum 0.1, unbiased variance kept."""
    x = np.arange(12, dtype=np.float32).reshape(1, 2, 3, 2) ** 2
    module = BatchNorm()
    variables = module.init(jax.random.key(0), x, False)
    train = jax.jit(lambda variables, x: module.apply(variables, x, True, mutable=["batch_stats"]))
    y, changed = train(variables, x)
    stats = changed["batch_stats"]
    np.testing.assert_allclose(stats["mean"], [3.6666667, 4.7666667], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [152.84667, 214.44667], rtol=1e-6)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, atol=1e-4)


@pytest.mark.peer
def test_batch_norm_steps_are_pytorchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    theirs, module = torch.nn.BatchNorm2d(3), BatchNorm()
    batches = rng.normal(2.0, 3.0, (3, 4, 5, 5, 3)).astype(np.float32)
    variables = module.init(jax.random.key(0), batches[0], False)
    train = jax.jit(lambda variables, x: module.apply(variables, x, True, mutable=["batch_stats"]))
    for batch in batches:
        expected = theirs(torch.tensor(batch).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y, changed = train(variables, batch)
        variables = {**variables, **changed}
        np.testing.assert_allclose(y, expected.detach(), atol=1e-5)
    stats = variables["batch_stats"]
    np.testing.assert_allclose(stats["mean"], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], theirs.running_var, rtol=1e-5)


def test_training_changes_statistics_only():
    fixture = load("timm_mobilenetv2_tiny")
    model = light.from_dict(fixture.config)
    variables = weights.to_variables(fixture.params, model)
    images = nhwc(fixture.inputs["x"])

    train = jax.jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]))
    feature_map, changed = train(variables)
    assert feature_map.shape == (2, 2, 2, model.config.num_features)
    assert changed.keys() == {"batch_stats"}
    before, after = variables["batch_stats"], changed["batch_stats"]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    assert min(jax.tree.leaves(moved)) > 0


def test_variables_come_back_as_a_whole_state_dict():
    fixture = load("timm_efficientvit_m2_tiny")
    model = light.from_dict(fixture.config)
    classifier = {"head.bn.running_mean": np.zeros(3), "head.linear.weight": np.zeros((2, 3))}
    variables = weights.to_variables(fixture.params | classifier, model)
    written = weights.to_tensors(variables, model)
    assert written.keys() == fixture.params.keys()
    assert all(np.array_equal(array, fixture.params[name]) for name, array in written.items())


def test_attention_windows():
    assert EfficientVitConfig().windows() == (7, 7, 4)
    assert EfficientVitConfig(image_size=112).windows() == (7, 4, 2)
    # numbered in order of first appearance, as the weights are
    assert bias_offsets(2).tolist() == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]


def test_odd_maps_are_resized_corner_to_corner():
    x = np.arange(3, dtype=np.float32).reshape(1, 1, 3, 1)
    got = resize(jnp.asarray(x), 2, 4)
    np.testing.assert_allclose(got[0, :, :, 0], [[0, 2 / 3, 4 / 3, 2]] * 2, rtol=1e-6)
    model = light.create("mobilevitv2_050")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    assert jax.eval_shape(model.apply, weights.shapes(model), images).shape == (1, 8, 8, 256)


def test_unknown_names_and_foreign_weights_are_told():
    with pytest.raises(ConfigError, match="Did you mean 'mobilenetv2_110d'"):
        light.create("mobilenet2_110d")
    with pytest.raises(ConfigError, match="efficientvit_mit"):
        light.from_dict({"arch": "efficientvit_mit"})
    with pytest.raises(ConfigError, match="widths"):
        light.from_dict({"arch": "mobilevitv2", "widths": 2})
    fixture = load("timm_mobilenetv2_tiny")
    with pytest.raises(WeightsError, match="Missing tensors"):
        weights.to_variables(fixture.params, light.create("efficientnet_b0"))
    with pytest.raises(WeightsError, match="wrong shapes"):
        weights.to_variables(fixture.params, light.create("mobilenetv2_100"))


@pytest.mark.parametrize(
    ("side", "stride", "height", "width"),
    [(3, 1, 7, 5), (3, 2, 8, 8), (3, 2, 7, 9), (5, 1, 6, 6), (5, 2, 9, 8), (7, 1, 4, 4)],
)
def test_depthwise_convolution_is_xlas(side, stride, height, width):
    """Shifted sums on a CPU: the map, and the gradients of map and kernel."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.standard_normal((3, height, width, 6)))
    kernel = np.float32(rng.standard_normal((side, side, 1, 6)))
    padding = (((side - 1) // 2,) * 2,) * 2

    def ours(x, kernel):
        return depthwise.convolution(x, kernel, (stride, stride), padding)

    def theirs(x, kernel):
        return depthwise._general(x, kernel, stride, padding)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, x, kernel):
        out, back = jax.vjp(function, x, kernel)
        return out, back(jnp.cos(out))

    found, expected = both(ours, x, kernel), both(theirs, x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)
    half = jax.jit(ours)(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), expected[0], atol=0.3)


def test_depthwise_convolution_is_the_compilers_on_other_platforms():
    x, kernel = np.zeros((1, 8, 8, 4), np.float32), np.zeros((3, 3, 1, 4), np.float32)

    def loss(x, kernel):
        return depthwise.convolution(x, kernel, (1, 1), ((1, 1), (1, 1))).sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel)
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    assert "stablehlo.convolution" in text["tpu"] and "stablehlo.convolution" not in text["cpu"]
