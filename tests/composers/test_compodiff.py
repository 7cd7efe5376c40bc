"""CompoDiff: the denoiser against the released code, the objectives, the sampled query."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cir_jax.composers import compodiff
from cir_jax.composers.compodiff import CompoDiff
from cir_jax.diffusion.schedule import q_sample
from cir_jax.errors import ConfigError, DataError
from cir_jax.sharding import placement
from cir_jax.sharding.mesh import make_mesh
from cir_jax.training.step import Step, init_state, sharded
from cir_jax.weights.convert import flatten

SIZES = {"depth": 2, "heads": 2, "dim_head": 8, "cross_heads": 2}


@pytest.fixture(scope="module")
def made(tiny):
    """(composer, params, frozen) on the tiny backbone."""
    backbone, backbone_params = tiny
    composer = CompoDiff(backbone, **SIZES, steps=3, samples_per_query=2)
    params = jax.jit(composer.init)(jax.random.key(5))
    return composer, params, composer.freeze(backbone_params)


@pytest.fixture(scope="module")
def batch(tiny):
    """Six rows: text to image, masked and triplet objectives, two of each."""
    backbone, _ = tiny
    rng = np.random.default_rng(7)
    mask = np.zeros((6, 64, 64), np.float32)
    mask[2:4, 10:30, 20:40] = 1
    return {
        "target_features": rng.normal(size=(6, 24)).astype(np.float32),
        "reference_features": rng.normal(size=(6, 24)).astype(np.float32),
        "has_reference": np.arange(6) >= 2,
        "token_ids": backbone.tokenizer(["a red star", "make it blue", "no star"] * 2, 16),
        "mask": mask,
    }


# --- the network


@pytest.fixture(scope="module")
def step(made):
    """(batch, one key per row) -> ((loss, (metrics, rows)), gradients), compiled once."""
    composer, params, frozen = made

    @jax.jit
    def compiled(params, batch, rngs):
        def loss(params):
            rows = composer.encode(params, frozen, batch, rngs)
            value, metrics = composer.objective(params, rows)
            return value, (metrics, rows)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return lambda batch, rngs: compiled(params, batch, rngs)


def keys(seed, n=6):
    return jax.random.split(jax.random.key(seed), n)


def test_rows_of_all_objectives_in_one_batch(step, batch):
    (value, (metrics, _)), _ = step(batch, keys(0))
    assert sorted(metrics) == ["mse_masked", "mse_text", "mse_triplet"]
    np.testing.assert_allclose(value, np.mean(list(metrics.values())), rtol=1e-5)  # two rows each
    assert value == step(batch, keys(0))[0][0]
    assert value != step(batch, keys(1))[0][0]


@pytest.mark.parametrize(("has", "objective"), [(False, "mse_text"), (True, "mse_triplet")])
def test_a_batch_of_one_objective(step, batch, has, objective):
    """Stage 1, and triplets only: the metric of an empty group is 0 and not NaN."""
    change = {"has_reference": np.full(6, has), "mask": np.zeros_like(batch["mask"])}
    (value, (metrics, _)), grads = step(batch | change, keys(0))
    np.testing.assert_allclose(metrics.pop(objective), value, rtol=1e-5)
    assert np.isfinite(value) and not any(metrics.values())
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))


def test_the_gradient_reaches_every_parameter(step, batch):
    _, grads = step(batch, keys(2))
    grads = flatten(grads)
    # two positions and a null key only read the first two rows of the relative-position table
    table = grads.pop(("relative_bias",))
    assert np.abs(table[:2]).min() > 0 and not table[2:].any()
    for path, grad in grads.items():
        assert np.abs(grad).max() > 0, path


def test_a_row_depends_on_itself_alone(step, batch):
    """Its randomness too, so that microbatches and shards change nothing."""
    order = np.array([3, 1, 5, 0, 2, 4])
    (_, (_, rows)), _ = step(batch, keys(0))
    (_, (_, moved)), _ = step({name: x[order] for name, x in batch.items()}, keys(0)[order])
    np.testing.assert_allclose(moved["error"], rows["error"][order], rtol=1e-5)
    np.testing.assert_array_equal(rows["has_image"], batch["has_reference"])
    np.testing.assert_array_equal(rows["masked"], [False, False, True, True, False, False])


@pytest.mark.parametrize(("drop_text", "drop_image"), [(0, 0), (1, 0), (0, 1)])
def test_what_is_noised_and_what_is_dropped(tiny, batch, monkeypatch, drop_text, drop_image):
    """Equation (2): the noisy input is made from the masked image, the target is the whole one."""
    composer = CompoDiff(tiny[0], **SIZES, drop_text=drop_text, drop_image=drop_image)
    states = lambda ids: ids[..., None] * jnp.ones((1, 1, 2))  # noqa: E731
    monkeypatch.setattr(CompoDiff, "hidden_states", lambda _, __, ids: states(ids))
    frozen = {"null_text": [states(composer.null_token_ids)]}
    monkeypatch.setattr(CompoDiff, "errors", lambda _, *args: args[1:])  # without the parameters
    encode = jax.jit(composer.encode)
    target, noisy, at, text, image, mask, _ = encode({}, frozen, batch, keys(4))["error"]
    time, noise, _, _ = jax.jit(jax.vmap(composer.draw))(keys(4))
    whole, reference = batch["target_features"], batch["reference_features"]
    np.testing.assert_array_equal(target, whole)
    start = np.concatenate([whole[:2], reference[2:4], whole[4:]])
    np.testing.assert_allclose(noisy, q_sample(composer.schedule, start, time, noise), rtol=1e-6)
    np.testing.assert_array_equal(at, time)
    expected = np.repeat(composer.null_token_ids, 6, axis=0) if drop_text else batch["token_ids"]
    np.testing.assert_array_equal(text[..., 0], expected)
    kept = (1 - drop_image) * batch["has_reference"][:, None]
    np.testing.assert_array_equal(image, reference * kept)
    np.testing.assert_array_equal(mask, batch["mask"])


def test_draws_have_the_rates_of_the_config_and_both_ends_of_time_are_finite(made, step, batch):
    composer, _, _ = made
    rngs = keys(0, 20_000)
    composer = CompoDiff(composer.backbone, **SIZES, drop_text=0.3, drop_image=0.1)
    time, noise, no_text, no_image = jax.jit(jax.vmap(composer.draw))(rngs)
    assert time.min() == 0 and time.max() == 999 and abs(time.mean() - 499.5) < 10
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    # standard errors: 0.0032, 0.0021, 0.0012
    assert abs(no_text.mean() - 0.3) < 0.015
    assert abs(no_image.mean() - 0.1) < 0.01
    assert abs((no_text & no_image).mean() - 0.03) < 0.006
    # the time does not depend on the rates
    ends = np.array([int(time.argmin()), int(time.argmax())] * 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step(batch, rngs[ends])))


def test_twenty_steps_do_not_depend_on_the_mesh(made, batch):
    """All three objectives; losses of each step and averaged parameters in the end."""
    composer, params, frozen = made
    batch = jax.tree.map(lambda x: np.concatenate([x, x, x])[:16], batch)
    found = []
    for sizes in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
        optimizer, held = optax.adamw(1e-3), placement.place(mesh, frozen)
        make = functools.partial(init_state, composer, optimizer, seed=0, ema=True)
        state = sharded(mesh, lambda params, make=make: make(params=params), params)
        step = Step(
            *(mesh, state, held),
            composer=composer,
            optimizer=optimizer,
            ema_decay=0.9,
            microbatches=1,
        )
        rows, losses = placement.global_batch(mesh, batch), []
        for _ in range(20):
            state, metrics = step(state, held, rows)
            losses.append([metrics[name] for name in ("loss", "mse_masked", "mse_triplet")])
        found.append((np.asarray(losses), jax.device_get(state.ema)))
    (one, params_of_one), (eight, params_of_eight) = found
    assert one[-1, 0] < 0.8 * one[0, 0]
    np.testing.assert_allclose(eight, one, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params_of_eight, params_of_one
    )


def test_data_without_masks_has_no_metric_of_them(made):
    composer, params, _ = made
    rows = {"error": jnp.asarray([1.0, 2.0, 4.0]), "has_image": jnp.asarray([False, True, True])}
    value, metrics = composer.objective(params, rows)
    assert abs(value - 7 / 3) < 1e-6 and metrics == {"mse_text": 1.0, "mse_triplet": 3.0}


def test_stage_one_needs_no_reference_at_all(made, batch):
    composer, _, frozen = made
    image, has = composer.image_condition(frozen, {"token_ids": batch["token_ids"]})
    assert image.shape == (6, 24) and not image.any() and not has.any()


# --- composing


@pytest.fixture(scope="module")
def query(made, batch):
    """Everything a query may hold, at the values that an absent field has."""
    composer, _, _ = made
    return {
        "reference_features": batch["reference_features"],
        "token_ids": batch["token_ids"],
        "negative_token_ids": np.repeat(composer.null_token_ids, 6, axis=0),
        "mask": np.zeros_like(batch["mask"]),
        "has_reference": np.ones(6, bool),
        "guidance": np.tile(np.float32(composer.guidance), (6, 1)),
        "query_index": np.arange(6, dtype=np.int32),
    }


@pytest.fixture(scope="module")
def compose(made):
    """(query, seed) -> features; one program per set of fields and batch size."""
    composer, params, frozen = made
    compiled = jax.jit(composer.compose)
    return lambda query, seed=0: np.asarray(compiled(params, frozen, query, jax.random.key(seed)))


def test_compose_is_deterministic_and_unit_norm(compose, query):
    first = compose(query)
    np.testing.assert_allclose(np.linalg.norm(first, axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(first, compose(query))
    assert np.abs(first - compose(query, seed=1)).max() > 1e-3


def test_batched_equals_one_by_one(compose, query):
    """A query alone, without the optional fields, and in a batch, with all of them."""
    together = compose(query)
    for i in (0, 3, 5):
        fields = ("reference_features", "token_ids", "query_index")
        alone = compose({name: query[name][i : i + 1] for name in fields})
        np.testing.assert_allclose(alone[0], together[i], atol=2e-5)


def test_parameters_for_one_query_give_the_same_numbers(made, query):
    composer, params, frozen = made
    params = jax.tree.map(lambda x: x + 0.1 * (x.ndim == 1), params)  # biases begin at zero
    other = composer.for_one_query(params)
    fields = ("reference_features", "token_ids", "query_index")
    query = {name: query[name][:1] for name in fields}
    found = jax.jit(composer.compose)(other, frozen, query, jax.random.key(0))
    expected = jax.jit(composer.compose)(params, frozen, query, jax.random.key(0))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    names = {path[-1].key for path, _ in jax.tree.leaves_with_path(other)}
    assert "transposed" in names and "kernel" not in names


def test_each_field_of_a_query_counts(compose, query, batch):
    plain = compose(query)
    for change in (
        {"negative_token_ids": query["token_ids"][::-1]},
        {"mask": np.ones_like(query["mask"])},
        {"guidance": query["guidance"] * 0.5},
        {"has_reference": np.zeros(6, bool)},
        {"query_index": query["query_index"] + 6},
    ):
        assert np.abs(compose(query | change) - plain).min(axis=0).max() > 1e-4, change
    # without an image its weight does nothing, and neither do the features
    alone = {"has_reference": np.zeros(6, bool)}
    weight = {"guidance": query["guidance"] * np.float32([0, 1])}
    other = {"reference_features": batch["target_features"]}
    np.testing.assert_allclose(
        compose(query | alone | weight | other), compose(query | alone), atol=2e-5
    )


def test_text_shorter_than_the_context_equals_padded(tiny, made, batch):
    backbone, _ = tiny
    composer, _, frozen = made
    hidden_states = jax.jit(
        lambda frozen, ids: composer.hidden_states(frozen, composer.of_one_length(ids)[0])
    )
    ids = batch["token_ids"]
    assert (ids[:, 8:] == backbone.tokenizer.pad_id).all()
    padded = hidden_states(frozen, ids)
    assert padded.shape == (6, 16, 32)
    np.testing.assert_allclose(hidden_states(frozen, ids[:, :8]), padded, atol=1e-6)


def test_padding_is_a_condition_that_the_text_tower_hides_from_itself(tiny, made):
    """As the release encodes text: all positions are kept, none attends to padding."""
    backbone, backbone_params = tiny
    composer, _, frozen = made
    ids = backbone.tokenizer(["a red star"], 16)
    end = int((ids == backbone.tokenizer.eos_id).argmax())
    hidden = jax.jit(composer.hidden_states)(frozen, ids)
    plain = jax.jit(backbone.text_hidden_states)(backbone_params, ids)
    np.testing.assert_allclose(hidden[:, : end + 1], plain[:, : end + 1], atol=1e-5)
    assert np.abs(hidden - plain)[:, end + 1 :].max() > 1e-3


def test_the_null_text_is_encoded_once_for_all_queries(made, tiny, query, monkeypatch):
    composer, params, frozen = made
    expected = jax.jit(tiny[0].text_conditions)(tiny[1], composer.null_token_ids)
    np.testing.assert_allclose(frozen["null_text"][0], expected[0], atol=1e-6)
    shapes = jax.tree.map(np.shape, composer.freeze(tiny[1], shapes_only=True)["null_text"])
    assert shapes == jax.tree.map(np.shape, frozen["null_text"])
    encoded = []
    encode = CompoDiff.hidden_states
    monkeypatch.setattr(
        CompoDiff, "hidden_states", lambda *args: (encoded.append(args[2]), encode(*args))[1]
    )
    image = query["reference_features"]
    plain = {k: v for k, v in query.items() if k != "negative_token_ids"}
    jax.eval_shape(lambda: composer.branches(params, frozen, plain, image))
    assert len(encoded) == 1 and encoded[0].shape == query["token_ids"].shape
    assert "negative_token_ids" in query
    jax.eval_shape(lambda: composer.branches(params, frozen, query, image))
    assert len(encoded) == 3


def test_hidden_padding_is_no_condition_at_any_length(tiny, made, compose, query, batch):
    """Bucketed or padded to the context, beside a longer negative text; in training, too."""
    _, params, _ = made
    composer = CompoDiff(tiny[0], **SIZES, steps=3, samples_per_query=2, padding="hidden")
    frozen = composer.freeze(tiny[1])
    assert composer.pools_text and composer.null_token_ids.shape == (1, 8)
    hidden, key = jax.jit(composer.compose), jax.random.key(0)
    whole = hidden(params, frozen, query, key)
    short = {"token_ids": query["token_ids"][:, :8]}
    np.testing.assert_allclose(hidden(params, frozen, query | short, key), whole, atol=2e-5)
    assert np.abs(whole - compose(query)).max() > 1e-4  # which reads it
    encode = jax.jit(lambda batch: composer.encode(params, frozen, batch, keys(0))["error"])
    cut = batch | {"token_ids": batch["token_ids"][:, :8]}
    np.testing.assert_allclose(encode(cut), encode(batch), rtol=1e-4)
    with pytest.raises(ConfigError, match="padding='hidden' is for one text encoder and"):
        CompoDiff(tiny[0], **SIZES, padding="hidden", conditioning="tokens")


def test_samples_are_averaged_and_mixed_with_the_source(tiny, made, query, monkeypatch):
    backbone, _ = tiny
    _, params, frozen = made
    samples = np.random.default_rng(0).normal(size=(6, 3, 24)).astype(np.float32)
    monkeypatch.setattr(compodiff, "ddim", lambda *_, **__: (samples, None))
    monkeypatch.setattr(CompoDiff, "branches", lambda *_: None)
    reference = query["reference_features"]
    for weight in (0.0, 0.1, 1.0):
        composer = CompoDiff(backbone, **SIZES, source_mixing=weight)
        expected = (1 - weight) * samples.mean(1) + weight * reference
        expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
        got = composer.compose(params, frozen, query, jax.random.key(0))
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_scale_of_features(tiny, query):
    features = query["reference_features"]
    plain, scaled = (
        CompoDiff(tiny[0], **SIZES, feature_scale=scale).scaled(features)
        for scale in ("none", "unit_variance")
    )
    np.testing.assert_array_equal(plain, features)
    np.testing.assert_allclose(np.mean(np.square(scaled), axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"padding": "seen"}, "unknown padding"),
        ({"mask_fill": "gray"}, "Did you mean 'grey'"),
        ({"conditioning": "token"}, "Did you mean 'tokens'"),
        ({"guidance": (7.5, float("nan"))}, "two finite weights"),
        ({"noised_reference": 2}, "noised_reference=2: expected a fraction"),
        ({"feature_scale": "unit_var"}, "Did you mean 'unit_variance'"),
        ({"steps": 0}, "steps=0: expected 1 to timesteps=1000"),
        ({"guidance": (7.5,)}, "two weights"),
        ({"drop_text": 1.5}, "drop_text=1.5: expected a fraction"),
        ({"samples_per_query": 0}, "samples_per_query=0"),
        ({"dim_head": 7}, "dim_head=7"),
    ],
)
def test_settings_that_cannot_work_are_named(tiny, setting, message):
    with pytest.raises(ConfigError) as error:
        CompoDiff(tiny[0], **(SIZES | setting))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reference_features": np.zeros((6, 32), np.float32)},
            r"shape \(6, 32\) for 6 texts; exp",
        ),
        (
            {"reference_features": np.zeros((5, 24), np.float32)},
            r"shape \(5, 24\) for 6 texts; exp",
        ),
        ({"mask": np.zeros((6, 32, 32), np.float32)}, r"masks of shape \(6, 32, 32\): expected"),
    ],
)
def test_conditions_of_other_sizes_are_named(made, query, batch, change, message):
    composer, params, frozen = made
    with pytest.raises(DataError, match=message):
        jax.eval_shape(composer.compose, params, frozen, query | change, jax.random.key(0))
    with pytest.raises(DataError, match=message):
        jax.eval_shape(composer.encode, params, frozen, batch | change, keys(0))


def test_a_noised_reference_is_where_sampling_begins(tiny, made, query):
    """Equation (2) read as the released sampler: noise of the time it starts at, then DDIM's."""
    _, params, frozen = made
    composer = CompoDiff(tiny[0], **SIZES, steps=2, samples_per_query=2, noised_reference=0.4)
    started = []

    def spying(*_):  # what the network would answer has no share in this
        return lambda x, time: started.append((x, time)) or x

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(compodiff, "guided", spying)
        patch.setattr(CompoDiff, "branches", lambda *_: None)
        composer.compose(params, frozen, query, jax.random.key(0))
        image = composer.scaled(query["reference_features"])
    (x, time), (_, second) = started
    assert (int(time), int(second)) == (399, 199) and composer.first == 600
    draw = jax.random.fold_in(jax.random.key(0), 0)
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(draw, i), (2, 24)))(
        query["query_index"]
    )
    for sample in range(2):
        expected = q_sample(composer.schedule, image, np.full(6, 399), noise[:, sample])
        np.testing.assert_allclose(x[:, sample], expected, atol=1e-5)


def test_it_computes_in_the_dtype_of_its_backbone(tiny, made, query):
    backbone, _ = tiny
    _, params, frozen = made
    half = dataclasses.replace(backbone, model=backbone.model.clone(dtype=jnp.bfloat16))
    composer = CompoDiff(half, **SIZES, steps=3, samples_per_query=2)
    kept = jax.eval_shape(composer.branches, params, frozen, query, query["reference_features"])
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}
    result = jax.eval_shape(composer.compose, params, frozen, query, jax.random.key(0))
    assert result.dtype == jnp.float32
