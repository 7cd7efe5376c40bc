"""`cir push`: a composer goes to the Hugging Face hub, in one commit or not at all.

What is sent is what `digests.json` lists, and the card; nothing else that lies in the directory.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cir_jax.errors import CirError, ConfigError, WeightsError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("what", help="directory of --config.export_to=hub:DIR, workdir of a training, or method")
    add("name", metavar="ORG/NAME", help="the repository, which is made if there is none")
    add("--private", action="store_true", help="a new repository is seen by you alone")
    add("--revision", metavar="BRANCH", help="a branch, which is made if there is none")
    add("--license", help="of the weights, as the hub abbreviates it: mit, cc-by-nc-4.0 ...")
    add("--backbone", help="of a method: a hub id or directory in place of its own")
    add("--weights", help="of a trained method, the checkpoint of its authors")
    add("--dry_run", action="store_true", help="says what would be sent, and sends nothing")


def push(args: argparse.Namespace) -> str:
    """Sends what `args` say; returns what to print.

    Raises ConfigError for a name that is none or not the user's, a repository that holds something
    else, and without a token; WeightsError for a damaged directory and when the hub is not reached;
    what `cir_jax.load` raises for the rest.
    """
    from huggingface_hub import HfApi

    _check_name(args.name)
    api = HfApi(library_name="cir_jax")
    if not args.dry_run:  # before minutes of work
        with _explained(args.name):
            api.whoami()
            new = _is_new(api, args)
    with _directory(args) as directory:
        operations = _files(directory, args)
        if args.dry_run:
            return _plan(args, operations)
        with _explained(args.name):
            return _send(api, args, operations, new)


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{name!r}: no name of a repository, ORG/NAME ({error}).") from error
    if name.count("/") != 1:
        raise ConfigError(f"{name!r}: give ORG/NAME, your name or your organisation's before it.")


def _is_new(api: "HfApi", args: argparse.Namespace) -> bool:
    """Whether there is no repository of that name, or none that can be seen. Raises ConfigError for
    one that is not to be written to, WeightsError when that cannot be found out."""
    from huggingface_hub.errors import RepositoryNotFoundError

    from cir_jax.weights import hub

    try:
        found = api.model_info(args.name)
    except RepositoryNotFoundError:
        return True
    if args.private and not found.private:
        raise ConfigError(
            f"{args.name} is there and public, so --private would hide nothing. Change that in its "
            "settings on the hub, or choose another name."
        )
    names = {file.rfilename for file in found.siblings or []} - {".gitattributes", hub.CARD}
    if not names:
        return False
    other = f"{args.name} holds something else than a composer of cir_jax"
    if hub.CONFIG not in names:
        raise ConfigError(f"{other}: there is no {hub.CONFIG}. Choose another name.")
    directory = hub.fetch(args.name, hub.CONFIG).parent
    try:
        hub.read(directory)
    except WeightsError as error:
        raise ConfigError(
            f"{other}, or one of a newer version ({error}) Choose another name."
        ) from error
    return False


@contextlib.contextmanager
def _directory(args: argparse.Namespace) -> Iterator[Path]:
    """The directory that is sent: the one that is given, or one written for the while."""
    from cir_jax import loading
    from cir_jax.evaluation import sharing
    from cir_jax.weights import hub

    if Path(args.what).expanduser().is_dir() and loading.is_one_for_others(args.what):
        if args.backbone or args.weights:
            raise ConfigError(f"{args.what} has a backbone and weights. Leave out --backbone and "
                              "--weights.")  # fmt: skip
        yield hub.find(args.what)
        return
    experiment, workdir = loading.experiment_of(
        args.what, backbone=args.backbone, weights=args.weights
    )
    with tempfile.TemporaryDirectory(prefix="cir_push_") as folder:
        target = Path(folder, args.name.rpartition("/")[2])
        sharing.write(experiment, workdir, target)
        yield target


def _files(directory: Path, args: argparse.Namespace) -> "list[CommitOperationAdd]":
    """The card, which calls the composer by its name now, and the rest as it is."""
    from huggingface_hub import CommitOperationAdd, ModelCard
    from yaml import YAMLError

    from cir_jax.storage import digests
    from cir_jax.weights import hub

    card = directory / hub.CARD
    if not card.is_file():
        raise WeightsError(f"{card} is missing: export the composer again.")
    text = card.read_text(encoding="utf-8").replace(hub.ANY_NAME, args.name)
    try:
        parsed = ModelCard(text)
    except (ValueError, YAMLError) as error:  # people edit them
        raise ConfigError(
            f"{card}: its metadata are wrong ({' '.join(str(error).split())}). Mend them."
        ) from error
    if args.license:
        parsed.data.license = args.license
    added = [CommitOperationAdd(hub.CARD, str(parsed).encode())]
    names = [*(digests.listed(directory) or ()), digests.NAME]
    return [*added, *(CommitOperationAdd(name, str(directory / name)) for name in names)]


def _plan(args: argparse.Namespace, operations: "list[CommitOperationAdd]") -> str:
    files = [f"{op.upload_info.size:>14,}  {op.path_in_repo}" for op in operations]
    total = sum(op.upload_info.size for op in operations)
    card = operations[0].path_or_fileobj.decode()
    where = f"{args.name}, branch {args.revision}" if args.revision else args.name
    kind = ", private if it is new" if args.private else ""
    return "\n".join(
        [card.partition("\n---\n")[0].removeprefix("---\n"), "", *files,
         f"{total:>14,}  bytes would go to {where}{kind}. Nothing was sent."]
    )  # fmt: skip


def _send(
    api: "HfApi",
    args: argparse.Namespace,
    operations: "list[CommitOperationAdd]",
    new: bool,
) -> str:
    from huggingface_hub import CommitOperationDelete, constants

    from cir_jax.weights import hub

    if new:
        api.create_repo(args.name, private=args.private or None)
    branch = args.revision
    if branch:
        api.create_branch(args.name, branch=branch, exist_ok=True)
    ours = (hub.TENSORS, f"{hub.BACKBONE}/", f"{hub.FILES}/")
    sent = {operation.path_in_repo for operation in operations}
    before = api.model_info(args.name, revision=branch).siblings or []
    left = [x.rfilename for x in before if x.rfilename.startswith(ours) and x.rfilename not in sent]
    done = api.create_commit(
        args.name,
        [*operations, *(CommitOperationDelete(name, is_folder=False) for name in left)],
        commit_message="Composer of cir_jax",
        revision=branch,
    )
    at = f', revision="{branch}"' if branch else ""
    return f'{constants.ENDPOINT}/{args.name} ({done.oid[:12]}): cir_jax.load("{args.name}"{at})'


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Errors of the hub and of the way to it, in words that help."""
    from huggingface_hub import constants, errors

    from cir_jax.storage import faults
    from cir_jax.weights import hub

    login = "a token that may write: `hf auth login`, or HF_TOKEN in the environment"
    try:
        yield
    except CirError:
        raise
    except errors.LocalTokenNotFoundError as error:
        raise ConfigError(
            f"{name}: nobody is logged in to {constants.ENDPOINT}. Give {login}."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise ConfigError(f"{name}: HF_HUB_OFFLINE is set, so nothing is sent.") from error
    except Exception as error:
        # earlier versions raise the client's own error of a status
        status, said = getattr(getattr(error, "response", None), "status_code", 0), _said(error)
        if status == 401:
            raise ConfigError(
                f"{name}: the hub does not take the token ({said}). Give {login}."
            ) from error
        if status in (403, 404):
            raise ConfigError(
                f"{name}: not yours to write, or the token may only read ({said}). Take a name of "
                f"your own or of your organisation, and {login}."
            ) from error
        if isinstance(error, ValueError) and "README.md" in str(error):
            raise ConfigError(f"{name}: the hub refuses the card ({said}).") from error
        if isinstance(error, errors.HfHubHTTPError):
            raise WeightsError(f"{name}: the hub refuses it ({said}).") from error
        if isinstance(error, OSError) or hub.is_of_network(error):
            raise WeightsError(
                f"{name}: {constants.ENDPOINT} was not reached ({faults.cause(error)}). Do the "
                "same again."
            ) from error
        raise


def _said(error: Any) -> str:
    """The hub's own words, without addresses and ids of requests."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return str(getattr(error, "server_message", "") or lines[-1]).strip(".")
