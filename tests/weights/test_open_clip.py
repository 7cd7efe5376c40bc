"""OpenCLIP's directories against open_clip: config fields, and texts and images to features."""

import dataclasses
import inspect
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.input.text import CLEANING, clip_bpe, read_merges
from cir_jax.weights import open_clip
from cir_jax.weights import open_clip_fields as fields
from tests import peers
from tests.weights import worlds

TEXTS = [
    "A photo of a red  cat &amp; two dogs!",
    "it's a <end_of_text>-like, under_scored Café",
    " ".join(["a very long text about small things"] * 30),
]
MODEL = {"embed_dim": 24, "vision_cfg": {}, "text_cfg": {}}


def with_field(part, name, value):
    if part == fields.MODEL:
        return MODEL | {name: value}
    return MODEL | {part: {name: value}}


# --- fields


def known(part):
    return fields.READ[part] | fields.INERT[part] | set(fields.PLAIN[part])


@pytest.mark.peer
def test_every_field_of_open_clip_is_accounted_for():
    """A field that a later open_clip adds fails here: it is to be read, or refused by name."""
    model = peers.open_clip().model
    for part, cls in ((fields.VISION, model.CLIPVisionCfg), (fields.TEXT, model.CLIPTextCfg)):
        theirs = {field.name: field.default for field in dataclasses.fields(cls)}
        assert known(part) == set(theirs)
        for name, (plain, _) in fields.PLAIN[part].items():
            assert theirs[name] == plain
    arguments = set(inspect.signature(model.CLIP).parameters)
    assert known(fields.MODEL) == arguments | {"custom_text", "multimodal_cfg"}


@pytest.mark.parametrize("part", fields.PLAIN)
def test_fields_of_another_network_are_refused_by_name(part):
    for name, (plain, needs) in fields.PLAIN[part].items():
        for value in (True, 0.5, "other", {"a": 1}, *((False, "", 0) if plain else ())):
            if value == plain:
                continue
            field = name if part == fields.MODEL else f"{part}.{name}"
            with pytest.raises(WeightsError) as error:
                open_clip.from_open_clip(with_field(part, name, value), "file.json")
            assert f"file.json: a model that is not built here: {field}=" in str(error.value)
            assert needs in str(error.value)
        open_clip.from_open_clip(with_field(part, name, plain))
    # a layer scale that starts at 0 is one
    with pytest.raises(WeightsError, match="ls_init_value=0.0 .layer scale.*Expected a CLIP"):
        open_clip.from_open_clip(with_field("text_cfg", "ls_init_value", 0.0))
    with pytest.raises(WeightsError, match=r"surprise=1 \(a field that this version does not"):
        open_clip.from_open_clip(with_field(part, "surprise", 1))


def test_fields_without_effect_and_those_that_are_read():
    plain = open_clip.from_open_clip(MODEL)
    for part, names in fields.INERT.items():
        for name in names:
            assert open_clip.from_open_clip(with_field(part, name, 3)) == plain
    tower = {"layers": 3, "width": 128, "mlp_ratio": 2.0, "norm_kwargs": {"eps": 1e-6}}
    tower |= {"act_kwargs": {"approximate": "tanh"}}
    changes = {
        fields.MODEL: {"embed_dim": 8, "quick_gelu": True, "init_logit_scale": 2.3},
        fields.VISION: tower | {"head_width": 32, "patch_size": 8, "image_size": [64, 64]},
        fields.TEXT: tower | {"heads": 4, "vocab_size": 100, "context_length": 32},
    }
    for part, values in changes.items():
        for name, value in values.items():
            made = open_clip.from_open_clip(with_field(part, name, value))
            assert made != plain, name
            assert open_clip.from_open_clip(open_clip.to_open_clip(made) | {
                "init_logit_scale": made.logit_scale_init_value
            }) == made  # fmt: skip
    cleaners = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}
    read = {name for part in changes for name in (*changes[part], fields.VISION, fields.TEXT)}
    assert read | cleaners == set().union(*fields.READ.values())


