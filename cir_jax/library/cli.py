"""The command `cir`: index, search and serve one's own photos, make a benchmark of them; share what
was trained.

It is here and not in `launch/`, whose binaries need a checkout: this one comes with `pip install`.
Results alone go to stdout, all else to stderr. Exit status: 0 found, 1 nothing, 2 an error.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cir_jax import __version__
from cir_jax.errors import CirError, ConfigError, WeightsError
from cir_jax.library import push as pushing
from cir_jax.library.annotate import command as annotating
from cir_jax.library.serve import command as serving
from cir_jax.storage import faults
from cir_jax.storage.places import SHIPPED, default_compiled_dir, is_hub_id

if TYPE_CHECKING:
    from cir_jax.library.indexes.ladder import Checked
    from cir_jax.library.library import Library, Results, Update
    from cir_jax.retrieval.search import Searcher

METHOD = "slerp"
SERVED = (METHOD, "image_text")
BACKBONE = "openai/clip-vit-base-patch32"
DEMO = {"backbone": "data/shapes/clip", "photos": SHIPPED / "data" / "shapes" / "photos"}
FOUND, NOTHING, ERROR = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _parser().parse_args(argv)
    # it prints its warnings itself, and Orbax's import makes the root logger print them, too
    logging.getLogger("huggingface_hub").propagate = False
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except CirError as error:
        _say(f"error: {error}")
    except BrokenPipeError:  # `cir search ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FOUND
    except KeyboardInterrupt:
        _say("stopped. What was indexed is kept; the same command goes on from there.")
        return 130
    except Exception as error:  # 1 would say that nothing was found
        reason = faults.reason(error)
        if reason is None:
            traceback.print_exc()
        _say(f"error: {reason or error}")
    return ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cir", description="Search your own photos by an image, a text, or both."
    )
    parser.add_argument("--version", action="version", version=f"cir_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    everywhere = argparse.ArgumentParser(add_help=False)
    add = everywhere.add_argument
    add("photos", nargs="?", type=Path, help="folder of photos; default the current one")
    add("--backbone", help=f"hub id or directory of a CLIP, BLIP or SigLIP; default {BACKBONE}")
    add("--store", type=Path, help="file that the index is kept in; default in the user's cache")
    add("--index", default="", metavar="KIND",
        help="exact (default up to 2 million photos), sharded, faiss or qdrant")  # fmt: skip
    add("--demo", action="store_true", help="the embedded world: its small CLIP, its photos")
    add("--max_megapixels", type=float, help="larger photos are not decoded; default 200")
    shared = argparse.ArgumentParser(add_help=False, parents=[everywhere])
    add = shared.add_argument
    add(
        "--method",
        default=METHOD,
        help=f"method, workdir of a training, or ORG/NAME of a shared composer; default {METHOD}",
    )
    add("--weights", help="of a trained method, the checkpoint of its authors")
    index = commands.add_parser("index", parents=[shared], help="index a folder, or freshen it")
    index.add_argument("--retry", action="store_true", help="what could not be read, again")
    index.add_argument("--check", nargs="?", type=int, const=10, metavar="K",
        help="measures how many of the K (10) best by an exact scan the index finds")  # fmt: skip
    index.set_defaults(run=_index)
    search = commands.add_parser("search", parents=[shared], help="search a folder")
    search.set_defaults(run=_search)
    add = search.add_argument
    add("--image", action="append", default=[], metavar="FILE[:WEIGHT]",
        help="reference; several are added up, below 0 = unlike it")  # fmt: skip
    add("--text", help="what should differ; without an image, what to find")
    add("--not", dest="negative", action="append", default=[], metavar="TEXT",
        help="what should not be seen")  # fmt: skip
    add("--mask", type=Path, help="region of the image to edit: PNG of its size, white = edit")
    add("--alpha", type=float, help="share of the text, 0 to 1 (slerp, tat)")
    add("--image_weight", type=float, help="guidance by the image (compodiff)")
    add("--text_weight", type=float, help="guidance by the text (compodiff)")
    add("--steps", type=int, help="of denoising (compodiff)")
    add("--seed", type=int, help="of the noise (compodiff)")
    add("-n", dest="k", type=int, default=10, help="photos to find; default 10")
    add("--under", default="", help="in this folder of the photos alone")
    add("--after", default="", metavar="DAY", help="taken then or later: 2024, 2024-05, 2024-05-17")
    add("--min_score", type=float, help="no photo below this score")
    add("--dedup", nargs="?", type=float, const=0.98, metavar="COSINE",
        help="of photos more alike than this (0.98), the best alone")  # fmt: skip
    add("--no_update", action="store_true", help="search what is indexed, without a look at files")
    form = search.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object")
    form.add_argument("--paths", action="store_true", help="paths alone, one a line")
    form.add_argument("-0", dest="zero", action="store_true", help="paths alone, each ended by NUL")
    add("--html", type=Path, metavar="FILE", help="writes a page of the results, too")
    serve = commands.add_parser("serve", parents=[everywhere], help="search in a browser")
    serve.add_argument("--method", action="append", metavar="METHOD[=WEIGHTS]",
        help="method or workdir, with its authors' checkpoint where it is trained; each one given "
        f"can be chosen on the page; default {', '.join(SERVED)}")  # fmt: skip
    serving.add_options(serve)
    serve.set_defaults(run=_serve)
    annotate = commands.add_parser(
        "annotate", parents=[everywhere], help="make a benchmark of the photos, in a browser"
    )
    annotate.add_argument("--method", action="append", metavar="METHOD[=WEIGHTS]",
        help="candidates for right answers are what these find; default "
        f"{', '.join(annotating.METHODS)}")  # fmt: skip
    annotating.add_options(annotate)
    annotate.set_defaults(run=_annotate)
    push = commands.add_parser("push", help="share a composer on the Hugging Face hub")
    pushing.add_options(push)
    push.set_defaults(run=_push)
    return parser


def _index(args: argparse.Namespace) -> int:
    with _open(args) as library:
        done = library.update(
            retry=args.retry, max_megapixels=args.max_megapixels, label=_label("photos")
        )
        _report(done)
        print(_summary(done))
        there = len(library)  # which makes what the index keeps
        if there and args.check:
            print(_measured(library.check(args.check)))
        return FOUND if there else NOTHING


def _search(args: argparse.Namespace) -> int:
    references = [_weighted(given) for given in args.image]
    with _open(args) as library:
        if not args.no_update:
            _freshen(library, args.max_megapixels)
        results = library.search(
            text=args.text,
            images=[file for file, _ in references],
            weights=[weight for _, weight in references] if len(references) > 1 else None,
            negative=args.negative,
            mask=args.mask,
            k=args.k,
            under=args.under,
            after=args.after,
            min_score=args.min_score,
            dedup=args.dedup,
            **_controls(args, library),
        )
        shown = [(_folder(args) / file.relative_to(library.folder), s) for file, s in results]
    if results.approximate:
        _say(results.approximate)
    if args.html:
        _write_page(args, references, results, shown)
    _print(args, results, shown)
    return FOUND if results else NOTHING


def _serve(args: argparse.Namespace) -> int:
    serving.check_installed("serve")
    token = serving.checked_token(args.host, args.token)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(serving.listening(args.host, args.port))
        libraries = stack.enter_context(_several(args, SERVED))
        _run(args, listening, serving.server(libraries, args.host, token), token)
    return FOUND


def _annotate(args: argparse.Namespace) -> int:
    from cir_jax.library.annotate.records import Records
    from cir_jax.library.annotate.tasks import Tasks

    if not args.export:
        serving.check_installed("annotate")
    token = serving.checked_token(args.host, args.token)
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(contextlib.closing(Records(args.out)))
        if args.export:
            libraries = stack.enter_context(_several(args, annotating.METHODS))
            print(annotating.summary(Tasks(libraries, records).export()))
            return FOUND
        listening = stack.enter_context(serving.listening(args.host, args.port))
        libraries = stack.enter_context(_several(args, annotating.METHODS))
        tasks = Tasks(libraries, records, annotating.annotator())
        _run(args, listening, annotating.server(tasks, args.host, token), token)
    return FOUND


def _push(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):
        done = pushing.push(args)
    print(done)
    return FOUND


@contextlib.contextmanager
def _several(args: argparse.Namespace, default: Sequence[str]) -> "Iterator[dict[str, Library]]":
    """A library of each method, brought up to date."""
    searchers = {}
    for given in args.method or default:
        name, weights = _with_weights(given)
        short = Path(name).name
        searchers[name if short in searchers else short] = _load(args, name, weights)
    libraries = serving.beside(_folder(args), searchers, args.store, index=args.index, say=_say)
    with next(iter(libraries.values())) as library:
        if not args.no_update:
            _freshen(library, args.max_megapixels)
        yield libraries


def _run(args: argparse.Namespace, listening: socket.socket, server: Any, token: str) -> None:
    """Serves until it is interrupted."""
    from cir_jax.input import images

    with images.limited(args.max_megapixels), contextlib.suppress(KeyboardInterrupt):
        port = listening.getsockname()[1]
        print(serving.address(args.host, port, token), flush=True)
        _say("Ctrl-C stops it.")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what systemd and docker send
        server.run(sockets=[listening])


def _with_weights(given: str) -> tuple[str, str | None]:
    """METHOD or METHOD=WEIGHTS; a directory of that whole name is one."""
    method, equals, weights = given.rpartition("=")
    if not equals or Path(given).expanduser().exists():
        return given, None
    return method, weights


def _open(args: argparse.Namespace) -> "Library":
    searcher = _load(args, args.method, args.weights)

    from cir_jax.library.library import Library

    return Library(_folder(args), searcher, store=args.store, index=args.index, say=_say)


def _load(args: argparse.Namespace, method: str, weights: str | None) -> "Searcher":
    if args.photos is not None and not args.photos.expanduser().is_dir():
        raise ConfigError(f"{args.photos}: no such folder. Give the folder of your photos.")
    from cir_jax.library.indexes.ladder import check_name

    check_name(args.index)
    backbone = _backbone(args, method)
    import jax

    from cir_jax import loading

    if not jax.config.jax_compilation_cache_dir:  # $JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(default_compiled_dir()))
    try:
        for name, size in loading.to_fetch(method, backbone).items():
            _say(f"{name} is not here yet: it comes from the Hugging Face hub, once ({size}).")
        with contextlib.redirect_stdout(sys.stderr):  # which weights, and how far they are trained
            return loading.load(method, backbone=backbone, weights=weights)
    except WeightsError as error:
        said = str(error).replace("--config.backbone", "--backbone")
        raise WeightsError(f"{said} Or see it work without: --demo.") from error


def _folder(args: argparse.Namespace) -> Path:
    if args.photos is not None:
        return args.photos.expanduser()
    return DEMO["photos"] if args.demo else Path()


def _backbone(args: argparse.Namespace, method: str) -> str | None:
    """None = as the preset, the workdir or the shared composer says."""
    if args.backbone or args.demo:
        return args.backbone or DEMO["backbone"]
    folder = Path(method).expanduser()
    trained = (folder / "config.json").is_file() or (is_hub_id(method) and not folder.exists())
    own = trained or ":" in method or method.endswith(".py")
    return None if own else BACKBONE


def _freshen(library: "Library", max_megapixels: float | None) -> None:
    """Before a search. What stands in the way of it does not stand in the way of the search."""
    from cir_jax.library.library import Busy

    if library.store.reads_only:
        _say(f"not brought up to date: {library.store.reads_only}.")
        return
    try:
        done = library.update(max_megapixels=max_megapixels, label=_label("photos"))
    except Busy:
        _say("another process is indexing: searching what it has done so far.")
        return
    _report(done)
    if done.added or done.changed or done.renamed or done.deleted:
        _say(_summary(done))


def _report(done: "Update") -> None:
    for path, why in done.problems:
        _say(f"left out: {path}: {why}")
    for what, count in done.left_out.items():
        _say(f"left out: {count} {what}")


def _summary(done: "Update") -> str:
    parts = [f"{count} {what}" for what, count in (
        ("new", done.added), ("changed", done.changed), ("renamed", done.renamed),
        ("deleted", done.deleted), ("left out", len(done.problems)),
    ) if count]  # fmt: skip
    return f"{done.photos} photos: {', '.join(parts) or 'nothing new'}"


def _measured(found: "Checked") -> str:
    return (
        f"{found.name}: recall@{found.k} {found.recall:.3f} of an exact scan, {found.queries} "
        f"composed queries of {found.photos} photos; {found.milliseconds:.1f} ms each"
    )


def _weighted(given: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; a file of that whole name is one."""
    file, colon, weight = given.rpartition(":")
    if not colon or Path(given).expanduser().exists():
        return given, 1.0
    try:
        return file, float(weight)
    except ValueError:
        return given, 1.0


