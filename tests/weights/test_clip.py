"""Weights in and out: formats, ids, precision, and what is said about files that do not fit."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.input import images
from cir_jax.weights import clip, convert, files, open_clip
from cir_jax.weights.convert import flatten
from tests.weights import worlds


@pytest.fixture(scope="module")
def vit():
    return worlds.make()


@pytest.fixture
def saved(tmp_path, vit):
    """A Hugging Face directory that a test may break."""
    weights.save(tmp_path / "clip", *vit)
    return tmp_path / "clip"


def equal(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def digest(backbone):
    return backbone.weights_id.split("@")[1]


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


# --- formats


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_directory_survives_a_round_trip(tmp_path, kind):
    backbone, params = worlds.make(kind)
    weights.save(tmp_path / "one", backbone, params)
    loaded, got = weights.load(tmp_path / "one")
    assert equal(got, params) and loaded.config == backbone.config
    assert loaded.image_transform == backbone.image_transform
    assert (loaded.tokenizer(worlds.TEXTS) == backbone.tokenizer(worlds.TEXTS)).all()
    weights.save(tmp_path / "two", loaded, got)
    again, _ = weights.load(str(tmp_path / "two"))
    assert loaded.weights_id.startswith("one@") and digest(again) == digest(loaded)
    names = sorted(f.name for f in (tmp_path / "one").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_open_clip_directories(tmp_path, kind, act):
    """Equal features; the activation is what the file's config says."""
    backbone, params = worlds.make(kind, act)
    path = worlds.write_open_clip(tmp_path / "oc", backbone, params)
    loaded, got = weights.load(path)
    assert equal(got, params) and loaded.config == backbone.config
    assert loaded.image_transform == images.clip(backbone.config.vision.image_size)
    if kind == "vit":
        for ours, theirs in zip(
            worlds.features(loaded, got), worlds.features(backbone, params), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        weights.save(tmp_path / "hf", loaded, got)
        assert digest(weights.load(tmp_path / "hf")[0]) == digest(loaded)


def test_the_id_is_of_values_and_of_what_shapes_do_not_say(tmp_path, saved, vit):
    backbone, params = vit
    first = digest(weights.load(saved)[0])
    other = jax.tree.map(np.array, params)
    other["text"]["final_norm"]["bias"][3] += 1e-6
    weights.save(tmp_path / "other", backbone, other)
    assert digest(weights.load(tmp_path / "other")[0]) != first
    config = dataclasses.replace(
        backbone.config, text=dataclasses.replace(backbone.config.text, hidden_act="gelu")
    )
    edit(saved / "config.json", **config.to_dict())
    assert digest(weights.load(saved)[0]) != first


def test_sharded_files(saved):
    tensors = load_file(saved / "model.safetensors")
    first = weights.load(saved)
    (saved / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, saved / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    backbone, params = weights.load(saved)
    assert equal(params, first[1]) and backbone.weights_id == first[0].weights_id
    (saved / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match="index.json: missing shards: b.safetensors"):
        weights.load(saved)


def test_half_precision_in_and_out(tmp_path, vit):
    backbone, params = vit
    weights.save(tmp_path / "half", backbone, params, np.float16)
    file = tmp_path / "half" / "model.safetensors"
    assert {t.dtype for t in load_file(file).values()} == {np.dtype(np.float16)}
    loaded, got = weights.load(tmp_path / "half")
    for path, leaf in flatten(got).items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, np.float16(flatten(params)[path]))
    weights.save(tmp_path / "again", loaded, got, np.float16)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == file.read_bytes()


def test_bfloat16_files_become_float32_or_stay(tmp_path, vit):
    weights.save(tmp_path / "bf16", *vit, jnp.bfloat16)
    wide, as_float = weights.load(tmp_path / "bf16")
    kept, as_stored = weights.load(tmp_path / "bf16", jnp.bfloat16, params_dtype=None)
    _, chosen = weights.load(tmp_path / "bf16", params_dtype=jnp.bfloat16)
    bf16 = np.dtype(ml_dtypes.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(as_float)} == {np.dtype(np.float32)}
    assert {x.dtype for x in jax.tree.leaves((as_stored, chosen))} == {bf16}
    assert wide.weights_id == kept.weights_id  # the same values
    assert kept.model.dtype == jnp.bfloat16
    near = zip(worlds.features(kept, as_stored), worlds.features(wide, as_float), strict=True)
    for ours, theirs in near:
        np.testing.assert_allclose(ours, theirs, atol=0.03 * np.abs(theirs).max())


def test_a_hub_id_in_the_cache(tmp_path, saved, monkeypatch):
    """Found without a network, weights and all; the name is the id's and not the revision's."""
    import huggingface_hub

    repository = tmp_path / "cache" / "models--someone--clip-tiny"
    shutil.copytree(saved, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    for name in ("snapshot_download", "hf_hub_download"):
        offline = functools.partial(
            getattr(huggingface_hub, name), cache_dir=tmp_path / "cache", local_files_only=True
        )
        monkeypatch.setattr(huggingface_hub, name, offline)
    backbone, params = weights.load("someone/clip-tiny")
    assert backbone.weights_id.startswith("clip-tiny@")
    assert equal(params, weights.load(saved)[1])
    (repository / "snapshots" / "0123abcd" / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="model.safetensors is missing"):
        weights.load("someone/clip-tiny")
    with pytest.raises(WeightsError, match="'someone/else': .*hf download someone/else"):
        weights.load("someone/else")


def test_the_architecture_needs_no_weights(saved, vit):
    (saved / "model.safetensors").unlink()
    backbone = weights.load_architecture(saved)
    assert backbone.config == vit[0].config and backbone.weights_id == "clip@untrained"


def test_a_single_file_beside_its_config(saved, tmp_path, vit):
    other = saved / "step_5.safetensors"
    shutil.move(saved / "model.safetensors", other)
    backbone, params = weights.load(other)
    assert equal(params, vit[1]) and backbone.weights_id.startswith("step_5@")


# --- what does not fit


def test_wrong_paths(tmp_path):
    for wrong in ("nowhere", "/nowhere/at/all", str(tmp_path)):
        with pytest.raises(WeightsError, match="no such directory with a config.json. Give a dir"):
            weights.load(wrong)
    (tmp_path / "x.zip").write_text("")
    with pytest.raises(WeightsError, match=r"x.zip'?: a file of unknown kind; expected one of"):
        weights.load(tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "model.safetensors is missing"),
        ("tokenizer.json", "tokenizer.json is missing: a tokenizer belongs to the weights"),
        ("preprocessor_config.json", "preprocessor_config.json is missing"),
    ],
)
def test_missing_files_are_named(saved, name, message):
    (saved / name).unlink()
    with pytest.raises(WeightsError, match=message):
        weights.load(saved)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
     "preprocessor_config.json"],
)  # fmt: skip
def test_damaged_files_are_named(saved, name):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match=f"{name}: .*ownload or copy it again"):
        weights.load(saved)


