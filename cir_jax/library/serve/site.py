"""What every page over a library has: its files, its errors in words, its guard."""

import asyncio
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cir_jax.errors import CirError
from cir_jax.library.serve.guard import Guard
from cir_jax.library.serve.pictures import SIDES, Pictures
from cir_jax.library.serve.refusal import Refusal
from cir_jax.library.serve.turns import Turns

PATIENCE = 60.0
"""Seconds for a body to come."""

KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


class Closing(Protocol):
    def close(self) -> None: ...


def site(
    files: Mapping[str, tuple[str, str]],
    routes: Sequence[BaseRoute],
    service: Closing,
    folder: Path,
    host: str,
    token: str,
) -> Guard:
    """files: where -> (package, name) of what lies in its folder `page`. service: what `routes`
    are of. folder: what errors call by its last name alone. host: that is listened on."""
    handlers = {
        Refusal: lambda request, error: error.answer(),
        CirError: lambda request, error: Refusal(400, _said(error, folder)).answer(),
        ClientDisconnect: lambda request, error: Refusal(400, "the request broke off.").answer(),
        HTTPException: lambda request, error: _unknown(request, error).answer(),
        Exception: lambda request, error: Refusal(
            500, f"an accident ({type(error).__name__}); its report is where `cir` runs."
        ).answer(),
    }
    own = [Route(path, _file(*where)) for path, where in files.items()]
    app = Starlette(routes=[*own, *routes], exception_handlers=handlers)
    app.state.service = service
    app.state.guard = Guard(app, host, token)
    return app.state.guard


class Showing:
    """The route of pictures, `/pictures/{number}/{side}`: some at once, others in a queue."""

    def __init__(self, pictures: Pictures):
        self._pictures = pictures
        self._turns = Turns("pictures", at_once=2, waiting=300)

    async def show(self, request: Request) -> Response:
        number, side = request.path_params["number"], request.path_params["side"]
        if side not in SIDES:
            raise Refusal(404, f"a picture is {', '.join(SIDES)}, not {side[:40]!r}.")
        async with self._turns.turn():
            data = await self._turns.run(self._pictures.thumbnail, number, side)
        # by id, whose content may change with its file
        return Response(data, 200, {"cache-control": "private, max-age=60"}, "image/jpeg")

    def close(self) -> None:
        self._turns.close()

    @property
    def route(self) -> Route:
        return Route("/pictures/{number}/{side}", self.show)


def _file(package: str, name: str) -> Any:
    async def route(request: Request) -> Response:
        data = (importlib.resources.files(package) / "page" / name).read_bytes()
        return Response(data, media_type=KINDS[Path(name).suffix])

    return route


def _said(error: CirError, folder: Path) -> str:
    """An error, without where the library lies."""
    return str(error).replace(str(folder), folder.name)


def _unknown(request: Request, error: HTTPException) -> Refusal:
    if error.status_code == 405:
        return Refusal(405, f"{request.method} is not answered here.")
    return Refusal(error.status_code, "there is nothing of this name.")


async def body(request: Request, most: int) -> bytes:
    """Raises Refusal for more than that many bytes, and for what does not come."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise Refusal(413, f"too large: at most {most:,} bytes are taken here.")
                parts.append(part)
    except TimeoutError as error:
        raise Refusal(408, f"the request did not come within {PATIENCE:g} s.") from error
    return b"".join(parts)