def _controls(args: argparse.Namespace, library: "Library") -> dict[str, Any]:
    named = {name: getattr(args, name) for name in ("alpha", "steps", "seed")}
    given = (args.image_weight, args.text_weight)
    if given != (None, None):
        own = getattr(library.composer, "guidance", (1.0, 1.0))
        named["guidance"] = tuple(
            mine if asked is None else asked for asked, mine in zip(given, own, strict=True)
        )
    return {name: value for name, value in named.items() if value is not None}


def _print(
    args: argparse.Namespace, results: "Results", shown: Sequence[tuple[Path, float]]
) -> None:
    if hasattr(sys.stdout, "reconfigure"):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    if args.json:
        rows = [{"path": str(path), "score": round(score, 6)} for path, score in shown]
        print(json.dumps({"results": rows, "approximate": results.approximate}, indent=1))
        return
    for path, score in shown:
        if args.zero:
            print(path, end="\0")
        else:
            print(path if args.paths else f"{score:.3f}\t{path}")


def _write_page(
    args: argparse.Namespace,
    references: Sequence[tuple[str, float]],
    results: "Results",
    shown: Sequence[tuple[Path, float]],
) -> None:
    from cir_jax.library import sheet

    asked = [args.text or "", *(f"not {text}" for text in args.negative)]
    title = ", ".join(filter(None, asked)) or "like this"
    found = [
        (file, str(path), score) for (file, score), (path, _) in zip(results, shown, strict=True)
    ]
    note = results.approximate or f"{len(found)} photos of {_folder(args)}"
    sheet.write(args.html, title, note, [file for file, _ in references], found)
    _say(f"wrote {args.html}")


def _label(what: str) -> str:
    """Of the progress bar, where somebody is watching."""
    return what if sys.stderr.isatty() else ""


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
