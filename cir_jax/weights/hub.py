"""The directory that a composer is for others, here or on the Hugging Face hub: found and checked.

    README.md          the card
    config.json        library_name "cir_jax", format, experiment, backbone, how it was made
    model.safetensors  what was trained, by its paths in our tree; a training-free method has none
    backbone/NAME/     the backbone, unless the hub has it already
    files/             what else every query needs, such as a phrase book
    digests.json       size and SHA-256 of each file but the card, which people edit

Nothing in it is pickled. What a directory says is not believed before it is checked: names stay
inside of it, and only what `digests.json` lists is fetched.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cir_jax.errors import ConfigError, WeightsError
from cir_jax.storage import digests, faults
from cir_jax.storage.buckets import local
from cir_jax.weights import files

LIBRARY, FORMAT = "cir_jax", 1
CARD, CONFIG, TENSORS = "README.md", "config.json", "model.safetensors"
BACKBONE, FILES = "backbone", "files"
ANY_NAME = "ORG/NAME"
"""What a card calls the repository until it is pushed to one."""

_FIELDS = {"experiment": dict, "backbone": dict, "trained": str, "files": dict, "made": dict}
_CLIENTS = ("httpx", "httpx2", "requests", "urllib3")
"""Packages that huggingface_hub speaks by, now or in earlier versions: their errors are the
network's."""


def find(name_or_path: str | Path) -> Path:
    """`located`, and each file is as it was written.

    Raises as it does, and WeightsError when files are missing or damaged.
    """
    directory = located(name_or_path)
    again = _remedy(directory)
    if missing := [name for name in _needed(directory) if name not in _listed(directory)]:
        raise WeightsError(
            f"{directory}: {', '.join(missing)} missing in {digests.NAME}, so this is not all of a "
            f"composer. {again}."
        )
    if wrong := digests.damage(directory):
        said = "; ".join(f"{name} {what}" for name, what in wrong[:3])
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{directory}: incomplete or damaged: {said}{more}. {again}.")
    return directory


