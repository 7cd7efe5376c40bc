"""Image preprocessing as published files describe it -> arguments of `ImageTransform`.

The judge is the library that reads the same file: transformers' image processors (on PIL) and
open_clip's `image_transform`. A field is honoured as there, or refused by name; so is one that is
not known, because it may change the pixels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cir_jax.errors import WeightsError

HUGGING_FACE = {
    "CLIPImageProcessor": {
        "size": {"shortest_edge": 224},
        "default_to_square": False,
        "do_center_crop": True,
        "crop_size": 224,
    },
    "BlipImageProcessor": {"size": {"height": 384, "width": 384}, "default_to_square": True},
    "SiglipImageProcessor": {
        "size": {"height": 224, "width": 224},
        "default_to_square": False,
        "image_mean": 0.5,
        "image_std": 0.5,
    },
}
"""transformers' image processors -> what they take for fields that the file leaves out."""

FAMILIES = {
    "clip": "CLIPImageProcessor",
    "blip": "BlipImageProcessor",
    "siglip": "SiglipImageProcessor",
}
"""Model family -> its image processor, for files that name none."""

_USUAL = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "do_pad": False,
    "pad_size": None,
    "use_square_size": False,
}
"""The same of all of them."""

_INERT = {
    "auto_map",
    "cir_jax",  # our own: see `ImageTransform.to_dict`
    "data_format",
    "device",
    "disable_grouping",
    "feature_extractor_type",
    "image_processor_type",
    "image_seq_length",
    "input_data_format",
    "model_input_names",
    "processor_class",
    "return_tensors",
    "size_divisor",
    "transformers_version",
    "use_fast",
}
"""Fields that leave the pixels as they are."""

_RESAMPLE = range(6)  # PIL's filters
_OPEN_CLIP = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
_INTERPOLATION = {"bicubic": 3, "bilinear": 2, "random": 3}  # random while training only


def hugging_face(config: Mapping[str, Any], what: str | Path, family: str) -> dict[str, Any]:
    """From a `preprocessor_config.json`, or the `image_processor` of a `processor_config.json`.

    family: of the model, "clip", "blip" or "siglip": it decides where the file names no processor.
    Raises WeightsError naming `what`, the file, and the field.
    """
    name = _processor(config, what, family)
    known = {**_USUAL, **HUGGING_FACE[name]}
    for field, value in config.items():
        if field not in {*known, *_INERT} and not field.startswith("_") and value is not None:
            raise WeightsError(
                f"{what}: field {field!r} ({value!r:.80}) is not known, and it may change the "
                f"pixels. Remove it if {name} of transformers does not read it."
            )
    values = {**known, **config}
    for field, value in values.items():
        if field.startswith("do_") and not isinstance(value, bool | None):
            raise _wrong(what, field, value, "true or false")
    if not values["do_resize"]:
        raise _wrong(what, "do_resize", values["do_resize"], "true: the model takes one size")
    if values["use_square_size"]:
        raise _wrong(what, "use_square_size", True, "false, and the size as height and width")
    resize, squash = _size(values["size"], bool(values["default_to_square"]), what)
    if values["do_center_crop"]:
        crop, square = _size(values["crop_size"], True, what, "crop_size")
        if not square or crop > resize:
            raise _wrong(what, "crop_size", values["crop_size"], f"at most the size, {resize}")
    elif squash:
        crop = resize
    else:
        raise _wrong(
            what,
            "size",
            values["size"],
            "height and width where do_center_crop is not true, as the model takes one size",
        )
    if values["do_pad"] and values["pad_size"] is not None:
        if _size(values["pad_size"], True, what, "pad_size") != (crop, True):
            raise _wrong(what, "pad_size", values["pad_size"], f"none, or {crop}")
    if values["resample"] not in _RESAMPLE or isinstance(values["resample"], bool):
        raise _wrong(what, "resample", values["resample"], "the number of a filter, 3 for bicubic")
    factor, mean, std = values["rescale_factor"], (0.0,) * 3, (1.0,) * 3
    if values["do_normalize"]:
        mean = _triple(values["image_mean"], what, "image_mean")
        std = _triple(values["image_std"], what, "image_std")
        if min(std) <= 0:
            raise _wrong(what, "image_std", values["image_std"], "numbers above 0")
    if not values["do_rescale"]:
        factor = 1.0
    elif not _number(factor) or factor <= 0:
        raise _wrong(what, "rescale_factor", factor, "a number above 0, usually 1 / 255")
    return {
        "resize": resize,
        "crop": crop,
        "mean": mean,
        "std": std,
        "squash": squash,
        "resample": values["resample"],
        "rescale": factor,
        # unconverted, transformers takes RGB only, and does not ask which colour is transparent
        "alpha": "white" if values["do_convert_rgb"] else "drop",
        "processor": name,
    }


