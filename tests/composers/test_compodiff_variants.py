"""CompoDiff as released, from files to an answer; its other text encoders and conditionings."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from cir_jax import composers, loading, weights
from cir_jax.composers import conditions, official
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.models.backbone import Backbone
from cir_jax.models.denoiser import Denoiser, DenoiserConfig, relative_buckets
from cir_jax.retrieval import features
from cir_jax.weights import compodiff as released
from cir_jax.weights import files
from tests import tiny as factory
from tests.weights import worlds
from tests.weights.test_encoders import write_t5

SIZES = {"depth": 1, "heads": 2, "dim_head": 8, "cross_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Towers `images` and `texts` of other widths, a T5, the released checkpoint as on the hub."""
    path = tmp_path_factory.mktemp("released")
    weights.save(path / "images", *worlds.make())
    weights.save(path / "texts", *worlds.make(act="gelu", seed=1, text_width=128))
    write_t5(path / "t5")
    pair = weights.load_architecture(f"{path / 'images'}+{path / 'texts'}")
    composer = composers.build("compodiff", pair, **SIZES)
    params = factory.drawn(composer.init)
    tensors = released.to_tensors(params, composer.config)
    (path / "compodiff").mkdir()
    # safetensors stores a tensor that layers share once
    tensors = {"model." + name: np.asarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path / "compodiff" / "model.safetensors")
    (path / "compodiff" / "config.json").write_text(json.dumps({"model_type": "CompoDiff"}))
    return path


def config_of(folder, images="images", texts="texts"):
    config = loading.read_experiment("compodiff:released")
    assert config.backbone == (
        "openai/clip-vit-large-patch14+laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
    )
    config.backbone = f"{folder / images}+{folder / texts}"
    config.composer.update(SIZES)
    config.composer.steps = 2
    return config


@pytest.fixture(scope="module")
def searcher(folder, tmp_path_factory):
    return loading.load(config=config_of(folder), weights=folder / "compodiff")


