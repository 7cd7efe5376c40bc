"""Preprocessor files as published: the pixels of the library that reads them, or a refusal."""

import json

import numpy as np
import pytest
from PIL import Image

from cir_jax import weights
from cir_jax.errors import DataError, WeightsError
from cir_jax.input import images, preprocessors
from cir_jax.input.images import ImageTransform
from cir_jax.models.backbone import pixels
from cir_jax.weights import beside, timm
from tests import peers
from tests.weights import worlds

MEAN, STD = list(images.CLIP_MEAN), list(images.CLIP_STD)

# openai/clip-vit-* and runwayml's safety checker, before sizes were dictionaries
ORIGINAL_CLIP = {
    "crop_size": 32,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "size": 32,
}
RESAVED_CLIP = {  # by transformers 4.35 and 5.0
    "crop_size": {"height": 32, "width": 32},
    "data_format": "channels_first",
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": MEAN,
    "image_processor_type": "CLIPImageProcessorFast",
    "image_std": STD,
    "processor_class": "CLIPProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 32},
    "use_square_size": False,
}
ORIGINAL_BLIP = {  # Salesforce/blip-image-captioning-base: the number is a square
    "do_normalize": True,
    "do_resize": True,
    "image_mean": MEAN,
    "image_processor_type": "BlipImageProcessor",
    "image_std": STD,
    "processor_class": "BlipProcessor",
    "size": 32,
}
RESAVED_BLIP = ORIGINAL_BLIP | {  # Salesforce/blip-vqa-base
    "do_pad": True,
    "do_rescale": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 32, "width": 32},
    "size_divisor": 32,
}
SIGLIP = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 32, "width": 32},
}

