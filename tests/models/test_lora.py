import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cir_jax.errors import ConfigError, WeightsError
from cir_jax.models import lora
from cir_jax.models.blip import Blip, BlipConfig
from cir_jax.models.t5 import T5Config, T5Encoder
from cir_jax.weights import blip as blip_weights
from tests import parity
from tests.parity_core import nhwc
from tests.weights import worlds

GOLDEN = parity.ROOT / "tests" / "golden"


def load(name):
    return parity.Fixture.read(GOLDEN / f"{name}.npz")


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""To compile in less time: compiling is what these tests do most."""

PATTERN = r".*/attention/(query|value)/kernel"


def random_adapter(params, pattern=PATTERN, rank=3):
    """An adapter whose product is not zero."""
    adapter = lora.init(jax.random.key(1), params, pattern, rank)
    leaves, tree = jax.tree.flatten(adapter)
    rng = np.random.default_rng(0)
    return tree.unflatten([rng.normal(0, 0.2, x.shape).astype(np.float32) for x in leaves])


def difference(one, other):
    """Largest difference, relative to the largest value."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    return max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(a).max() for a, _ in pairs)


def blip():
    fixture = load("blip_itm_hf_eps6")
    # recomputed layers, as training them wants it
    model = Blip(BlipConfig.from_dict(fixture.config), remat=True)
    inputs = (nhwc(fixture.inputs["pixel_values"]), fixture.inputs["input_ids"])
    return model, blip_weights.to_params(fixture.params, model.config), inputs


def t5():
    model = T5Encoder(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=20, num_layers=2))
    ids = np.arange(12).reshape(2, 6)
    return model, jax.jit(model.init)(jax.random.key(0), ids)["params"], (ids,)


def clip(tiny):
    backbone, params = tiny
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    return backbone.model, params, (images, np.full((2, 5), backbone.config.text.eos_token_id))


@pytest.mark.parametrize("family", ["clip", "blip", "t5"])
def test_merged_equals_unmerged(family, tiny):
    model, params, inputs = {"clip": lambda: clip(tiny), "blip": blip, "t5": t5}[family]()
    adapter = random_adapter(params)

    def merged(adapter):
        return model.apply({"params": lora.merge(params, adapter, 0.7)}, *inputs)

    def unmerged(adapter):
        with lora.attached(adapter, 0.7):
            return model.apply({"params": params}, *inputs)

    def gradient_and_outputs(run, adapter):
        def loss(adapter):
            outputs = run(adapter)
            # fixed, uneven weights: a plain sum of normalised outputs has no gradient
            leaves = [x.reshape(-1) for x in jax.tree.leaves(outputs)]
            return sum(x @ jnp.cos(jnp.arange(x.size)) for x in leaves), outputs

        return jax.grad(loss, has_aux=True)(adapter)

    runs = [
        jax.jit(functools.partial(gradient_and_outputs, run), compiler_options=FAST)
        for run in (merged, unmerged)
    ]
    (one_gradient, one), (other_gradient, other) = (run(adapter) for run in runs)
    assert difference(one, other) < 1e-5
    assert difference(one_gradient, other_gradient) < 1e-5
    _, base = runs[0](jax.tree.map(np.zeros_like, adapter))
    assert difference(base, one) > 1e-3


def test_starts_as_the_base_and_trains_alone(tiny):
    model, params, inputs = clip(tiny)
    adapter = lora.init(jax.random.key(0), params, PATTERN, rank=2)
    merged = lora.merge(params, adapter, 1.0)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert difference(merged, params) == 0
    assert merged["visual_projection"]["kernel"] is params["visual_projection"]["kernel"]
    # two towers of two layers, queries and values of them
    assert len(jax.tree.leaves(adapter)) == 2 * 2 * 2 * 2
    key = lora.init(jax.random.key(0), params, r".*/layers_0/attention/query/kernel", rank=2)
    one, other = (x["text"]["layers_0"]["attention"]["query"]["kernel"] for x in (adapter, key))
    assert np.array_equal(one["a"], other["a"])


def test_convolutions_are_adapted_by_merging():
    model = nn.Conv(5, (3, 3), padding=1)
    x = np.random.default_rng(0).random((1, 4, 4, 2), np.float32)
    params = {"stem": model.init(jax.random.key(0), x)["params"]}
    adapter = random_adapter(params, r"stem/kernel", rank=2)
    a, b = adapter["stem"]["kernel"]["a"], adapter["stem"]["kernel"]["b"]
    assert a.shape == (18, 2) and b.shape == (2, 5)
    merged = lora.merge(params, adapter, 0.5)
    delta = {"kernel": 0.5 * (a @ b).reshape(3, 3, 2, 5), "bias": np.zeros(5, np.float32)}
    apply = jax.jit(model.apply)
    parts = (apply({"params": tree}, x) for tree in (params["stem"], delta))
    np.testing.assert_allclose(apply({"params": merged["stem"]}, x), sum(parts), atol=1e-5)