@pytest.mark.parametrize(
    "part, name, value, message",
    [
        ("model_cfg", "vision_cfg", None, "vision_cfg=None; expected the fields of a tower"),
        ("vision_cfg", "image_size", [224, 336], r"image_size=\[224, 336\]; expected a square"),
        ("text_cfg", "norm_kwargs", {"bias": False}, "norm_kwargs={'bias': False}; expected eps"),
        ("text_cfg", "act_kwargs", {"inplace": True}, "text_cfg.act_kwargs=.*expected nothing"),
    ],
)
def test_settings_that_are_not_built_here(part, name, value, message):
    with pytest.raises(WeightsError, match=message):
        open_clip.from_open_clip(with_field(part, name, value))


def test_activations_that_the_format_cannot_say():
    config = worlds.make()[0].config
    text = dataclasses.replace(config.text, hidden_act="gelu")
    with pytest.raises(WeightsError, match="one activation for both towers"):
        open_clip.to_open_clip(dataclasses.replace(config, text=text))


@pytest.mark.peer
def test_its_own_configs_load_or_are_refused():
    found = {"": []}
    library = peers.open_clip()
    for name in library.list_models():
        try:
            open_clip.from_open_clip(library.get_model_config(name), name)
            found[""].append(name)
        except WeightsError as error:
            field = str(error).partition("built here: ")[2].partition("=")[0]
            found.setdefault(field, []).append(name)
    plain = {"RN50", "RN50x64-quickgelu", "ViT-B-16-plus-240", "ViT-L-14-336", "ViT-bigG-14"}
    assert plain <= set(found[""]) and len(found[""]) > 40
    for field, names in {
        "vision_cfg.timm_model_name": {"ViT-B-16-SigLIP", "PE-Core-L-14-336", "MobileCLIP-S1"},
        "text_cfg.hf_model_name": {"xlm-roberta-base-ViT-B-32", "nllb-clip-base"},
        "multimodal_cfg": {"coca_ViT-L-14"},
        "vision_cfg.no_ln_pre": {"ViT-H-14-CLIPA"},
        "text_cfg.pool_type": {"ViT-H-14-worldwide"},
        "vision_cfg.ls_init_value": {"ViT-M-16-alt"},
    }.items():
        assert names <= set(found.get(field, ())), field


# --- from texts and images to features


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory with CLIP's vocabulary as transformers stores it."""
    library, path = peers.open_clip(), tmp_path_factory.mktemp("tokenizer")
    merges = read_merges(Path(library.tokenizer.default_bpe()))
    clip_bpe(merges).save(str(path / "tokenizer.json"))
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    tokens |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 77}
    (path / "tokenizer_config.json").write_text(json.dumps(about | tokens))
    return path


def shrunk(model):
    """A published config whose towers are two layers of two heads."""
    vision, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
    if isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 4, "image_size": 64}
    else:
        width = 2 * vision.get("head_width", 64)
        vision |= {"layers": 2, "width": width, "image_size": 3 * vision["patch_size"]}
    text |= {"layers": 2, "width": 32, "heads": 4}
    return model | {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}


def push(path, config, tokenizer):
    """A random model, saved as open_clip pushes it to the hub."""
    torch = pytest.importorskip("torch")
    library = peers.open_clip()
    from open_clip.push_to_hf_hub import save_for_hf

    made = json.loads(json.dumps(config))
    cls = library.CustomTextCLIP if made.pop("custom_text", False) else library.CLIP
    torch.manual_seed(0)
    model = cls(**made)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and torch.isfinite(tensor).all():
                tensor.add_(0.05 * torch.rand_like(tensor))
    preprocess = dataclasses.asdict(library.transform.PreprocessCfg())
    library.model.set_model_preprocess_cfg(model, preprocess)
    save_for_hf(model, library.tokenizer.HFTokenizer(str(tokenizer)), config, str(path), True)
    return path