def test_the_released_checkpoint_from_files_to_a_ranking(folder, searcher, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(factory.png(rng, size=24))
    mask = np.zeros((24, 24), np.uint8)
    mask[6:20, 3:15] = 255
    (tmp_path / "mask").mkdir()
    Image.fromarray(mask).save(tmp_path / "mask" / "edit.png")
    searcher.cache_dir = tmp_path / "cache"
    searcher.index([tmp_path / f"{i}.png" for i in range(4)])
    given = {"mask": tmp_path / "mask" / "edit.png", "negative_text": "a cat", "k": 4}
    found = dict(searcher.search(tmp_path / "1.png", "a red cat", **given))

    # the same by hand: each tower its own model's, the network of the file's tensors
    composer = searcher.composer
    tensors = load_file(folder / "compodiff" / "model.safetensors")
    denoiser = Denoiser(released.config_of(tensors))
    assert denoiser.config == composer.config and composer.config.text_dim == 128
    assert (composer.samples_per_query, composer.source_mixing, composer.mask_fill) == (
        *(2, 0.1),
        "grey",
    )
    assert composer.backbone.image_transform.squash
    images, images_params = weights.load(folder / "images")
    texts, texts_params = weights.load(folder / "texts")
    image, region = conditions.masked(composer, Image.open(tmp_path / "1.png"), given["mask"])
    assert not image[image.shape[0] // 2, image.shape[1] // 4].any()
    seen = jax.jit(images.encode_image)(images_params, image[None])
    ids = texts.tokenizer(["a red cat", "a cat", ""], 16)
    visible = np.arange(16) <= (ids == texts.tokenizer.eos_id).argmax(1)[:, None]
    read = jax.jit(texts.text_hidden_states)(texts_params, ids, visible)
    by_hand = {
        "reference_features": seen,
        "token_ids": ids[:1],
        "negative_token_ids": ids[1:2],
        "mask": region[None],
        "query_index": np.zeros(1, np.int32),
    }
    states = iter([read[:1], read[1:2]])  # what it reads in place of the pair's text tower
    mine = composers.build(
        "compodiff",
        composer.backbone,
        **{k: v for k, v in config_of(folder).composer.items() if k != "name"},
    )
    mine.hidden_states = lambda frozen, ids: next(states)
    params = released.to_params(tensors)
    key = jax.random.key(np.uint32(0))
    query = jax.jit(mine.compose)(params, {"backbone": None}, by_hand, key)
    raw = features.image_features(
        composer.backbone, searcher.frozen["backbone"], _records(tmp_path), mesh=searcher.mesh
    )
    scores = features.unit(raw) @ np.asarray(query)[0]
    got = [found[tmp_path / f"{i}.png"] for i in range(4)]
    np.testing.assert_allclose(got, scores, atol=3e-4)  # guidance 7.5 enlarges rounding
    for lacks in ("mask", "negative_text"):
        rest = {name: value for name, value in given.items() if name != lacks}
        other = dict(searcher.search(tmp_path / "1.png", "a red cat", **rest))
        assert all(abs(other[path] - found[path]) > 1e-3 for path in found), lacks
    assert searcher.search(text="a red cat", k=1)  # by text alone, which the pair cannot encode


def _records(folder):
    return [{"image": (folder / f"{i}.png").read_bytes()} for i in range(4)]


def test_a_hub_id_or_a_directory_of_the_checkpoint(folder, searcher, tmp_path, monkeypatch):
    composer, file = searcher.composer, folder / "compodiff" / "model.safetensors"
    asked = []

    def fetch(hub_id, name):
        asked.append((hub_id, name))
        return file if name == "model.safetensors" else None

    monkeypatch.setattr(files, "_fetch", fetch)
    (given,) = official.given("official:navervision/CompoDiff-Aesthetic")
    found = official.load(composer, given, searcher.frozen)
    assert asked == [("navervision/CompoDiff-Aesthetic", "model.safetensors")]
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(searcher.params))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="empty/model.safetensors: no such file. Download"):
        official.load(composer, tmp_path / "empty", searcher.frozen)
    monkeypatch.setattr(files, "_fetch", lambda *_: None)
    with pytest.raises(WeightsError, match="navervision/CompoDiff-Aesthetic: no such file. Down"):
        official.load(composer, given, searcher.frozen)


def test_what_does_not_fit_the_checkpoint(folder, tmp_path):
    for images, texts in (("images", "images"), ("texts", "images")):
        with pytest.raises(WeightsError, match=r"text_embedding/kernel \(128, 24\), expected"):
            loading.load(config=config_of(folder, images, texts), weights=folder / "compodiff")
    shutil.copytree(folder / "compodiff", tmp_path / "linear")
    file = tmp_path / "linear" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.noise_scheduler.betas"] = np.linspace(0, 0.02, 1000, dtype=np.float32)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="noise_scheduler.betas differs from this model's. Only"):
        loading.load(config=config_of(folder), weights=tmp_path / "linear")


# --- text encoders


