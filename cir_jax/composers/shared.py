"""A composer as others get it: a directory of its parameters and of all that its queries need.

    --config.export_to=hub:DIR          writes what was trained so (`weights.hub` has the layout)
    --config.init_from=hub:DIR          evaluates these weights, or starts training from them
    --config.init_from=hub:ORG/NAME     likewise of a repository on the Hugging Face hub

Parameters are stored in our own tree, so what is read is bit for bit what was written, for every
method. A backbone that the hub has is named; any other one lies in the directory.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from cir_jax import composers, weights
from cir_jax.composers.base import Composer
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.models.backbone import Backbone
from cir_jax.storage.buckets import local
from cir_jax.storage.places import is_hub_id
from cir_jax.weights import convert, files, hub

FLAG = "hub:"

HERE = {
    "data_dir": "",
    "export_to": "",
    "init_from": "",
    "workers": -1,
    "threads": 0,
    "prefetch": 0,
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    "frozen": "split",
    "image_size": 0,
}
"""Fields of a config that are of a machine and not of a composer, as others get them: as a new
experiment has them. An included backbone has its size already."""


def given(value: str) -> str:
    """What stands behind the flag in `hub:DIR`, "" where the value is something else.

    Raises ConfigError where nothing stands behind it.
    """
    if not value.startswith(FLAG):
        return ""
    if not (name := value.removeprefix(FLAG)):
        raise ConfigError(f"{value!r}: write {FLAG}DIR.")
    return name


def check(config: ml_collections.ConfigDict, target: str | Path) -> None:
    """Raises ConfigError or WeightsError when the composer of a config cannot be given to others,
    or `target` holds something else than one."""
    settings = config.composer.to_dict()
    if not composers.composer_class(settings["name"]).pretrained_backbone:
        raise ConfigError(
            f"{config.name} trains a backbone: write that (--config.export_to=DIR), and share a "
            "composer on it."
        )
    composers.for_others(settings)
    weights.hub_ids(config.backbone)
    target = local(target, "config.export_to")
    free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not free and not (target.is_dir() and hub.is_one(target)):
        raise ConfigError(
            f"{target}: there is something else than a composer of cir_jax. Choose another "
            "directory: all that is in it would be replaced."
        )


def write(
    directory: Path,
    config: ml_collections.ConfigDict,
    composer: Composer,
    params: Mapping[str, Any],
    backbone_params: Any,
    made: Mapping[str, Any],
) -> None:
    """Writes all but the card and the digests into `directory`, which is empty.

    params: trained, {} of a training-free method. backbone_params: before any tuning; both on the
    host. made: what is known of how it was made, for people. Raises as `weights.hub_ids`, and for a
    backbone that others would not get as it is.
    """
    backbone, name = composer.backbone, config.composer.name
    about: dict[str, Any] = {"weights_id": backbone.weights_id, "included": ""}
    if not weights.hub_ids(config.backbone):
        about["included"] = backbone.weights_id.partition("@")[0]
        _write_backbone(directory / hub.BACKBONE / about["included"], backbone, backbone_params)
    (directory / hub.FILES).mkdir()
    needed = composer.write_files(directory / hub.FILES)
    if not any(needed.values()):
        (directory / hub.FILES).rmdir()
    if params:
        tensors = {"/".join(path): np.asarray(x) for path, x in convert.flatten(params).items()}
        save_file(
            {path: np.ascontiguousarray(x) for path, x in tensors.items()},
            directory / hub.TENSORS,
            metadata={"format": "np", "library_name": hub.LIBRARY},
        )
    content = {
        "library_name": hub.LIBRARY,
        "format": hub.FORMAT,
        "method": name,
        "backbone": about,
        "trained": files.content_id(name, params) if params else "",
        "files": needed,
        "made": dict(made),
        "experiment": _experiment(config, bool(about["included"])),
    }
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    (directory / hub.CONFIG).write_text(text, encoding="utf-8")


def _write_backbone(path: Path, backbone: Backbone, params: Any) -> None:
    """In half precision where that loses nothing. Raises WeightsError when it is not read back as
    the same."""
    floats = [np.asarray(x) for x in jax.tree.leaves(params)]
    with np.errstate(over="ignore"):
        exact = all(np.array_equal(x.astype(np.float16).astype(x.dtype), x) for x in floats)
    weights.save(path, backbone, params, np.float16 if exact else np.float32)
    again = weights.load(path)[0].weights_id
    if again != backbone.weights_id:
        raise WeightsError(
            f"backbone {backbone.weights_id}: written and read again it is {again}, so others "
            "would not get the same. Convert it with `weights.save` first, and train on that."
        )


def _experiment(config: ml_collections.ConfigDict, included: bool) -> dict[str, Any]:
    """The config without what is of this machine; paths in it keep their last name alone."""
    values = json.loads(config.to_json_best_effort())
    kept = {} if included else {"image_size": values.get("image_size", 0)}
    values |= {"composer": composers.for_others(values["composer"]), **HERE, **kept}
    if included:
        values["backbone"] = ""
    return _without_places(values)


def _without_places(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _without_places(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_places(value) for value in node]
    if isinstance(node, str) and (re.match(r"[/~]|[A-Za-z]:[\\/]|\w+://", node)):
        return re.split(r"[/\\]", node.rstrip("/\\"))[-1]
    return node


def read_config(directory: Path) -> dict[str, Any]:
    """The experiment of a directory that `hub.find` has checked, as a config for this machine:
    `init_from` names the directory.

    Raises WeightsError when the backbone or a file is named by something else than it may be.
    """
    about = hub.read(directory)
    values = about["experiment"] | HERE | {"image_size": about["experiment"].get("image_size", 0)}
    if not isinstance(values.get("composer"), dict):
        raise WeightsError(f"{directory / hub.CONFIG}: its experiment names no composer.")
    if included := about["backbone"].get("included"):
        values["backbone"] = str(directory / hub.BACKBONE / included)
    # by their form: what a stranger's config names is not looked for on this machine
    elif not all(map(is_hub_id, str(values.get("backbone", "")).split("+"))):
        raise WeightsError(
            f"{directory / hub.CONFIG}: backbone {values.get('backbone')!r} is neither included "
            "nor a hub id. Ask who made it."
        )
    folder, settings = directory / hub.FILES, ml_collections.ConfigDict(values["composer"])
    places = {key: str(folder / name) if name else "" for key, name in about["files"].items()}
    settings.update_from_flattened_dict(places)
    values["composer"] = settings.to_dict()
    return values | {"init_from": f"{FLAG}{directory}"}


def check_backbone(directory: Path, backbone: Backbone) -> None:
    """Raises WeightsError when a composer was made on other weights than these, whatever they are
    called."""
    wanted = str(hub.read(directory)["backbone"].get("weights_id"))
    if _hashes(wanted) != _hashes(backbone.weights_id):
        raise WeightsError(
            f"{directory}: was made on the backbone {wanted}, this one is {backbone.weights_id}. "
            "Its queries mean nothing on other weights: give the backbone that it was made on."
        )


def _hashes(weights_id: str) -> list[str]:
    return re.findall(r"@(\w+)", weights_id)


def load(composer: Composer, directory: Path) -> Any:
    """Trained parameters (numpy) of a directory that `hub.find` has checked.

    Raises WeightsError when they are another method's, or of another size.
    """
    about = hub.read(directory)
    if not about["trained"]:
        raise WeightsError(
            f"{directory}: a training-free {about.get('method')}, without parameters to begin with."
        )
    file = directory / hub.TENSORS
    tensors = files.read_tensors(file)
    what = f"{file} (of a {about.get('method')})"
    expected = jax.eval_shape(composer.init, jax.random.key(0))
    names = {"/".join(path) for path in convert.flatten(expected)}
    if leftover := sorted(names ^ set(tensors)):
        raise WeightsError(
            f"{what}: not the parameters of this {type(composer).__name__}; on one side only are "
            f"{', '.join(leftover[:3])}."
        )
    params = unflatten_dict(
        {name: convert.finite(tensors[name], name, str(file)) for name in names}, sep="/"
    )
    convert.check_shapes(params, expected, what)
    return params