def located(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The directory of a composer: the one that is given, or a hub repository's in the cache.

    revision: branch, tag or commit. Raises ConfigError for a revision of a directory, WeightsError
    that says what to do when there is no such repository, nothing can be fetched, or it is of
    another library or a newer version.
    """
    given = local(name_or_path, "config.init_from")  # others look first
    if not given.is_dir():
        return _download(str(name_or_path), revision)
    if revision is not None:
        raise ConfigError(
            f"revision={revision!r}: {given} is a directory of this machine, which has none."
        )
    read(given)
    return given


def _remedy(directory: Path) -> str:
    """How a directory is got again."""
    if (cached := of_cache(directory)) is None:
        return "Copy it again"
    hub_id, commit = cached
    return f"`hf download {hub_id} --revision {commit} --force-download`"


def of_cache(directory: Path) -> tuple[str, str] | None:
    """Hub id and commit of what was fetched; None = that is another directory."""
    folder = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not folder.startswith("models--"):
        return None
    # no name of the hub has two
    return folder.removeprefix("models--").replace("--", "/", 1), directory.name


def is_one(directory: Path) -> bool:
    """Whether a directory says that it is a composer of this library."""
    try:
        return files.read_json(directory / CONFIG).get("library_name") == LIBRARY
    except WeightsError:  # a workdir's config may be damaged: whoever reads that says so
        return False


def read(directory: Path) -> dict[str, Any]:
    """Its config.json. Raises WeightsError when it is no composer of a known format."""
    values = files.read_json(directory / CONFIG)
    _check_config(values, str(directory / CONFIG))
    return values


def _check_config(values: Mapping[str, Any], what: str) -> None:
    if isinstance(values.get("composer"), Mapping):
        raise WeightsError(
            f"{what}: of a workdir of launch/main.py, which is given as --workdir, with the "
            "--config that it was begun with. --config.export_to=hub:DIR writes a composer of it."
        )
    if values.get("library_name") != LIBRARY:
        kind = values.get("model_type") or values.get("library_name")
        is_kind = f"the config of a {kind!r}" if kind else "another library's"
        raise WeightsError(
            f"{what}: {is_kind}, expected a composer of cir_jax (library_name {LIBRARY!r}). "
            "Weights of a CLIP, BLIP or SigLIP are a backbone: cir_jax.load('slerp', "
            "backbone=...)."
        )
    if not isinstance(number := values.get("format"), int) or number > FORMAT:
        raise WeightsError(
            f"{what}: format {number!r}; this version of cir_jax reads up to {FORMAT}. Update "
            "cir_jax."
        )
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(values.get(name), kind)]
    if wrong:
        raise WeightsError(f"{what}: no field {wrong[0]!r} as cir_jax writes it. Get it again.")


def _needed(directory: Path) -> list[str]:
    """Files without which there is no composer, by what its config says."""
    values = read(directory)
    needed = [CONFIG, *([TENSORS] if values["trained"] else [])]
    if values["backbone"].get("included"):
        needed.append(f"{BACKBONE}/{values['backbone']['included']}/{files.HUGGING_FACE}")
    return [*needed, *(f"{FILES}/{name}" for name in values["files"].values())]


def _listed(directory: Path) -> dict[str, int]:
    """Name -> bytes of the files in its digests. Raises WeightsError for names that lead out of the
    directory."""
    try:
        sizes = digests.listed(directory)
    except ValueError as error:
        raise WeightsError(
            f"{directory / digests.NAME}: damaged ({error}). Get it again."
        ) from error
    if sizes is None:
        raise WeightsError(
            f"{directory}: no {digests.NAME}, so nothing says whether this is all of a composer. "
            "Get the whole directory again."
        )
    for name in sizes:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or path.drive:
            raise WeightsError(f"{directory / digests.NAME}: {name!r} leads out of the directory.")
    return sizes


def to_fetch(name_or_path: str | Path) -> tuple[str, dict[str, Any]]:
    """How much `located` would fetch, in the words of `files.to_fetch`, and the config.json. What
    tells it, a few KB, is fetched. Raises as `located`."""
    given = Path(name_or_path).expanduser()
    if given.is_dir():
        return "", read(given)
    directory = _of_commit(str(name_or_path), None)
    size = sum(n for name, n in _listed(directory).items() if not (directory / name).is_file())
    return files.megabytes(size) if size else "", read(directory)


def _download(hub_id: str, revision: str | None) -> Path:
    """The repository's files in the cache, all of one commit, whatever is pushed meanwhile."""
    directory = _of_commit(hub_id, revision)
    for name in _listed(directory):
        fetch(hub_id, name, directory.name)
    return directory


def _of_commit(hub_id: str, revision: str | None) -> Path:
    """The directory of a commit in the cache, which is called as the commit is, with the files that
    say what belongs to it."""
    directory = fetch(hub_id, CONFIG, revision).parent
    read(directory)
    fetch(hub_id, digests.NAME, directory.name)
    return directory


def fetch(hub_id: str, name: str, revision: str | None = None) -> Path:
    """A file of a hub repository, in the cache. Raises WeightsError, see `located`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, name, revision=revision))
    except Exception as error:
        if said := _said(error, hub_id, name, revision):
            raise WeightsError(said) from error
        raise


def _said(error: Exception, hub_id: str, name: str, revision: str | None) -> str:
    """What kept a file from being fetched, and what to do; "" = a mistake of a program."""
    from huggingface_hub import constants, errors

    at = f" at revision {revision!r}" if revision else ""
    login = "with HF_TOKEN set, or after `hf auth login`"
    match error:
        case errors.HFValidationError():
            return (
                f"{hub_id!r}: neither a directory here nor a name on the hub, ORG/NAME ({error})."
            )
        case errors.GatedRepoError():
            return (
                f"{hub_id}: its owner wants to know who gets it. Ask at "
                f"{constants.ENDPOINT}/{hub_id}, then do this again {login}."
            )
        case errors.RevisionNotFoundError():
            return f"{hub_id}: there is no revision {revision!r}."
        case errors.RepositoryNotFoundError():
            return (
                f"{hub_id}: no such directory here, and no such repository on "
                f"{constants.ENDPOINT}. Correct the name; a private one is seen only {login}."
            )
        case errors.LocalEntryNotFoundError():
            flag = f" --revision {revision}" if revision else ""
            return (
                f"{hub_id}{at}: {name} is not here, and the hub was not reached "
                f"({faults.cause(error)}). Where there is a network: `hf download "
                f"{hub_id}{flag}`, or with `--local-dir DIR`, and give DIR."
            )
        case errors.EntryNotFoundError():
            return (
                f"{hub_id}{at}: has no {name}, so it is no composer of cir_jax, or not all of one."
            )
    if isinstance(error, OSError) or is_of_network(error):
        return f"{hub_id}/{name}: download failed ({faults.cause(error)}). Try again."
    return ""


def is_of_network(error: BaseException) -> bool:
    """Whether an error is that of a client of HTTP."""
    return type(error).__module__.partition(".")[0] in _CLIENTS