def open_clip(
    config: Mapping[str, Any], size: int, what: str | Path = "open_clip_config.json"
) -> dict[str, Any]:
    """From the `preprocess_cfg` of an `open_clip_config.json`; {} is OpenAI's own.

    size: of the model's images, which open_clip takes whatever the file says.
    Raises WeightsError naming `what`, the file, and the field.
    """
    values = {field: value for field, value in config.items() if value is not None}
    if unknown := sorted(set(values) - _OPEN_CLIP):
        raise WeightsError(
            f"{what}: preprocess_cfg has a field {unknown[0]!r}, which is not known and may change "
            f"the pixels. Known: {', '.join(sorted(_OPEN_CLIP))}. Remove it if open_clip does not "
            "read it."
        )
    mode, filter_name = values.get("resize_mode", "shortest"), values.get("interpolation")
    if mode not in ("shortest", "squash"):
        raise _wrong(what, "resize_mode", mode, "'shortest' or 'squash'")
    if values.get("mode", "RGB") != "RGB":
        raise _wrong(what, "mode", values["mode"], "'RGB'")
    if filter_name not in {None, *_INTERPOLATION}:
        raise _wrong(what, "interpolation", filter_name, f"one of {', '.join(_INTERPOLATION)}")
    return {
        "resize": size,
        "crop": size,
        "mean": _triple(values.get("mean", _USUAL["image_mean"]), what, "mean"),
        "std": _triple(values.get("std", _USUAL["image_std"]), what, "std"),
        "squash": mode == "squash",
        "resample": _INTERPOLATION.get(filter_name, 3),
        "rgb_last": True,
        "round_offset": True,
        "alpha": "drop",
    }


def _processor(config: Mapping[str, Any], what: str | Path, family: str) -> str:
    """The class as transformers finds it, whatever its backend and age."""
    given = config.get("image_processor_type") or config.get("feature_extractor_type")
    if given is None:
        return FAMILIES[family]
    name = str(given).removesuffix("Fast").removesuffix("Pil")
    name = name.replace("FeatureExtractor", "ImageProcessor")
    if name == "Siglip2ImageProcessor":
        raise _wrong(
            what,
            "image_processor_type",
            given,
            "SiglipImageProcessor: patches of varying grids (NaFlex) are not supported, use the "
            "weights of one resolution",
        )
    if name not in HUGGING_FACE:
        expected = f"one of {', '.join(HUGGING_FACE)}"
        raise _wrong(what, "image_processor_type", given, expected)
    return name


def _size(size: Any, square: bool, what: str | Path, field: str = "size") -> tuple[int, bool]:
    """(side, whether of a square): else the shortest edge, as a number is where not `square`."""
    expected = "height and width, and these equal"
    if field == "size":
        expected = f"shortest_edge, or {expected}"
    if isinstance(size, list | tuple) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    elif not isinstance(size, Mapping):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    sides = {k: side for k, side in size.items() if side is not None}
    fine = all(isinstance(side, int) and not isinstance(side, bool) for side in sides.values())
    if not fine or set(sides) not in ({"shortest_edge"}, {"height", "width"}):
        raise _wrong(what, field, size, expected)
    if len(set(sides.values())) > 1 or min(sides.values()) < 1:
        raise _wrong(what, field, size, expected)
    return next(iter(sides.values())), "height" in sides


def _triple(values: Any, what: str | Path, field: str) -> tuple[float, ...]:
    """Three numbers, or one for all."""
    triple = tuple(values) if isinstance(values, list | tuple) else (values,) * 3
    if len(triple) != 3 or not all(map(_number, triple)):
        raise _wrong(what, field, values, "three numbers")
    return tuple(float(value) for value in triple)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _wrong(what: str | Path, field: str, value: Any, expected: str) -> WeightsError:
    return WeightsError(
        f"{what}: {field} is {value!r:.80}, expected {expected}. Copy the file from where the "
        "weights come from, or correct it."
    )