def test_states_of_t5_alone_and_behind_those_of_a_clip(folder):
    alone, params = weights.load(f"{folder / 'images'}+{folder / 't5'}")
    both, both_params = weights.load(f"{folder / 'images'}+{folder / 'texts'}+{folder / 't5'}")
    assert alone.text_widths == (32,) and both.text_widths == (128, 32)
    assert (alone.context_length, both.context_length) == (16, 32)  # as many as CLIP's
    encoder, t5_params = weights.load_encoder(folder / "t5")
    texts, texts_params = weights.load(folder / "texts")
    words = ["a red cats", "red"]
    t5_ids = encoder.tokenizer(words, 16)
    (states,) = jax.jit(alone.text_conditions)(params, alone.tokenizer(words, 16))
    expected = jax.jit(encoder.hidden_states)(t5_params, t5_ids)
    np.testing.assert_allclose(states, expected, atol=1e-6)
    ids = both.tokenizer(words)
    first, second = jax.jit(both.text_conditions)(both_params, ids)
    np.testing.assert_allclose(second, expected, atol=1e-6)
    own = jax.jit(texts.text_conditions)(texts_params, texts.tokenizer(words, 16))[0]
    np.testing.assert_allclose(first, own, atol=1e-6)
    assert both.weights_id.count("@") == 3 and not both.joint
    sizes = {name: set(tree) for name, tree in jax.tree.map(np.shape, both_params).items()}
    made = jax.eval_shape(both.init, jax.random.key(0))
    assert sizes == {name: set(tree) for name, tree in made.items()}
    name = f"{folder / 'images'}+{folder / 'texts'}+{folder / 't5'}"
    assert weights.load_architecture(name).text_widths == (128, 32)
    half = both.with_dtype(jnp.bfloat16)
    assert {half.model.dtype, half.text_model.dtype, half.t5_model.dtype} == {jnp.bfloat16}
    assert alone.with_dtype(jnp.bfloat16).text_model is None
    for method in ("embed_tokens", "text_hidden_states"):
        with pytest.raises(ConfigError, match="read by T5, which serves CompoDiff alone"):
            getattr(both, method)(both_params, ids)
    with pytest.raises(WeightsError, match=r"texts is of clip, expected T5 as the third"):
        weights.load(f"{folder / 'images'}+{folder / 'images'}+{folder / 'texts'}")


@pytest.mark.parametrize("texts", ["t5", "texts+t5"])
def test_it_composes_with_t5(folder, texts):
    parts = "+".join(str(folder / name) for name in texts.split("+"))
    backbone, backbone_params = weights.load(f"{folder / 'images'}+{parts}")
    composer = composers.build("compodiff", backbone, **SIZES, steps=1, samples_per_query=1)
    params = factory.drawn(composer.init)
    projects = "text_projection" in params
    assert projects == (texts != "t5")
    frozen = composer.freeze(backbone_params)
    query = {
        "reference_features": np.ones((2, backbone.dim), np.float32),
        "token_ids": backbone.tokenizer(["a red cats", "red"], backbone.context_length),
        "query_index": np.zeros(2, np.int32),
    }
    compose = jax.jit(composer.compose)
    whole = compose(params, frozen, query, jax.random.key(0))
    assert np.abs(whole[0] - whole[1]).max() > 1e-4  # the text counts
    same = query | {"token_ids": query["token_ids"].copy()}
    length = composer.backbone.tokenizer.first.context_length if projects else 0
    same["token_ids"][1, length:] = same["token_ids"][0, length:]  # T5's ids alone
    moved = compose(params, frozen, same, jax.random.key(0))
    assert np.abs(moved[1] - whole[1]).max() > 1e-5
    if projects:  # the released format has one text encoder
        with pytest.raises(ConfigError, match="CompoDiff on a clip backbone has no official"):
            official.check_known(composer, "config.export_to=x")


def test_one_layer_brings_t5_to_the_width_of_clip():
    config = DenoiserConfig(8, 6, 1, 2, 4, 2, mask_size=4, more_text_dim=10)
    denoiser = Denoiser(config)
    rng = np.random.default_rng(0)
    clip, t5 = rng.normal(size=(1, 3, 6)), rng.normal(size=(1, 2, 10))
    rest = (jnp.zeros((1, 8)), jnp.zeros((1, 4, 4)))
    args = (jnp.zeros((1, 1, 8)), jnp.zeros((1, 1), jnp.int32), (clip, t5), *rest)
    params = factory.drawn(lambda key: denoiser.init(key, *args)["params"])
    projection, embedding = (
        jax.tree.map(np.asarray, params[name]) for name in ("text_projection", "text_embedding")
    )
    assert projection["kernel"].shape == (10, 6) and embedding["kernel"].shape == (6, 8)
    aligned = np.concatenate([clip, t5 @ projection["kernel"] + projection["bias"]], axis=1)
    expected = aligned @ embedding["kernel"] + embedding["bias"]
    apply = jax.jit(denoiser.apply, static_argnames="method")
    got = apply({"params": params}, (clip, t5), method="text_tokens")
    np.testing.assert_allclose(got, expected, atol=1e-5)


