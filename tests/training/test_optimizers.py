"""What the optimisers leave alone."""

import functools

import jax
import numpy as np
import optax
import pytest

from cir_jax.composers.clip_pretraining import ClipPretraining
from cir_jax.errors import ConfigError
from cir_jax.models.backbone import Backbone
from cir_jax.models.clip import Clip, ClipConfig, TextConfig
from cir_jax.models.resnet import STATISTICS, FrozenBatchNorm, ResNetConfig
from cir_jax.training import optimizers
from cir_jax.weights.convert import flatten
from experiments import base


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_statistics_of_frozen_batch_norms_do_not_move(name):
    """Not even by the decay of a pattern that takes everything."""
    module, rng = FrozenBatchNorm(4), np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
    params = {"norm1": {"scale": 2.0, "bias": 1.0, "mean": 0.5, "var": 3.0}}
    params = jax.tree.map(lambda value: np.full(4, value, np.float32), params)
    fields = {"name": name, "learning_rate": 0.1, "weight_decay": 0.5, "decay": ".*"}
    optimizer = optimizers.optimizer(base.OPTIMIZER | fields, 10, lambda v, **kw: 0)

    def loss(params):
        return (module.apply({"params": params["norm1"]}, x) ** 2).sum()

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    moved, state = params, optimizer.init(params)
    for _ in range(3):
        moved, state = step(moved, state)
    for path, before in flatten(params).items():
        assert np.array_equal(before, flatten(moved)[path]) == (path[-1] in STATISTICS), path


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_what_is_chosen_is_trained(name):
    """The rest neither moves nor decays, and has no moments; what is trained moves as alone."""
    inside = {"layers_0": {"fc1": {"kernel": np.full((4, 4), 2.0, np.float32)}}}
    params = {"text": inside, "word": jax.tree.map(np.copy, inside)}
    fields = base.OPTIMIZER | {"name": name, "learning_rate": 0.1, "decay": ".*", "clip_norm": 1.0}

    def made(**more):
        return optimizers.optimizer(fields | more, 10, lambda v, **kw: 0)

    @functools.partial(jax.jit, static_argnums=0)
    def step(optimizer, params):
        state = optimizer.init(params)
        grads = jax.tree.map(lambda x: np.arange(x.size, dtype=np.float32).reshape(4, 4), params)
        updates, _ = optimizer.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    state, moved = step(made(only="/text/.*"), params)
    alone_state, alone = step(made(), {"text": inside})
    jax.tree.map(np.testing.assert_array_equal, moved["word"], params["word"])
    jax.tree.map(np.testing.assert_array_equal, moved["text"], alone["text"])
    assert not np.allclose(moved["text"]["layers_0"]["fc1"]["kernel"], 2.0)
    sizes = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state, alone_state))
    assert len(set(sizes)) == 1
    with pytest.raises(ConfigError, match="only='/txet/.*' matches no parameter.*/text/layers_0/f"):
        made(only="/txet/.*").init(params)


def test_a_resnet_cannot_be_pretrained(tiny):
    config = ClipConfig(TextConfig(), ResNetConfig())
    backbone = Backbone(Clip(config), tiny[0].tokenizer, tiny[0].image_transform, "rn50@x")
    with pytest.raises(ConfigError, match="batch norms of rn50@x, a ResNet, are frozen.* ViT"):
        ClipPretraining(backbone)


def test_a_backbone_takes_its_share_of_each_update():
    params = {"fusion": {"kernel": np.ones(3)}, "backbone": {"text": {"kernel": np.ones(3)}}}
    gradient = jax.tree.map(lambda x: 2 * x, params)
    moved = {}
    for share in (1.0, 0.1):
        fields = {"learning_rate": 0.5, "backbone_share": share, "clip_norm": 1.0}
        optimizer = optimizers.optimizer(base.OPTIMIZER | fields, 10, lambda v, **kw: 0)
        state = jax.jit(optimizer.init)(params)
        updates, _ = jax.jit(optimizer.update)(gradient, state, params)
        moved[share] = flatten(updates)
    for path, update in moved[1.0].items():
        factor = 0.1 if path[0] == "backbone" else 1.0
        np.testing.assert_allclose(moved[0.1][path], factor * update, rtol=1e-6)
