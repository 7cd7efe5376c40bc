import jax
import numpy as np
import pytest

from cir_jax.errors import WeightsError
from cir_jax.models.t5 import T5Config, T5Encoder, relative_buckets
from cir_jax.weights import t5 as weights
from tests import parity

GOLDEN = parity.ROOT / "tests" / "golden"


def load(name):
    return parity.Fixture.read(GOLDEN / f"{name}.npz")


XL = {
    "d_model": 2048,
    "d_ff": 5120,
    "num_heads": 32,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
}


@pytest.mark.parametrize("fields, count", [({}, 35_330_816), (XL, 1_223_527_424)])
def test_published_sizes(fields, count):
    """T5 v1.0 small and T5 v1.1 XL."""
    tree = weights.shapes(T5Encoder(T5Config.from_dict(fields)))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count


def test_buckets():
    buckets = relative_buckets(200, 32, 128)
    assert buckets[0, :8].tolist() == [0, 17, 18, 19, 20, 21, 22, 23]
    assert buckets[:8, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    # 8 ... 127 share eight buckets; from 128 on there is one
    assert buckets[[8, 11, 12, 16, 32, 64, 127, 128, 199], 0].tolist() == [
        8, 8, 9, 10, 12, 14, 15, 15, 15,
    ]  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("buckets, distance", [(32, 128), (16, 24), (20, 100), (64, 256)])
def test_buckets_are_pytorchs(buckets, distance):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    relative = torch.arange(300)[None] - torch.arange(300)[:, None]
    expected = modeling.T5Attention._relative_position_bucket(relative, True, buckets, distance)
    assert np.array_equal(relative_buckets(300, buckets, distance), expected.numpy())


def test_one_embedding_under_two_names():
    fixture = load("t5_encoder_relu")
    config = T5Config.from_dict(fixture.config["t5_config"])
    both = dict(fixture.params)
    expected = jax.tree.leaves(weights.to_params(both, config))
    for name in (weights.SHARED, weights.EMBEDDING):
        one = {key: value for key, value in both.items() if key != name}
        one |= {"lm_head.weight": np.zeros(1), "decoder.block.0.x": np.zeros(1)}
        got = jax.tree.leaves(weights.to_params(one, config))
        assert all(map(np.array_equal, got, expected))
    both[weights.SHARED] = both[weights.SHARED] + 1
    with pytest.raises(WeightsError, match="differ"):
        weights.to_params(both, config)


def test_parameters_come_back_as_tensors():
    fixture = load("t5_encoder_gated_gelu")
    config = T5Config.from_dict(fixture.config["t5_config"])
    written = weights.to_tensors(weights.to_params(fixture.params, config), config)
    assert written.keys() == fixture.params.keys() - {weights.EMBEDDING}
    assert all(np.array_equal(array, fixture.params[name]) for name, array in written.items())


def test_unknown_activation_is_told():
    for proj, message in (
        ("gated-tanh", "unknown activation of a T5 'tanh'"),
        ("a-b", "'a-b': exp"),
    ):
        with pytest.raises(ValueError, match=message):
            T5Config.from_dict({"feed_forward_proj": proj})
    with pytest.raises(ValueError, match="num_heads=0: expected a whole number, 1 or more"):
        T5Config.from_dict({"num_heads": 0})


def test_the_activation_as_transformers_reads_it():
    """FLUX's copies say it in two fields, and leave feed_forward_proj out."""
    configuration = pytest.importorskip("transformers.models.t5.configuration_t5")
    for values in (
        {},
        {"feed_forward_proj": "gated-gelu"},
        {"feed_forward_proj": "gated-silu"},
        {"feed_forward_proj": "gelu"},
        {"dense_act_fn": "gelu_new", "is_gated_act": True},
        {"feed_forward_proj": "relu", "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True},
    ):
        ours, theirs = T5Config.from_dict(values), configuration.T5Config(**values)
        assert (ours.dense_act_fn, ours.is_gated_act) == (theirs.dense_act_fn, theirs.is_gated_act)