# --- conditions as tokens


def test_buckets_of_longer_sequences_are_t5s():
    np.testing.assert_array_equal(relative_buckets(2), [[0, 0, 0], [1, 0, 0]])
    table = relative_buckets(200)
    distance = np.arange(200)
    # T5's own formula (mesh_tensorflow), one number at a time
    for far in (0, 1, 15, 16, 17, 40, 100, 127, 128, 199):
        expected = far
        if far >= 16:
            expected = min(16 + int(np.log(far / 16) / np.log(128 / 16) * 16), 31)
        assert table[199, 199 - far] == expected == table[distance[-1], 199 - far]
    assert not table[0].any()


def test_conditions_as_tokens(tiny):
    """Prior-like: each condition counts, without cross-attention; samples are independent."""
    backbone, backbone_params = tiny
    composer = composers.build(
        "compodiff", backbone, **SIZES, steps=2, samples_per_query=2, conditioning="tokens"
    )
    params = factory.drawn(composer.init)
    assert "cross_attention" not in params["layers_0"]
    frozen = composer.freeze(backbone_params)
    rng = np.random.default_rng(0)
    query = {
        "reference_features": rng.normal(size=(2, 24)).astype(np.float32),
        "token_ids": backbone.tokenizer(["a red star", "no circle"], 16),
        "mask": np.zeros((2, 64, 64), np.float32),
        "query_index": np.arange(2, dtype=np.int32),
    }
    compose = jax.jit(composer.compose)
    plain = compose(params, frozen, query, jax.random.key(0))
    for change in (
        {"reference_features": query["reference_features"][::-1]},
        {"token_ids": query["token_ids"][::-1]},
        {"mask": query["mask"] + 1},
    ):
        moved = compose(params, frozen, query | change, jax.random.key(0))
        assert np.abs(moved - plain).max(axis=1).min() > 1e-4, list(change)
    x = jnp.asarray(rng.normal(size=(1, 3, 24)).astype(np.float32))
    denoiser, states = composer.denoiser, jnp.ones((1, 5, 32))
    given = (states, jnp.ones((1, 24)), jnp.zeros((1, 64, 64)))
    run = jax.jit(lambda x: denoiser.apply({"params": params}, x, jnp.full((1, 1), 7), *given))
    together = run(x)
    for i in range(3):
        np.testing.assert_allclose(together[:, i], run(x[:, i : i + 1])[:, 0], atol=2e-5)
    assert isinstance(backbone, Backbone) and not composer.official_format


def test_presets_of_the_paper():
    module = __import__("experiments.compodiff", fromlist=["PRESETS"])
    for preset in ("rn50", "vit_g14", "vit_l14_t5", "vit_l14_clip_t5", "vit_l14_bigg"):
        config = module.get_config(preset)
        assert dict(config.stage.stage2.data.tables) == {
            **{"captions": 0.3, "masked": 0.3},
            "triplets": 0.4,
        }
        assert config.composer.depth == 12 and config.stage.stage2.duration == "200k steps"
    for preset in ("fashioniq", "cirr"):
        config = module.get_config(preset)
        recipe = config.stage.finetune
        assert config.stages == ("finetune",) and recipe.after == "stage2"
        assert dict(recipe.data.tables) == {"triplets": 1.0}
        assert recipe.duration == "50k steps" and recipe.ema == 0.9999
        assert config.evaluation.benchmarks == (preset,)
    assert "finetune" not in module.get_config("shapes").stage