HONOURED = {
    "clip": ("clip", ORIGINAL_CLIP),
    "clip 5.0": ("clip", RESAVED_CLIP),
    "clip, feature extractor as processor": (
        "clip",
        RESAVED_CLIP | {"image_processor_type": "CLIPFeatureExtractor"},
    ),
    "clip, nothing said": ("clip", {}),
    "clip, family decides": ("clip", {"size": 40, "crop_size": 32}),
    "clip, larger": ("clip", ORIGINAL_CLIP | {"size": 48}),
    "clip, squashed": ("clip", RESAVED_CLIP | {"size": {"height": 40, "width": 40}}),
    "clip, squashed, a list": ("clip", RESAVED_CLIP | {"size": [40, 40]}),
    "clip, squashed, no crop": (
        "clip",
        RESAVED_CLIP | {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    ),
    "clip, square on request": ("clip", ORIGINAL_CLIP | {"size": 40, "default_to_square": True}),
    "clip, no rescaling": ("clip", RESAVED_CLIP | {"do_rescale": False}),
    "clip, another factor": ("clip", RESAVED_CLIP | {"rescale_factor": 1 / 127.5}),
    "clip, not normalised": ("clip", RESAVED_CLIP | {"do_normalize": False}),
    "clip, null is false": ("clip", RESAVED_CLIP | {"do_normalize": None}),
    "clip, raw": ("clip", RESAVED_CLIP | {"do_normalize": False, "do_rescale": False}),
    "clip, one mean": ("clip", RESAVED_CLIP | {"image_mean": 0.5, "image_std": 0.25}),
    "clip, no resample": ("clip", {k: v for k, v in RESAVED_CLIP.items() if k != "resample"}),
    "clip, Lanczos": ("clip", RESAVED_CLIP | {"resample": 1}),
    "clip, nearest": ("clip", RESAVED_CLIP | {"resample": 0}),
    "clip, unknown but null": ("clip", RESAVED_CLIP | {"crop_pct": None, "_commit_hash": "abc"}),
    "blip": ("blip", ORIGINAL_BLIP),
    "blip 4": ("blip", RESAVED_BLIP),
    "blip, nothing said": ("blip", {}),
    "blip, family decides": ("blip", {"size": 32}),
    "blip, cropped": ("blip", ORIGINAL_BLIP | {"do_center_crop": True, "crop_size": 24}),
    "blip, padded to its size": ("blip", RESAVED_BLIP | {"pad_size": {"height": 32, "width": 32}}),
    "siglip 2": ("siglip", SIGLIP),
    "siglip, fast": (
        "siglip",
        SIGLIP | {"image_processor_type": "SiglipImageProcessorFast", "do_convert_rgb": True},
    ),
    "siglip, nothing said": ("siglip", {}),
}


def pictures(folder):
    """{kind: file} of every kind of colour, most with something transparent."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (50, 71, 4), np.uint8), "RGBA")
    palette = colours.convert("RGB").quantize(30)
    deep = Image.fromarray(rng.integers(0, 400, (50, 71), np.uint16))
    made = {mode: colours.convert(mode) for mode in ("RGB", "RGBA", "LA", "L", "1")}
    made |= {"P": palette, "I;16": deep}
    for kind, picture in made.items():
        picture.save(folder / f"{kind}.png")
    palette.save(folder / "P transparent.png", transparency=3)
    made["RGB"].save(folder / "RGB one transparent.png", transparency=made["RGB"].getpixel((9, 9)))
    made["RGB"].convert("CMYK").save(folder / "CMYK.tiff")
    return {file.stem: file for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"))


def ours(transform, file):
    return np.asarray(pixels(transform(images.read(file))[None], transform))[0]


def processor(folder, family, config):
    """transformers' own, as it finds it: by the processor's name, else by the model's."""
    transformers = pytest.importorskip("transformers")
    if "FeatureExtractor" in config.get("image_processor_type", ""):  # in transformers.js's files
        config = config | {"image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured_gives_the_pixels_of_transformers(name, kinds, tmp_path):
    family, config = HONOURED[name]
    theirs = processor(tmp_path, family, config)
    transform = beside.image_transform(tmp_path, family)
    assert type(theirs).__name__.removesuffix("Pil") == transform.processor
    for kind, file in kinds.items():
        if not (theirs.do_convert_rgb or kind in ("RGB", "RGB one transparent")):
            with pytest.raises(ValueError):  # where we convert
                theirs(Image.open(file), return_tensors="np")
            assert transform(images.read(file)).shape == (32, 32, 3)
            continue
        expected = np.asarray(theirs(Image.open(file), return_tensors="np")["pixel_values"][0])
        np.testing.assert_allclose(
            ours(transform, file),
            expected.transpose(1, 2, 0),
            rtol=1e-5,
            atol=2e-6 * np.abs(expected).max(),
            err_msg=kind,
        )


@pytest.mark.parametrize("name", HONOURED)
def test_what_we_write_is_read_alike_by_transformers_and_by_us(name, kinds, tmp_path):
    family, config = HONOURED[name]
    transform = ImageTransform.from_dict(config, family=family)
    written = transform.to_dict()
    again = ImageTransform.from_dict(written, family=family)
    assert again == transform and again.to_dict() == written
    theirs = processor(tmp_path, family, written)
    assert type(theirs).__name__.removesuffix("Pil") == transform.processor
    file = kinds["RGBA" if transform.alpha == "white" else "RGB"]
    expected = theirs(Image.open(file), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(
        ours(transform, file), expected.transpose(1, 2, 0), rtol=1e-5, atol=1e-3
    )


REFUSED = {
    "do_resize is False, expected true": {"do_resize": False},
    "do_resize is None, expected true": {"do_resize": None},
    "do_rescale is 'yes', expected true or false": {"do_rescale": "yes"},
    "field 'crop_pct' .0.9. is not known, and it may change the pixels": {"crop_pct": 0.9},
    "size is {'longest_edge': 32}, expected shortest_edge, or height and width, and these equal": {
        "size": {"longest_edge": 32}
    },
    "size is {'shortest_edge': 32, 'longest_edge'.*expected": {
        "size": {"shortest_edge": 32, "longest_edge": 64}
    },
    "size is {'height': 32, 'width': 40}, expected": {"size": {"height": 32, "width": 40}},
    "size is {'height': 40, 'width': 32}, expected": {"size": [40, 32]},
    "size is {'shortest_edge': '32'}, expected": {"size": "32"},
    "size is {'shortest_edge': 0}, expected": {"size": 0},
    "size is {'shortest_edge': None}, expected": {"size": None},
    "size is {'shortest_edge': 32}, expected height and width where do_center_crop is not true": {
        "do_center_crop": False
    },
    "crop_size is {'height': 32, 'width': 24}, expected height and width": {
        "crop_size": {"height": 32, "width": 24}
    },
    "crop_size is {'shortest_edge': 32}, expected": {"crop_size": {"shortest_edge": 32}},
    "crop_size is 48, expected at most the size, 32": {"crop_size": 48},
    "pad_size is .*, expected none, or 32": {
        "do_pad": True,
        "pad_size": {"height": 40, "width": 40},
    },
    "resample is None, expected the number of a filter": {"resample": None},
    "resample is 'bicubic', expected the number of a filter": {"resample": "bicubic"},
    "resample is 9, expected the number of a filter": {"resample": 9},
    "rescale_factor is 0, expected a number above 0": {"rescale_factor": 0},
    "rescale_factor is None, expected a number above 0": {"rescale_factor": None},
    "image_mean is .0.5, 0.5., expected three numbers": {"image_mean": [0.5, 0.5]},
    "image_mean is None, expected three numbers": {"image_mean": None},
    "image_std is .0, 1, 1., expected numbers above 0": {"image_std": [0, 1, 1]},
    "use_square_size is True, expected false": {"use_square_size": True},
    "image_processor_type is 'ViTImageProcessor', expected one of CLIPImageProcessor, Blip": {
        "image_processor_type": "ViTImageProcessor"
    },
    "image_processor_type is 'Siglip2ImageProcessorFast', expected SiglipImage.*NaFlex": {
        "image_processor_type": "Siglip2ImageProcessorFast"
    },
    "cir_jax has a field 'mirror', expected pad": {"cir_jax": {"mirror": True}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_file_and_field(said):
    with pytest.raises(WeightsError, match=f"x.json: {said}"):
        ImageTransform.from_dict(RESAVED_CLIP | REFUSED[said], "x.json")


def test_a_number_without_a_crop_is_refused_for_siglip():
    """transformers resizes the shortest edge then, and the model cannot take the rest."""
    with pytest.raises(WeightsError, match="x.json: size is 32, expected height and width where"):
        ImageTransform.from_dict(SIGLIP | {"size": 32}, "x.json", "siglip")


# --- which file


@pytest.fixture
def directory(tmp_path):
    weights.save(tmp_path / "clip", *worlds.make())
    return tmp_path / "clip"


def test_the_file_of_transformers_5_wins_where_it_describes_images(tmp_path, kinds):
    transformers = pytest.importorskip("transformers")
    older, newer = ORIGINAL_CLIP | {"resample": 0}, {"image_processor": RESAVED_CLIP}
    with pytest.raises(WeightsError, match="preprocessor_config.json is missing: it belongs to"):
        beside.image_transform(tmp_path, "clip")
    for files, resample in (
        ({"preprocessor_config.json": older}, 0),
        ({"processor_config.json": {"processor_class": "CLIPProcessor"}}, 0),
        ({"processor_config.json": newer}, 3),
    ):
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
        assert beside.image_transform(tmp_path, "clip").resample == resample
        theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        assert theirs.resample == resample
    (tmp_path / "preprocessor_config.json").unlink()
    assert beside.image_transform(tmp_path, "clip").resample == 3
    newer["image_processor"]["do_resize"] = False
    (tmp_path / "processor_config.json").write_text(json.dumps(newer))
    with pytest.raises(
        WeightsError, match="processor_config.json, image_processor: do_resize is False"
    ):
        beside.image_transform(tmp_path, "clip")
    (tmp_path / "processor_config.json").write_text('{"image_processor": []}')
    with pytest.raises(WeightsError, match="processor_config.json: image_processor is no object"):
        beside.image_transform(tmp_path, "clip")


def test_weights_load_with_either_file_and_are_saved_over_both(directory):
    backbone, params = weights.load(directory)
    file = directory / "preprocessor_config.json"
    own = json.loads(file.read_text())
    file.unlink()
    newer = {"image_processor": own | {"resample": 2}, "processor_class": "CLIPProcessor"}
    (directory / "processor_config.json").write_text(json.dumps(newer))
    other = weights.load(directory)[0]
    assert other.image_transform.resample == 2
    weights.save(directory, backbone, params)  # into the same directory
    assert weights.load(directory)[0].image_transform == backbone.image_transform
    stored = json.loads((directory / "processor_config.json").read_text())
    assert stored == newer | {"image_processor": own}
    stored["image_processor"]["size"] = stored["image_processor"]["crop_size"] = 24
    (directory / "processor_config.json").write_text(json.dumps(stored))
    with pytest.raises(
        WeightsError, match="image_processor: images of 24 pixels, but the model takes 16. Correct"
    ):
        weights.load(directory)


def test_blip_directories_read_a_number_as_a_square(tmp_path):
    backbone, params = worlds.make_blip(tmp_path)
    weights.save(tmp_path / "blip", backbone, params)
    loaded = weights.load(tmp_path / "blip")[0].image_transform
    assert loaded == images.blip(32) and loaded.processor == "BlipImageProcessor"
    file = tmp_path / "blip" / "preprocessor_config.json"
    for config in (ORIGINAL_BLIP, RESAVED_BLIP, {"size": 32}):
        file.write_text(json.dumps(config))
        transform = weights.load(tmp_path / "blip")[0].image_transform
        assert transform.squash and transform.crop == 32 and transform.alpha == "white"


# --- open_clip and OpenAI


def test_openai_pixels_are_those_of_its_transform(kinds):
    peers.torchvision()
    from torchvision import transforms

    theirs = transforms.Compose(  # as in OpenAI's clip.py
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            lambda image: image.convert("RGB"),
        ]
    )
    for kind, file in kinds.items():
        expected = np.asarray(theirs(Image.open(file)))
        assert np.array_equal(images.clip(32)(images.read(file)), expected), kind


def test_blip_pixels_are_those_of_salesforce(kinds):
    peers.torchvision()
    from torchvision import transforms

    resize = transforms.Resize((32, 32), interpolation=transforms.InterpolationMode.BICUBIC)
    for kind, file in kinds.items():
        expected = np.asarray(resize(Image.open(file).convert("RGB")))
        assert np.array_equal(images.blip(32)(images.read(file)), expected), kind


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        {"mean": 0.5, "std": 0.5, "interpolation": "bilinear"},
        {"interpolation": "random", "resize_mode": None, "mode": "RGB"},
        {"resize_mode": "squash", "size": 32, "fill_color": 0},
        {"resize_mode": "shortest", "fill_color": 7},
    ],
)
def test_open_clip_pixels_are_those_of_its_transform(config, kinds):
    peers.open_clip()
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    fields = merge_preprocess_dict(PreprocessCfg(), config | {"size": 32})
    theirs = image_transform_v2(PreprocessCfg(**fields), is_train=False)
    transform = ImageTransform.from_open_clip(config, 32)
    for kind, file in kinds.items():
        expected = theirs(Image.open(file)).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(
            ours(transform, file), expected, rtol=1e-5, atol=1e-5, err_msg=kind
        )
    assert ImageTransform.from_dict(transform.to_dict()) == transform


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"resize_mode": "longest"}, "resize_mode is 'longest', expected 'shortest' or 'squash'"),
        ({"interpolation": "lanczos"}, "interpolation is 'lanczos', expected one of bicubic, "),
        ({"mode": "L"}, "mode is 'L', expected 'RGB'"),
        ({"mean": [0.5]}, "mean is .0.5., expected three numbers"),
        ({"crop_pct": 1.0}, "preprocess_cfg has a field 'crop_pct', which is not known"),
    ],
)
def test_open_clip_settings_that_are_refused(config, said, tmp_path):
    with pytest.raises(WeightsError, match=f"open_clip_config.json: {said}"):
        ImageTransform.from_open_clip(config, 32)
    path = worlds.write_open_clip(tmp_path / "oc", *worlds.make())
    whole = json.loads((path / "open_clip_config.json").read_text())
    (path / "open_clip_config.json").write_text(json.dumps(whole | {"preprocess_cfg": config}))
    with pytest.raises(WeightsError, match=f"oc/open_clip_config.json: {said}"):
        weights.load(path)


def test_files_from_before_alpha_was_a_choice():
    """What comes last dropped it, and said nothing."""
    written = images.clip(16).to_dict()
    assert written["cir_jax"].pop("alpha") == "drop"
    assert ImageTransform.from_dict(written) == images.clip(16)
    with pytest.raises(DataError, match="alpha='white' comes before resizing"):
        ImageTransform.from_dict(written | {"cir_jax": {"rgb_last": True, "alpha": "white"}})


# --- timm


def test_timm_settings():
    config = {"input_size": [3, 32, 32], "crop_pct": None, "mean": None, "crop_mode": "squash"}
    transform = timm.image_transform("mobilenetv2_100", config)
    assert (transform.resize, transform.crop, transform.squash) == (36, 32, True)
    assert transform.mean == images.IMAGENET_MEAN and transform.alpha == "drop"
    for size in ([3, 32, 40], [1, 32, 32]):
        with pytest.raises(WeightsError, match=f"pretrained_cfg says input_size .{size[0]}, 32, "):
            timm.image_transform("mobilenetv2_100", {"input_size": size})


def test_every_family_has_a_processor():
    assert set(preprocessors.FAMILIES.values()) == set(preprocessors.HUGGING_FACE)
