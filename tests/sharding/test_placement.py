"""Where frozen parameters really lie: the arrays that `experiment.setup` places, not the rules."""

import json

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from cir_jax import composers, loading
from cir_jax import experiment as experiments
from cir_jax.errors import ConfigError
from cir_jax.input.pipeline import Part, Pipeline
from cir_jax.input.records import Images, Records
from cir_jax.sharding import hlo, placement
from cir_jax.sharding import mesh as meshes
from cir_jax.training import workdir as workdirs
from cir_jax.training.loop import Stage, Trainer, describe
from cir_jax.training.step import Step, init_state
from tests import tiny as factory
from tests.sharding import unoptimised

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def config():
    made = loading.read_experiment("experiments/palavra.py:smoke")
    made.mesh.update(MESH)
    return made


def shards(tree):
    """Bytes that the first device really holds."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


@pytest.mark.parametrize(
    ("given", "fc1", "fc2"),
    [
        ("split", P("fsdp", "tensor"), P("tensor", "fsdp")),
        ("replicated", P(None, "tensor"), P("tensor", None)),
    ],
)
def test_frozen_parameters_lie_as_the_config_says(config, given, fc1, fc2):
    config.frozen = given
    made = experiments.setup(config)
    of_stage = experiments.of_stage(made, "invert")
    for experiment in (made, of_stage):
        frozen = experiment.frozen["backbone"]
        for tower in ("text", "vision"):
            block = frozen[tower]["layers_0"]
            assert block["fc1"]["kernel"].sharding.spec == fc1
            assert block["fc2"]["kernel"].sharding.spec == fc2
            assert block["norm1"]["scale"].sharding.is_fully_replicated
        kernel = frozen["text"]["layers_0"]["fc1"]["kernel"]
        parts = {shard.data.shape for shard in kernel.addressable_shards}
        rows, columns = kernel.shape
        assert parts == {(rows // 2 if given == "split" else rows, columns // 2)}
    # the composer of a stage has the same arrays, not copies of them
    ours, theirs = (jax.tree.leaves(x.frozen["backbone"]) for x in (made, of_stage))
    assert all(a is b for a, b in zip(ours, theirs, strict=True))


def test_configs_of_before_split_and_other_words_are_named(config, tmp_path):
    config.frozen = "replicated"
    workdirs.claim(tmp_path, config)
    config.frozen = "split"  # free to change
    workdirs.claim(tmp_path, config)
    file = tmp_path / workdirs.CONFIG_FILE
    older = {k: v for k, v in json.loads(file.read_text()).items() if k != "frozen"}
    file.write_text(json.dumps(older))
    workdirs.claim(tmp_path, config)
    before = config.copy_and_resolve_references()
    del before["frozen"]
    assert experiments.frozen_rules(before) is placement.RULES
    config.frozen = "replicate"
    with pytest.raises(ConfigError, match="config.frozen 'replicate'. Did you mean 'replicated'"):
        experiments.setup(config)


@pytest.fixture(scope="module")
def pic2word(tiny):
    """(composer, frozen, mesh, state): a frozen CLIP and a network of other sizes."""
    composer = composers.build("pic2word", tiny[0], hidden_dim=40)
    mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
    state = jax.eval_shape(lambda: init_state(composer, optax.adam(1e-3), seed=0, ema=False))
    return composer, composer.freeze(tiny[1]), mesh, state


def make_trainer(composer, frozen, mesh):
    source = Records(factory.caption_table(16), ("image",), composer.backbone.image_transform)
    pipeline = Pipeline(parts=(Part("images", source, Images("images")),), batch_size=8, seed=0)
    return Trainer(Stage("contrastive", 1, 0, optax.adam(1e-3)), composer, frozen, pipeline, mesh)


def gathered(pic2word, name):
    """Shapes of the weights that the step gathers, and bytes of frozen ones on a device."""
    composer, frozen, mesh, state = pic2word
    frozen = placement.place(mesh, frozen, placement.FROZEN[name])
    step = Step(
        mesh,
        state,
        frozen,
        composer=composer,
        optimizer=optax.adam(1e-3),
        ema_decay=0.0,
        microbatches=1,
    )
    for array, sharding in zip(
        jax.tree.leaves(frozen), jax.tree.leaves(step.frozen_shardings), strict=True
    ):
        assert array.sharding == sharding
    batch = {"reference_images": jax.ShapeDtypeStruct((104, 16, 16, 3), np.uint8)}
    text = unoptimised.compiled(step.lower(state, frozen, batch)).as_text()
    found = {
        shape
        for collective in hlo.collectives(text)
        for shape in collective.shapes
        if collective.kind == "all-gather" and np.prod(shape) % 13
    }
    return found, shards(frozen)


def test_replicated_frozen_parameters_are_not_gathered(pic2word):
    own = {(24, 40), (40, 40), (40, 32)}
    split, less = gathered(pic2word, "split")
    whole, more = gathered(pic2word, "replicated")
    assert {shape for shape in split - own} >= {(48, 96), (96, 48), (32, 64), (64, 32)}
    assert whole <= own
    assert 3 * less < more == sum(x.nbytes for x in jax.tree.leaves(pic2word[1]))


@pytest.mark.parametrize("given", placement.FROZEN)
def test_dry_run_says_the_bytes_of_both(pic2word, given):
    composer, frozen, mesh, _ = pic2word
    both = {name: placement.place(mesh, frozen, rules) for name, rules in placement.FROZEN.items()}
    trainer = make_trainer(composer, both[given], mesh)
    line = next(line for line in describe(trainer).splitlines() if "frozen:" in line)
    mib = {name: f"{shards(tree) / 2**20:,.1f} MiB" for name, tree in both.items()}
    assert mib["split"] != mib["replicated"]
    assert f", {mib[given]} per device" in line
    for name, size in mib.items():
        assert f"config.frozen={name}: {size}" in line


def test_arrays_of_other_meshes_and_hosts_lie_by_the_rules(tiny):
    mesh = meshes.make_mesh(MESH)
    other = meshes.make_mesh({"data": 8})
    shardings = placement.own_shardings(mesh, placement.place(other, tiny[1]))
    assert shardings == placement.parameter_shardings(mesh, tiny[1])
    assert placement.own_shardings(mesh, tiny[1]) == shardings