def test_a_resnet_by_path():
    """Its attention pool either way; its convolutions by merging, and attaching them says so."""
    backbone, params = worlds.make("resnet")
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)

    def run(params, adapter=None):
        with lora.attached(adapter or {}, 0.7):
            return backbone.model.apply({"params": params}, images, method="encode_image")

    adapter = random_adapter(params, r"vision/attention_pool/(query|value)/kernel")
    merged = jax.jit(run)(lora.merge(params, adapter, 0.7))
    assert difference(merged, jax.jit(run)(params, adapter)) < 1e-5
    assert difference(merged, jax.jit(run)(params)) > 1e-4
    convolutions = random_adapter(params, r"vision/stages_1_0/conv\d/kernel")
    assert convolutions["vision"]["stages_1_0"]["conv2"]["kernel"]["a"].shape == (9 * 8, 3)
    assert difference(lora.merge(params, convolutions, 0.7), params) > 1e-3
    with pytest.raises(WeightsError, match="stages_1_0/conv1/kernel is not of a dense layer; use"):
        jax.eval_shape(run, params, convolutions)


def test_half_precision_base_keeps_its_type(tiny):
    _, params = tiny
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    merged = lora.merge(half, random_adapter(half), 1.0)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4, name="layer")
        return layer(x), layer(x)


def test_dropout_is_on_the_adapters_input():
    model, x = Twice(), np.ones((2000, 3), np.float32)
    params = model.init(jax.random.key(0), x)["params"]
    adapter = random_adapter(params, r"layer/kernel")

    def run(**options):
        with lora.attached(adapter, 1.0, **options):
            return model.apply({"params": params}, x)

    plain, _ = run()
    one, two = run(dropout=0.5, rng=jax.random.key(1))
    again, _ = run(dropout=0.5, rng=jax.random.key(1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, two)  # a mask for each call
    # the mean over masks is the value without dropout; every row is the base plus some inputs
    np.testing.assert_allclose(one.mean(0), plain[0], atol=0.05)
    base = np.asarray(model.apply({"params": params}, x)[0][0])
    delta = adapter["layer"]["kernel"]["a"] @ adapter["layer"]["kernel"]["b"]
    subsets = [2.0 * np.array([i & 1, i >> 1 & 1, i >> 2]) @ delta for i in range(8)]
    distance = np.abs(np.asarray(one)[:, None] - base - np.stack(subsets)[None]).max(-1)
    assert distance.min(1).max() < 1e-5
    assert len(set(distance.argmin(1))) == 8
    with pytest.raises(ValueError, match="needs rng"):
        run(dropout=0.5)


def test_dropout_is_the_same_in_recomputed_layers(tiny):
    """The backward pass of a rematerialised model draws the masks of its forward pass."""
    backbone, params = tiny
    adapter = random_adapter(params, r"text/layers_\d/attention/(query|value)/kernel")
    ids = backbone.tokenizer(["a red star", "no"])

    def gradient(model):
        def loss(adapter, seed):
            with lora.attached(adapter, 0.7, dropout=0.4, rng=jax.random.key(seed)):
                features = model.apply({"params": params}, ids, method="encode_text")
            return jnp.sum(features * jnp.cos(jnp.arange(24))[None])

        return jax.jit(jax.value_and_grad(loss), compiler_options=FAST)

    plain, again = gradient(backbone.model), gradient(backbone.with_remat().model)
    assert difference(plain(adapter, 1), again(adapter, 1)) < 1e-5
    assert difference(plain(adapter, 1), again(adapter, 2)) > 1e-3


def test_saved_and_loaded(tmp_path, tiny):
    _, params = tiny
    config = lora.LoraConfig(rank=3, alpha=6.0, dropout=0.1)
    assert config.scale == 2.0
    adapter = random_adapter(params, config.pattern, config.rank)
    lora.save(tmp_path / "adapter.safetensors", adapter, config)
    got, got_config = lora.load(tmp_path / "adapter.safetensors")
    assert got_config == config
    assert difference(got, adapter) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]
    (tmp_path / "other").write_bytes(b"no adapter")
    for name in ("other", "missing"):
        with pytest.raises(WeightsError, match=name):
            lora.load(tmp_path / name)


