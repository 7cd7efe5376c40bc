"""Where weights come from: directories, files, hub ids."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cir_jax.errors import WeightsError
from cir_jax.storage.places import is_hub_id, places
from cir_jax.weights import kinds, safetensors_files, shards, torch_files
from cir_jax.weights.convert import flatten
from cir_jax.weights.lazy import Lazy, reader

HUGGING_FACE, OPEN_CLIP = "config.json", "open_clip_config.json"

# in the order they are looked for
_WEIGHT_FILES = {
    HUGGING_FACE: (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    OPEN_CLIP: (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
    ),
}
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_JSON = 16 * 2**20
"""Bytes: the index of a model of 1000 tensors has 100,000."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights somewhere: a directory that holds a config, or one file.

    kind: name of the config file, "" for a file without one. hub_id: where more can be had.
    """

    name: str
    directory: Path
    kind: str
    config: Mapping[str, Any]
    file: Path | None = None
    hub_id: str = ""

    @property
    def model_type(self) -> str:
        """ "clip", "blip", "t5", "timm" ... as the config says; "" where nothing says it."""
        if self.kind == OPEN_CLIP:
            return "clip"
        return self.config.get("model_type", "timm" if self.kind else "")

    def what(self) -> str:
        """The weights as messages call them: the file, or the directory of several."""
        paths = self.files()
        return str(paths[0]) if len(paths) == 1 else f"{self.directory} ({len(paths)} files)"

    def files(self) -> list[Path]:
        """The files that hold the tensors; fetched from the hub where they are not here."""
        return list(self._located()[2].values())

    def tensors(self) -> Mapping[str, np.ndarray]:
        """All tensors by name, read when asked for.

        Raises WeightsError when a file is missing, damaged, or not the one that its index says.
        """
        index, where, paths = self._located()
        tensors = {name: read_tensors(path) for name, path in paths.items()}
        return shards.join(index, where, tensors) if where else next(iter(tensors.values()))

    def _located(self) -> tuple[Path, Mapping[str, str], dict[str, Path]]:
        """An index of several files, its map from tensors to their names, and the paths of all."""
        if self.file:
            return self.file, {}, {self.file.name: self.file}
        for name in _WEIGHT_FILES[self.kind]:
            found = self._have(name)
            if found is None:
                continue
            if not name.endswith(".index.json"):
                return found, {}, {name: found}
            where = shards.weight_map(found, read_json(found))
            have = {shard: self._have(shard) for shard in sorted(set(where.values()))}
            if missing := [shard for shard, path in have.items() if path is None]:
                raise WeightsError(
                    f"{found}: missing shards: {', '.join(missing)}. Copy them to the directory."
                )
            return found, where, {k: shards.check_inside(p) for k, p in have.items() if p}
        raise WeightsError(
            f"{self.directory / _WEIGHT_FILES[self.kind][0]} is missing (as are the other names: "
            f"{', '.join(_WEIGHT_FILES[self.kind][1:])}). "
            f"Copy it from where {self.directory / self.kind} is from."
        )

    def _have(self, name: str) -> Path | None:
        path = self.directory / name
        if path.is_file():
            return path
        return _fetch(self.hub_id, name) if self.hub_id else None


def without(tensors: Mapping[str, np.ndarray], names: Container[str]) -> Mapping[str, np.ndarray]:
    """The other tensors, not read yet."""
    return Lazy({name: reader(tensors, name) for name in tensors if name not in names})


def renamed(
    tensors: Mapping[str, np.ndarray], rename: Callable[[str], str]
) -> Mapping[str, np.ndarray]:
    """The same under other names, not read yet."""
    return Lazy({rename(name): reader(tensors, name) for name in tensors})


def find(name_or_path: str | Path, what: str = "backbone") -> Source:
    """A directory (also relative to the repository), a weight file, or a hub id (cached).

    what: is wanted, for the message. Raises WeightsError that says what to download and where to
    put it.
    """
    given = str(name_or_path)
    for path in places(given):
        if path.is_file() and path.suffix in _SUFFIXES:
            return _of_file(path.resolve())
        if path.is_dir() and (found := _of_directory(path.resolve(), path.resolve().name)):
            return found
    if is_hub_id(given):
        directory, reason = _snapshot(given)
        if directory is not None:
            if found := _of_directory(directory, given.split("/")[1], given):
                return found
            reason = "the hub repository has no config of a model"
    elif Path(given).expanduser().is_file():
        reason = f"a file of unknown kind; expected one of {', '.join(_SUFFIXES)}"
    else:
        reason = "no such directory with a config.json"
    if what == "backbone":
        kinds = "an OpenCLIP directory, an OpenAI .pt or BLIP .pth file"
        use = "set --config.backbone=DIR"
    else:
        kinds, use = "a timm directory", "give DIR"
    hub_id = given if is_hub_id(given) else "HUB_ID"
    raise WeightsError(
        f"{what} {given!r}: {reason.rstrip('.')}. Give a directory in Hugging Face format "
        "(config.json, model.safetensors, tokenizer.json, preprocessor_config.json), "
        f"{kinds}, or download one where there is a network, `hf download {hub_id} --local-dir "
        f"DIR`, and {use}."
    )


def one_of(path: Path, names: Sequence[str]) -> Path | None:
    """The first of these files in a directory, or in the hub repository that the path names; None
    where there is none of them. Raises WeightsError when a download fails."""
    if path.is_dir():
        return next((path / name for name in names if (path / name).is_file()), None)
    if path.exists() or path.suffix in _SUFFIXES or not is_hub_id(str(path)):
        return None
    return next((found for name in names if (found := _fetch(str(path), name))), None)


def to_fetch(name: str) -> str:
    """How much comes from the hub before these weights can be loaded: "605 MB"; "" = nothing, or
    nothing that is there."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    names = [file for files in _WEIGHT_FILES.values() for file in files]
    if not is_hub_id(name) or any(path.exists() for path in places(name)):
        return ""
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in names):
        return ""
    try:
        found = HfApi().model_info(name, files_metadata=True, timeout=10).siblings or []
    except Exception:  # no network: whoever loads them says so
        return "of a size that the hub alone knows"
    sizes = {file.rfilename: file.size for file in found if file.size}
    size = next((sizes[file] for file in names if file in sizes), 0)
    return megabytes(size) if size else "of a size that the hub does not say"


