"""`cir serve`: its options, and the server that it runs."""

import argparse
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cir_jax.errors import ConfigError
from cir_jax.library.serve import hosts

if TYPE_CHECKING:
    from cir_jax.library.library import Library

HOST, PORT = "127.0.0.1", 8317
SHORTEST_TOKEN = 16
MADE = ""
"""`--token` without a value: one is made."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default=HOST, help=f"address to listen on; default {HOST}: this machine alone")
    add("--port", type=int, default=PORT, help=f"default {PORT}; 0 = any that is free")
    add("--token", nargs="?", const=MADE, metavar="SECRET",
        help="asked of everyone; without a value one is made. Other hosts need it")  # fmt: skip
    add("--no_update", action="store_true", help="serve what is indexed, without a look at files")


def checked_token(host: str, given: str | None) -> str:
    """The token to ask for, "" = none. Raises ConfigError where one is needed, or is too short."""
    if given is None:
        if not hosts.is_loopback(host):
            raise ConfigError(
                f"--host={host}: others can reach it, and would see all photos. Add --token (one "
                f"is made and printed), or stay on {HOST}."
            )
        return ""
    if given == MADE:
        return secrets.token_urlsafe(24)
    if len(given) < SHORTEST_TOKEN or not (given.isascii() and given.isprintable()):
        raise ConfigError(
            f"--token: expected at least {SHORTEST_TOKEN} ASCII characters, here are {len(given)}. "
            "Give --token without a value: one is made."
        )
    return given


def check_installed(command: str) -> None:
    """Raises ConfigError without what pages need, which `cir COMMAND` serves."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"cir {command} needs Starlette and uvicorn ({error}): pip install 'cir_jax[serve]'."
        ) from error


def listening(host: str, port: int) -> socket.socket:
    """A socket there. Raises ConfigError where it cannot be."""
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port={port}: expected 0 (any that is free) to 65535.")
    try:
        where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(*where[:2])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where[4])
        made.listen(128)
        return made
    except OSError as error:
        raise ConfigError(
            f"--host={host} --port={port}: cannot be listened on ({error.strerror}). "
            "--port=0 takes any port that is free."
        ) from error


def address(host: str, port: int, token: str) -> str:
    """What is opened in a browser."""
    if hosts.is_everywhere(host):
        host = socket.gethostname()
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


def server(libraries: "Mapping[str, Library]", host: str, token: str) -> Any:
    """A uvicorn server; `run(sockets=[...])` serves until it is interrupted."""
    from cir_jax.library.serve.app import application

    return running(application(libraries, host, token))


def running(application: Any) -> Any:
    """The same of any application."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            application,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,  # it would name queries and tokens
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=3,
        )
    )


def beside(
    folder: Path, searchers: Mapping[str, Any], store: Path | None, **how: Any
) -> "dict[str, Library]":
    """A library of each method, over one store; `how` as `Library` takes it. Methods on one
    backbone share its parameters."""
    from cir_jax.library.library import Library
    from cir_jax.retrieval.search import Searcher
    from cir_jax.weights.fingerprint import fingerprint

    made: dict[str, Library] = {}
    backbones: dict[str, Any] = {}
    for name, searcher in searchers.items():
        kept = searcher.frozen["backbone"]
        kept = backbones.setdefault(fingerprint(kept), kept)
        shared = {**searcher.frozen, "backbone": kept}
        searcher = Searcher(
            searcher.composer, searcher.params, shared, mesh=searcher.mesh, seed=searcher.seed
        )
        first = next(iter(made.values()), None)
        made[name] = Library(folder, searcher, store=store, beside=first, **how)
    return made