def test_misfits_are_told(tiny):
    model, params, inputs = clip(tiny)
    with pytest.raises(ConfigError, match="matches no parameter.*vision/"):
        lora.init(jax.random.key(0), params, r".*/attn/.*", 2)
    with pytest.raises(ConfigError, match="kernels only"):
        lora.init(jax.random.key(0), params, r".*/query/.*", 2)
    with pytest.raises(ConfigError, match="rank 0"):
        lora.init(jax.random.key(0), params, PATTERN, 0)
    adapter = random_adapter(params)
    with pytest.raises(WeightsError, match="text/layers_0"):
        lora.merge({"text": {}, "vision": params["vision"]}, adapter, 1.0)


def test_a_tower_alone_runs_with_an_adapter_of_both(tiny):
    """Texts alone, images alone; and with an adapter of texts alone, images as they were."""
    model, params, (images, ids) = clip(tiny)
    both = random_adapter(params)
    only_text = {"text": both["text"]}

    for method, inputs in (("encode_text", ids), ("encode_image", images)):
        run = functools.partial(model.apply, method=method)
        base = run({"params": params}, inputs)
        for adapter in (both, only_text):
            with lora.attached(adapter, 0.7):
                got = run({"params": params}, inputs)
            expected = run({"params": lora.merge(params, adapter, 0.7)}, inputs)
            assert difference(got, expected) < 1e-5
            moves = adapter is both or method == "encode_text"
            assert (difference(got, base) > 1e-3) == moves


class Raw(nn.Module):
    """Computes with one dense layer's kernel itself, as a fused matrix product does."""

    @nn.compact
    def __call__(self, x):
        used = nn.Dense(3, name="used")
        raw = nn.Dense(3, name="raw")
        if self.is_initializing():
            raw(x)
        return used(x) + x @ raw.variables["params"]["kernel"]


class Holder(nn.Module):
    def setup(self):
        self.inner, self.other = Raw(), nn.Dense(3)

    def __call__(self, x):
        return self.inner(x)

    def rest(self, x):
        return self.other(x)


def test_an_adapter_that_would_not_act_is_an_error(tiny):
    model, params, (images, _) = clip(tiny)
    adapter = random_adapter(params)

    def encode():
        # traced anew: a trace that is kept does not see an adapter either
        run = functools.partial(model.apply, method="encode_image")
        jax.eval_shape(lambda *inputs: run(*inputs), {"params": params}, images)

    layer = adapter["text"]["layers_0"]["attention"]
    cases = [
        # of another model; of a part of this one, from its own root
        ({"encoder": adapter["vision"]}, "no model was applied that has its kernels, as encoder/"),
        (adapter["vision"], "no model was applied that has its kernels, as layers_0/attention/que"),
        # some of it, though not of what runs; of another size
        (
            adapter | {"text": {"layers_9": {"attention": layer}}},
            "text/layers_9/attention/query/kernel .32 -> 32. does not fit the model, .* no such ke",
        ),
        (
            adapter | {"vision": {"layers_0": {"attention": layer}}},
            r"vision/layers_0/attention/query/kernel \(32 -> 32\) does not fit .*\(48, 4",
        ),
    ]
    for wrong, message in cases:
        with pytest.raises(WeightsError, match=message), lora.attached(wrong, 1.0):
            encode()
    with pytest.raises(WeightsError, match="no model was applied"), lora.attached(adapter, 1.0):
        pass
    other, x = nn.Dense(2), np.ones((1, 3), np.float32)
    with lora.attached(adapter, 1.0):  # another model may run beside it
        other.apply(other.init(jax.random.key(0), x), x)
        encode()


def test_a_function_compiled_before_and_a_kernel_used_by_itself_are_told():
    model, x = Holder(), np.ones((2, 3), np.float32)
    variables = model.init(jax.random.key(0), x)
    variables = {
        "params": variables["params"] | model.init(jax.random.key(0), x, method="rest")["params"]
    }
    run = jax.jit(model.apply)
    run(variables, x)
    adapter = random_adapter(variables["params"], r"inner/(used|raw)/kernel")
    with (
        pytest.raises(WeightsError, match="a function compiled before does not see the adapter"),
        lora.attached(adapter, 1.0),
    ):
        run(variables, x)
    message = "1 of its kernels were not used where their modules ran, as inner/raw/kernel; use lor"
    with pytest.raises(WeightsError, match=message), lora.attached(adapter, 1.0):
        model.apply(variables, x)
    with lora.attached(adapter, 1.0):  # `inner` does not run
        model.apply(variables, x, method="rest")