def megabytes(size: int) -> str:
    """Bytes in words, at least 1 MB."""
    return f"{max(size / 1e6, 1):,.0f} MB"


def read_tensors(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors of one file, by name, read when asked for.

    Raises WeightsError naming the file when it is not what its suffix says, or damaged.
    """
    read = safetensors_files.read if path.suffix == ".safetensors" else torch_files.read
    return read(path)


def read_json(file: Path) -> dict[str, Any]:
    """Of several equal keys the last counts, as everywhere.

    Raises WeightsError when the file is missing, too large for a config, or no JSON object.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_JSON + 1)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{file} is missing: it belongs to the weights. Copy it from where they come from."
        ) from error
    except OSError as error:
        raise WeightsError(
            f"{file}: unreadable ({error.strerror}), expected a JSON file. Copy it from where the "
            "weights come from."
        ) from error
    if len(content) > _JSON:
        raise WeightsError(f"{file}: more than {_JSON} bytes, expected the JSON file of a config.")
    try:
        values = json.loads(content.decode("utf-8-sig"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        if problem := kinds.problem(file, "a JSON file", kinds.TEXT):
            raise WeightsError(problem) from error
        raise WeightsError(
            f"{file}: not valid JSON ({error}). Download or copy it again."
        ) from error
    if not isinstance(values, dict):
        raise WeightsError(
            f"{file}: expected a JSON object, found a {type(values).__name__}. Download or copy it "
            "again."
        )
    return values


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


class ContentId:
    """Hash of parameters' values, whatever format, sharding or precision stored them.

    more: what else changes a model's features and is not a shape.
    """

    DIGITS = 12

    def __init__(self, more: Any = ""):
        self._digest = hashlib.sha256(repr(more).encode())

    def add(self, path: tuple[str, ...], leaf: Any) -> None:
        """The next parameter, in the order of their paths."""
        self._digest.update(f"{'/'.join(path)}{np.shape(leaf)}".encode())
        self._digest.update(np.ascontiguousarray(leaf, np.float32).data)

    def __str__(self) -> str:
        return self._digest.hexdigest()[: self.DIGITS]


def content_id(name: str, params: Mapping[str, Any], more: Any = "") -> str:
    """name@hash: see `ContentId`."""
    made = ContentId(more)
    for path, leaf in sorted(flatten(params).items()):
        made.add(path, leaf)
    return f"{name}@{made}"


def _of_directory(path: Path, name: str, hub_id: str = "") -> Source | None:
    configs = {k: read_json(path / k) for k in (HUGGING_FACE, OPEN_CLIP) if (path / k).is_file()}
    own = configs.get(HUGGING_FACE, {})
    kind = HUGGING_FACE if "model_type" in own or "architecture" in own else ""  # or timm's own
    # beside an OpenCLIP config lies the same model's, timm's, or that of a part: a BERT
    if OPEN_CLIP in configs and not str(own.get("model_type")).startswith(("clip", "siglip")):
        kind = OPEN_CLIP
    return Source(name, path, kind, configs[kind], hub_id=hub_id) if kind else None


def _of_file(path: Path) -> Source:
    beside = _of_directory(path.parent, path.stem)
    if beside is None:
        return Source(path.stem, path.parent, "", {}, file=path)
    return dataclasses.replace(beside, file=path)


def _snapshot(hub_id: str) -> tuple[Path | None, str]:
    """The small files of a hub repository: (directory, "") or (None, why not)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    small = ["*.json", "merges.txt", "vocab.txt", "spiece.model"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=small)), ""
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        return None, str(error).splitlines()[0] if str(error) else type(error).__name__


def _fetch(hub_id: str, name: str) -> Path | None:
    """One file of a hub repository, None where it has no such file. It lands beside the others."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(hub_id, name))
    except EntryNotFoundError:  # also when it is not cached and there is no network
        return None
    except (HfHubHTTPError, OSError) as error:
        raise WeightsError(f"{hub_id}/{name}: download failed ({error}). Try again.") from error
