"""Who may ask, and how much: all that is checked before a request reaches a route.

A page of another site that is open in the same browser can send requests here, and with a name of
its own that resolves to 127.0.0.1 ("DNS rebinding") read the answers, too. So the Host header must
name this machine; what another site's page sends is refused by its Origin and Sec-Fetch-Site;
posts carry a number that only our page can have read; and no answer says that others may read it.
"""

import hmac
import secrets
from collections.abc import MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cir_jax.library.serve import hosts
from cir_jax.library.serve.refusal import Refusal

MOST_BYTES = 20_000_000
"""Of a body."""

CSRF_HEADER, COOKIE = "x-cir-jax", "cir_jax_session"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """ASGI middleware. host: that is listened on; token: "" = anybody on it may ask.

    csrf: what posts must carry in `CSRF_HEADER`; new with each process.
    """

    def __init__(self, app: ASGIApp, host: str, token: str = ""):
        self._app, self._token = app, token
        self._names = hosts.named(host)
        self._by_address = hosts.is_everywhere(host)
        self.csrf = secrets.token_urlsafe(24)
        self._session = secrets.token_urlsafe(24)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # nothing else is listened to
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_origin(scope, headers)
            if answer := self._welcome(scope):
                await answer(scope, receive, guarded)
                return
            self._check_session(headers)
            if scope["method"] not in ("GET", "HEAD"):
                self._check_post(scope["method"], headers)
        except Refusal as refusal:
            await refusal.answer()(scope, receive, guarded)
            return
        await self._app(scope, _counted(receive), guarded)

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        host = hosts.bare(given[0]) if len(given) == 1 else ""
        if host in self._names or (self._by_address and hosts.is_address(host)):
            return
        raise Refusal(
            421, f"this server is not {host or 'what the Host header says'}: open the address "
            "that `cir serve` printed.",
        )  # fmt: skip

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        ours = origin is None or origin == f"{scope['scheme']}://{headers['host']}"
        # a link to the page may be anywhere; what it shows may not
        followed = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        if not ours or (site not in ("same-origin", "none") and not followed):
            raise Refusal(403, "a page of another site may not ask here. Open the page itself.")

    def _welcome(self, scope: Scope) -> RedirectResponse | None:
        """The address that was printed has the token; the browser keeps a session in its place."""
        if not self._token or scope["path"] != "/":
            return None
        given = QueryParams(scope["query_string"]).get("token")
        if given is None:
            return None
        if not _same(given, self._token):
            raise Refusal(401, "the token is wrong: open the address that `cir serve` printed.")
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self._session, httponly=True, samesite="strict", path="/")
        return answer

    def _check_session(self, headers: Headers) -> None:
        if not self._token:
            return
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        if cookie is None or not _same(cookie.value, self._session):
            raise Refusal(
                401, "this server wants its token: open the address that `cir serve` printed."
            )

    def _check_post(self, method: str, headers: Headers) -> None:
        if method != "POST":
            raise Refusal(405, f"{method} is not answered here, GET and POST are.")
        if not _same(headers.get(CSRF_HEADER, ""), self.csrf):
            raise Refusal(403, "this is not from the page as it is served now: load it again.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MOST_BYTES:
            raise too_large()


def too_large() -> Refusal:
    return Refusal(413, f"too large: at most {MOST_BYTES // 1_000_000} MB are taken.")


def _counted(receive: Receive) -> Receive:
    """The same without what is beyond the limit, however it is sent."""
    taken = 0

    async def counted() -> MutableMapping[str, Any]:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MOST_BYTES:
            raise too_large()
        return message

    return counted


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())
