"""The routes of `cir serve`: what the page asks for, as an ASGI application."""

import os
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cir_jax.library.explaining import Alone
from cir_jax.library.library import Library
from cir_jax.library.photos import printable
from cir_jax.library.serve import questions, site
from cir_jax.library.serve.guard import MOST_BYTES, Guard
from cir_jax.library.serve.pictures import Pictures
from cir_jax.library.serve.turns import Turns

HERE = "cir_jax.library.serve"
FILES = {
    "/": (HERE, "page.html"),
    **{f"/{name}": (HERE, name) for name in ("page.css", "page.js", "mask.js", "server.js")},
    "/icon.svg": (HERE, "icon.svg"),
}
EXPLAINED = 8
"""Photos shown of what the image alone and the text alone would give."""

FOLDERS = 1000
"""That the page offers to search in."""


class Service:
    """Methods over one folder, asked by name; the first one where none is named."""

    def __init__(self, libraries: Mapping[str, Library]):
        self.libraries = libraries
        self.library = next(iter(libraries.values()))
        self.pictures = Pictures(self.library.folder, self.library.store)
        self._folders: tuple[int, list[str]] = (-1, [])
        self.asking = Turns("queries", at_once=1, waiting=4)
        self.uploading = Turns("uploads", at_once=1, waiting=4)
        self.showing = site.Showing(self.pictures)

    def close(self) -> None:
        for one in (self.asking, self.uploading, self.showing):
            one.close()

    async def about(self, request: Request) -> Response:
        guard: Guard = request.app.state.guard
        async with self.asking.turn():
            about = await self.asking.run(self._about)
        return JSONResponse(about | {"csrf": guard.csrf})

    def _about(self) -> dict[str, Any]:
        return {
            "folder": printable(self.library.folder.name),
            "photos": len(self.library),
            "folders": self._listed(self.library.store.version()),
            "most": {
                "bytes": MOST_BYTES,
                "images": questions.MOST_IMAGES,
                "weight": questions.MOST_WEIGHT,
                "found": questions.MOST_FOUND,
            },
            "methods": [
                {
                    "name": name,
                    "takes": sorted(library.takes),
                    "controls": questions.controls(library),
                }
                for name, library in self.libraries.items()
            ],
        }

    def _listed(self, version: int) -> list[str]:
        """Folders of photos, as the store is in that version."""
        if self._folders[0] != version:
            found = {os.path.dirname(photo.path) for photo in self.library.store.photos()} - {b""}
            named = sorted(os.fsdecode(folder) for folder in found if _is_text(folder))
            self._folders = version, named[:FOLDERS]
        return self._folders[1]

    async def search(self, request: Request) -> Response:
        body = await site.body(request, questions.MOST_BYTES)
        async with self.asking.turn():
            return JSONResponse(await self.asking.run(self._search, body))

    def _search(self, body: bytes) -> dict[str, Any]:
        question = questions.read(body, self.libraries, self.pictures)
        library = self.libraries[question.method]
        began = time.perf_counter()
        found = library.search(**question.asked)
        took = 1000 * (time.perf_counter() - began)
        results = [
            _result(number, path.relative_to(library.folder), score)
            for (path, score), number in zip(found, found.numbers, strict=True)
        ]
        return {
            "results": results,
            "names": {given: self._name(given) for given in question.pictures},
            "approximate": found.approximate,
            "milliseconds": round(took, 1),
            "explained": {name: self._alone(one) for name, one in found.explained.items()},
        }

    def _name(self, given: str) -> str:
        """What a photo is called that was asked with; "" for uploads."""
        path = self.pictures.path(given)
        return "" if path is None else printable(os.fsdecode(path))

    def _alone(self, alone: Alone) -> dict[str, Any]:
        """As `Alone`, `now` beside each of its best photos."""
        shown = alone.found[:EXPLAINED]
        paths = self.library.store.paths(number for number, _ in shown)
        return {
            "found": [
                _result(number, os.fsdecode(path), score) | {"now": now}
                for (number, score), path, now in zip(shown, paths, alone.now, strict=False)
                if path is not None
            ],
            "ranks": alone.ranks,
        }

    async def upload(self, request: Request) -> Response:
        # a turn first: bodies that are waited for are not read yet
        async with self.uploading.turn():
            content = await site.body(request, MOST_BYTES)
            number, size = await self.uploading.run(self.pictures.keep, content)
        return JSONResponse({"id": number, "width": size[0], "height": size[1]}, 201)


def application(libraries: Mapping[str, Library], host: str, token: str = "") -> Guard:
    """What a server runs. host: that it listens on, see `Guard`."""
    service = Service(libraries)
    routes = [
        Route("/api/about", service.about),
        Route("/api/search", service.search, methods=["POST"]),
        Route("/api/pictures", service.upload, methods=["POST"]),
        service.showing.route,
    ]
    return site.site(FILES, routes, service, service.library.folder, host, token)


def _result(number: int, path: Any, score: float) -> dict[str, Any]:
    return {"id": f"p{number}", "path": printable(path), "score": round(score, 6)}


def _is_text(name: bytes) -> bool:
    return os.fsencode(printable(os.fsdecode(name))) == name
