"""The routes of `cir annotate`: the tasks, and the pictures of `cir serve`."""

import re
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cir_jax.library.annotate.tasks import Tasks
from cir_jax.library.serve import questions, site
from cir_jax.library.serve.guard import Guard
from cir_jax.library.serve.pictures import Pictures
from cir_jax.library.serve.refusal import Refusal
from cir_jax.library.serve.turns import Turns

SERVED = "cir_jax.library.serve"
FILES = {
    "/": (__package__, "page.html"),
    "/annotate.css": (__package__, "annotate.css"),
    "/annotate.js": (__package__, "annotate.js"),
    **{f"/{name}": (SERVED, name) for name in ("page.css", "server.js", "icon.svg")},
}


class Annotating:
    """Actions come one at a time: each is a transaction, and what it answers is as of then."""

    def __init__(self, tasks: Tasks):
        self.tasks = tasks
        library = tasks.album.library
        self.acting = Turns("actions", at_once=1, waiting=16)
        self.showing = site.Showing(Pictures(library.folder, library.store))

    def close(self) -> None:
        self.acting.close()
        self.showing.close()

    async def about(self, request: Request) -> Response:
        guard: Guard = request.app.state.guard
        async with self.acting.turn():
            about = await self.acting.run(self.tasks.about)
        return JSONResponse(about | {"csrf": guard.csrf})

    def action(self, act: Callable[[Tasks, dict[str, Any]], Any]) -> Callable[..., Any]:
        """A route that answers with what `act` gives, with the next task where that is None, and
        with how far all are."""

        def done(body: bytes) -> dict[str, Any]:
            said = questions.parsed(body)
            given = act(self.tasks, said)
            if given is None:
                review = said.get("review") is True
                given = {"task": self.tasks.next(text(said, "annotator"), review)}
            return given | {"progress": self.tasks.progress()}

        async def route(request: Request) -> Response:
            body = await site.body(request, questions.MOST_BYTES)
            async with self.acting.turn():
                return JSONResponse(await self.acting.run(done, body))

        return route


def application(tasks: Tasks, host: str, token: str = "") -> Guard:
    """What a server runs. host: that it listens on, see `Guard`."""
    made = Annotating(tasks)
    actions: dict[str, Callable[[Tasks, dict[str, Any]], Any]] = {
        "next": lambda tasks, said: None,
        "skip": lambda tasks, said: tasks.skip(text(said, "annotator"), photo(said, "reference")),
        "pair": _pair,
        "remarks": lambda tasks, said: {
            "remarks": tasks.remarks(
                whole(said, "query"), text(said, "concept"), text(said, "caption")
            )
        },
        "word": lambda tasks, said: tasks.word(
            whole(said, "query"), text(said, "concept"), text(said, "caption")
        ),
        "judge": _judge,
        "finish": lambda tasks, said: tasks.finish(
            whole(said, "query"), text(said, "annotator"), texts(said, "aspects")
        ),
        "drop": lambda tasks, said: tasks.drop(whole(said, "query")),
        "measure": lambda tasks, said: tasks.measured(),
        "export": lambda tasks, said: tasks.export(),
    }
    routes = [
        Route("/api/about", made.about),
        *(
            Route(f"/api/{name}", made.action(act), methods=["POST"])
            for name, act in actions.items()
        ),
        made.showing.route,
    ]
    return site.site(FILES, routes, made, tasks.album.library.folder, host, token)


def _pair(tasks: Tasks, said: dict[str, Any]) -> None:
    tasks.pair(text(said, "annotator"), photo(said, "reference"), photo(said, "target"))


def _judge(tasks: Tasks, said: dict[str, Any]) -> dict[str, Any]:
    fits = said.get("fits") is True
    query, annotator = whole(said, "query"), text(said, "annotator")
    tasks.judge(query, annotator, photo(said, "photo"), fits)
    return {"fits": fits}


def text(said: dict[str, Any], name: str) -> str:
    return questions.text(said, name)


def texts(said: dict[str, Any], name: str) -> list[str]:
    given = said.get(name) or []
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise Refusal(400, f"{name}: expected a list of texts.")
    return given


def whole(said: dict[str, Any], name: str) -> int:
    value = questions.number(name, said.get(name))
    if value != int(value):
        raise Refusal(400, f"{name}={value:g}: expected a whole number.")
    return int(value)


def photo(said: dict[str, Any], name: str) -> int:
    """The store's number of a picture's id, "p12"."""
    match = re.fullmatch(r"p([1-9][0-9]{0,17})", text(said, name))
    if match is None:
        raise Refusal(400, f"{name}: expected the id of a photo, such as p12.")
    return int(match[1])