def picture():
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    image = Image.fromarray(rng.integers(0, 255, (9, 14, 3), np.uint8))
    image.resize((140, 90)).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()))


def compare(path, image_size=None, tolerance=1e-5):
    """Ids, image and text features: our reading of `path` against open_clip's."""
    torch, library, name = pytest.importorskip("torch"), peers.open_clip(), f"local-dir:{path}"
    model, _, preprocess = library.create_model_and_transforms(name, force_image_size=image_size)
    expected = library.get_tokenizer(name)(TEXTS)
    backbone, params = weights.load(path, image_size=image_size)
    ids = backbone.tokenizer(TEXTS, length=backbone.context_length)
    np.testing.assert_array_equal(ids, expected.numpy())
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(picture())[None]).numpy()
        text = model.encode_text(expected).numpy()
    pixels = backbone.image_transform(picture())[None]
    ours = worlds.encode(backbone, params, pixels, ids)
    for got, want in zip(ours, (image, text), strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())
    return backbone, params


@pytest.mark.peer
@pytest.mark.parametrize(
    "name, changes",
    [
        ("ViT-B-32-quickgelu", {"custom_text": True, "nonscalar_logit_scale": True}),
        ("ViT-bigG-14", {"custom_text": True, "init_logit_bias": -10}),
        ("RN50", {}),
        ("RN50-quickgelu", {"custom_text": True}),
    ],
)
def test_published_forms_give_open_clips_features(tmp_path, tokenizer, name, changes):
    config = shrunk(peers.open_clip().get_model_config(name)) | changes
    if "bigG" in name:
        config["text_cfg"] |= {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}}
    # random weights whose hidden states have a large mean: a variance in one pass loses a digit
    tolerance = 3e-5 if "bigG" in name else 1e-5
    backbone, params = compare(push(tmp_path / "oc", config, tokenizer), tolerance=tolerance)
    weights.save(tmp_path / "ours", backbone, params)
    again, _ = weights.load(tmp_path / "ours")
    assert again.weights_id.split("@")[1] == backbone.weights_id.split("@")[1]
    assert (again.tokenizer(TEXTS) == backbone.tokenizer(TEXTS)).all()


@pytest.mark.peer
def test_another_image_size_is_open_clips(tmp_path, tokenizer):
    """force_image_size interpolates by another rule than transformers."""
    config = shrunk(peers.open_clip().get_model_config("ViT-B-16"))
    path = push(tmp_path / "oc", config, tokenizer)
    found = [compare(path, size)[0].weights_id for size in (None, 80, 32)]
    assert len(set(found)) == 3


