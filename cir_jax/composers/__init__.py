"""The list of methods: one file each, read beside its paper. `build` makes one by name."""

import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from cir_jax.composers.base import Composer
from cir_jax.errors import ConfigError, unknown
from cir_jax.models.backbone import Backbone

COMPOSERS = {
    "artemis": "Artemis",
    "blip_pretraining": "BlipPretraining",
    "clip4cir": "Clip4Cir",
    "clip_pretraining": "ClipPretraining",
    "combiner": "Combiner",
    "compodiff": "CompoDiff",
    "image_only": "ImageOnly",
    "image_text": "ImageText",
    "instruct_pix2pix": "InstructPix2Pix",
    "isa": "Isa",
    "lincir": "LinCir",
    "magiclens": "MagicLens",
    "palavra": "Palavra",
    "pdv": "Pdv",
    "pic2word": "Pic2Word",
    "rtd": "Rtd",
    "searle": "Searle",
    "searle_oti": "SearleOti",
    "slerp": "Slerp",
    "tat": "Tat",
    "text_only": "TextOnly",
}
"""Module name under `cir_jax.composers` -> class in it."""


def composer_class(name: str) -> type[Composer]:
    """Raises ConfigError for an unknown name."""
    if name not in COMPOSERS:
        raise ConfigError(unknown("composer", name, COMPOSERS))
    return getattr(importlib.import_module(f"cir_jax.composers.{name}"), COMPOSERS[name])


def shaping(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config's composer settings shapes the result, as JSON has it; for comparisons.

    Settings that are left out, as by a config of an earlier version, have their defaults;
    `speed_settings` are left out.
    """
    cls = composer_class(settings["name"])
    parameters = inspect.signature(cls).parameters | inspect.signature(cls.share).parameters
    defaults = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    found = {k: v for k, v in (defaults | dict(settings)).items() if k not in cls.speed_settings}
    return json.loads(json.dumps(found, default=str))


def for_others(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`Composer.for_others` of a config's composer settings, its name among them."""
    arguments = {key: value for key, value in settings.items() if key != "name"}
    return {"name": settings["name"], **composer_class(settings["name"]).for_others(arguments)}


def build(name: str, backbone: Backbone, **kwargs: Any) -> Composer:
    """The composer `name` on `backbone`; `kwargs` are its constructor's arguments and those of
    `Composer.share`.

    Raises ConfigError for an unknown name or argument, naming the closest valid one.
    """
    cls = composer_class(name)
    shared = set(inspect.signature(cls.share).parameters) - {"self"}
    valid = (set(inspect.signature(cls).parameters) - {"backbone"}) | shared
    for key in kwargs:
        if key not in valid:
            raise ConfigError(unknown(f"setting of composer {name}:", key, valid))
    made = cls(backbone, **{k: v for k, v in kwargs.items() if k not in shared})
    made.share(**{k: v for k, v in kwargs.items() if k in shared})
    made.settings = shaping({"name": name, **kwargs})
    return made