def test_another_model_is_recognised(saved):
    edit(saved / "config.json", model_type="bert")
    with pytest.raises(WeightsError, match="config.json: model_type 'bert', expected 'clip' or"):
        weights.load(saved)


def test_a_blip_file_given_as_clip_and_the_reverse(saved):
    blip = {
        "vision_model.embeddings.class_embedding": np.zeros((1, 1, 4), np.float32),
        "vision_proj.weight": np.zeros((4, 4), np.float32),
    }
    save_file(blip, saved / "model.safetensors")
    with pytest.raises(
        WeightsError, match="BLIP .Hugging Face names. .the config says .*, expected CLIP"
    ):
        weights.load(saved)
    clip_tensors = {"text_model.embeddings.token_embedding.weight": np.zeros((4, 4), np.float32)}
    save_file(clip_tensors, saved / "model.safetensors")
    edit(saved / "config.json", model_type="blip")
    with pytest.raises(WeightsError, match="tensors of CLIP .Hugging Face names., expected BLIP"):
        weights.load(saved)


def test_leftover_and_missing_tensors_are_listed(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["text_model.surprise"] = tensors.pop("text_model.final_layer_norm.bias")
    # known and not a parameter: files of older transformers hold it
    tensors["vision_model.embeddings.position_ids"] = np.arange(5)[None]
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        weights.load(saved)
    assert "Missing tensors (1): text_model.final_layer_norm.bias" in str(error.value)
    assert "Tensors nothing takes (1): text_model.surprise" in str(error.value)


def test_wrong_shapes_are_listed(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["visual_projection.weight"] = np.zeros((24, 99), np.float32)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(WeightsError, match=r"visual_projection/kernel \(99, 24\), expected"):
        weights.load(saved)


def test_a_tokenizer_or_preprocessing_of_another_model(saved):
    edit(saved / "preprocessor_config.json", crop_size={"height": 8, "width": 8})
    with pytest.raises(WeightsError, match="images of 8 pixels, but the model takes 16"):
        weights.load(saved)
    edit(saved / "preprocessor_config.json", crop_size={"height": 16, "width": 16})
    config = json.loads((saved / "config.json").read_text())
    edit(saved / "config.json", text_config=config["text_config"] | {"vocab_size": 100})
    with pytest.raises(WeightsError, match="the tokenizer has 518 tokens, the model only 100"):
        weights.load(saved)


def test_a_file_that_does_not_say_its_activation(tmp_path, vit):
    """What to write beside it is said, and works."""
    file = tmp_path / "finetuned.safetensors"
    save_file(worlds.openai_tensors(*vit), file)
    worlds.write_merges(tmp_path)
    with pytest.raises(WeightsError, match="no config beside it says which activation") as error:
        weights.load(file)
    (tmp_path / "open_clip_config.json").write_text(str(error.value).partition("rest: ")[2])
    backbone, params = weights.load(file)
    assert equal(params, vit[1]) and backbone.config == vit[0].config


def test_a_bare_file_that_needs_its_directory(saved):
    alone = saved.parent / "alone.safetensors"
    shutil.copy(saved / "model.safetensors", alone)
    with pytest.raises(WeightsError, match="alone.safetensors: tensors of CLIP .Hugging Face nam"):
        weights.load(alone)
    save_file({"x": np.zeros(2)}, alone)
    with pytest.raises(WeightsError, match="tensors of an unknown model .x ....*load_encoder"):
        weights.load(alone)


def test_open_clip_models_that_are_no_clip(tmp_path, vit):
    path = worlds.write_open_clip(tmp_path / "oc", *vit)
    config = json.loads((path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = "roberta-base"
    (path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        WeightsError, match="not built here: text_cfg.hf_model_name.*Expected a CLIP"
    ):
        weights.load(path)
    (path / "open_clip_config.json").write_text("{}")
    with pytest.raises(WeightsError, match="open_clip_config.json: no field 'model_cfg'"):
        weights.load(path)


def test_nothing_is_written_half_way(tmp_path, saved, vit):
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    broken = {**vit[1], "surprise": np.zeros(3)}
    with pytest.raises(WeightsError, match="parameters without a name in this format: surprise"):
        weights.save(saved, vit[0], broken)
    with pytest.raises(TypeError):
        weights.save(saved, vit[0], vit[1], "no dtype")
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before
    assert not list(tmp_path.glob(".*"))


# --- the conversion engine


def test_fused_tensors_are_split_and_joined():
    table = {
        "in": (("a", ("q", "k", "v"), "kernel"), "linear"),
        "in_bias": (("a", ("q", "k", "v"), "bias"), "same"),
    }
    weight, bias = np.arange(24.0).reshape(6, 4), np.arange(6.0)
    tree = convert.to_ours({"in": weight, "in_bias": bias}, table)
    np.testing.assert_array_equal(tree["a"]["k"]["kernel"], weight[2:4].T)
    np.testing.assert_array_equal(tree["a"]["v"]["bias"], [4, 5])
    back = convert.to_source(tree, table)
    np.testing.assert_array_equal(back["in"], weight)
    np.testing.assert_array_equal(back["in_bias"], bias)
    with pytest.raises(WeightsError, match=r"in has shape \(7, 4\).* no linear tensor of 3 parts"):
        convert.to_ours({"in": np.zeros((7, 4)), "in_bias": bias}, table)
    with pytest.raises(WeightsError, match=r"in has shape \(3,\), which is no linear tensor"):
        convert.to_ours({"in": np.zeros(3), "in_bias": bias}, table)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_tables_name_every_parameter_once(kind):
    backbone, params = worlds.make(kind)
    tables = [open_clip.names(backbone.config)]
    tables += [clip.hf_names(backbone.config)] if kind == "vit" else []
    for table in tables:
        assert equal(convert.to_ours(convert.to_source(params, table), table), params)


def test_published_configs_from_shapes_and_back():
    """OpenAI's archives hold no config: RN50x4's, as its names and shapes say it."""
    config = open_clip.from_openai(
        {
            "embed_dim": 640,
            "image_resolution": 288,
            "vision_layers": (4, 6, 10, 6),
            "vision_width": 80,
            "vision_patch_size": None,
            "context_length": 77,
            "vocab_size": 49408,
            "transformer_width": 640,
            "transformer_heads": 10,
            "transformer_layers": 12,
        }
    )
    assert config.vision.num_attention_heads == 40 and config.text.hidden_act == "quick_gelu"
    assert open_clip.from_open_clip(open_clip.to_open_clip(config)) == config
    giant = {"width": 1664, "head_width": 104, "mlp_ratio": 4.9231, "layers": 48, "patch_size": 14}
    text = {"width": 1280, "heads": 20, "layers": 32}
    config = open_clip.from_open_clip({"embed_dim": 1280, "vision_cfg": giant, "text_cfg": text})
    assert config.vision.intermediate_size == 8192 and config.vision.hidden_act == "gelu"
    assert open_clip.from_open_clip(open_clip.to_open_clip(config)) == config


def test_ids_do_not_depend_on_order_or_precision():
    a, b = np.float32([1, 2]), np.float32([[3]])
    first = files.content_id("x", {"a": a, "b": {"c": b}})
    assert first == files.content_id("x", {"b": {"c": np.float16(b)}, "a": a})
    assert first != files.content_id("x", {"a": a, "b": {"c": b.reshape(1)}})
    assert first != files.content_id("x", {"a": a, "b": {"c": b}}, more="gelu")