@pytest.mark.peer
def test_texts_are_cleaned_and_padded_as_the_config_says(tmp_path, tokenizer):
    """Also after the model was saved again, in the format of Hugging Face and in this one."""
    library, made = peers.open_clip(), []
    config = shrunk(library.get_model_config("RN50"))
    path = push(tmp_path / "oc", config, tokenizer)
    params = weights.load(path)[1]
    for changes in (
        {},
        {"tokenizer_kwargs": {"clean": "canonicalize"}},
        {"hf_tokenizer_name": "someone/clip"},
        {"hf_tokenizer_name": "someone/clip", "tokenizer_kwargs": {"clean": "canonicalize"}},
    ):
        stored = config | {"text_cfg": config["text_cfg"] | changes}
        (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": stored}))
        theirs = library.get_tokenizer(f"local-dir:{path}")(TEXTS).numpy()
        backbone = weights.load_architecture(path)
        np.testing.assert_array_equal(backbone.tokenizer(TEXTS, 77), theirs)
        weights.save(tmp_path / "ours", backbone, params)
        again = weights.load_architecture(tmp_path / "ours")
        np.testing.assert_array_equal(again.tokenizer(TEXTS, 77), theirs)
        made.append((weights.load(path)[0].weights_id, theirs.tobytes()))
    assert len({ids for _, ids in made}) == 4 and len({name for name, _ in made}) >= 3


def test_the_ways_to_clean():
    text = " Under_scored &amp;amp; IT'S\u3000\x1d5 µm… "
    assert CLEANING["whitespace"](text) == "Under_scored & IT'S 5 µm…"
    assert CLEANING["lower"](text) == "under_scored & it's 5 µm…"
    assert CLEANING["canonicalize"](text) == "under scored its 5 µm…"


@pytest.mark.peer
def test_the_ways_to_clean_are_open_clips():
    library = peers.open_clip()
    texts = [*TEXTS, " Under_scored &amp;amp; IT'S\u3000\x1d5 µm… ", "İ ﬁ ''quoted'' {}", "__", ""]
    for kind, ours in CLEANING.items():
        theirs = library.tokenizer.get_clean_fn(kind)
        assert [ours(text) for text in texts] == [theirs(text) for text in texts]


@pytest.mark.parametrize(
    "text_cfg, message",
    [
        (
            {"tokenizer_kwargs": {"clean": "whitespace"}},
            "clean: 'lower' or 'canonicalize' .without",
        ),
        ({"tokenizer_kwargs": {"strip_sep_token": True}}, "strip_sep_token': True.*not built here"),
        ({"tokenizer_kwargs": {"reduction_mask": "random"}}, "reduction_mask': 'random'"),
        ({"hf_tokenizer_name": "x/y", "tokenizer_mode": "clips"}, "tokenizer_mode': 'clips'"),
        ({"hf_tokenizer_name": "x/y", "tokenizer_kwargs": {"language": "de"}}, "'language': 'de'"),
    ],
)
def test_tokenizer_settings_that_are_not_built_here(tmp_path, text_cfg, message):
    path = worlds.write_open_clip(tmp_path / "oc", *worlds.make())
    config = json.loads((path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= text_cfg
    (path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"oc/open_clip_config.json: text_cfg has .*{message}"):
        weights.load(path)


def test_a_stored_cleaning_that_is_none(tmp_path):
    backbone, params = worlds.make()
    weights.save(tmp_path / "clip", backbone, params)
    file = tmp_path / "clip" / "tokenizer_config.json"
    stored = json.loads(file.read_text()) | {"cir_jax": {"cleaning": "canonicalise"}}
    file.write_text(json.dumps(stored))
    with pytest.raises(WeightsError, match="tokenizer_config.json: .*Did you mean 'canonicalize'"):
        weights.load(tmp_path / "clip")


def test_another_vocabulary_is_refused(tmp_path):
    """Its largest id is not the end token, which is the one that is pooled."""
    path = worlds.write_open_clip(tmp_path / "oc", *worlds.make())
    config = json.loads((path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "bert-base", "vocab_size": 600}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="'bert-base', whose .* are tokens .516, 517.; expec"):
        weights.load_architecture(path)


def test_custom_text_names_in_a_file_without_config(tmp_path):
    """They are told apart by the names alone; the activation still has to be said."""
    from safetensors.numpy import save_file

    backbone, params = worlds.make()
    tensors = worlds.openai_tensors(backbone, params)
    renamed = {
        name if name.startswith(("visual.", "logit")) else f"text.{name}": tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "custom.safetensors")
    worlds.write_merges(tmp_path)
    with pytest.raises(WeightsError, match="which activation") as error:
        weights.load(tmp_path / "custom.safetensors")
    (tmp_path / "open_clip_config.json").write_text(str(error.value).partition("rest: ")[2])
    loaded, got = weights.load(tmp_path / "custom.safetensors")
    assert loaded.config == backbone.config
    for ours, theirs in zip(
        worlds.features(loaded, got), worlds.features(backbone, params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    lost = {name: tensor for name, tensor in renamed.items() if name != "text.ln_final.bias"}
    save_file(lost | {"text.cls_emb": np.zeros(64, np.float32)}, tmp_path / "custom.safetensors")
    with pytest.raises(WeightsError, match=r"Missing.*ln_final.bias\..*takes .1.: text.cls_emb"):
        weights.load(tmp_path / "custom.safetensors")
