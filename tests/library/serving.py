"""A server of `cir serve` in a thread of the test, and requests to it as anybody may send them."""

import contextlib
import http.client
import json
import os
import socket
import threading
import time

import pytest


@contextlib.contextmanager
def served(libraries, host="127.0.0.1", token="", port=0):
    """Yields a `Client` of a server over these libraries."""
    from cir_jax.library.serve import command

    with running(command.server(libraries, host, token), port) as client:
        yield client


@contextlib.contextmanager
def running(server, port=0):
    """Yields a `Client` of any server."""
    from cir_jax.library.serve import command

    with contextlib.closing(command.listening("127.0.0.1", port)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline, "it does not start"
            time.sleep(0.01)
        try:
            yield Client(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def installed():
    """Skips where the extra is missing, but fails where CI is set."""
    if os.environ.get("CI"):
        return
    pytest.importorskip("starlette", reason="pip install 'cir_jax[serve]'")
    pytest.importorskip("uvicorn", reason="pip install 'cir_jax[serve]'")


class Client:
    def __init__(self, port):
        self.port, self.address = port, f"http://127.0.0.1:{port}"
        self._csrf = ""

    @property
    def csrf(self):
        self._csrf = self._csrf or self.get("/api/about")[2]["csrf"]
        return self._csrf

    def get(self, path, **headers):
        return self.ask("GET", path, None, headers)

    def post(self, path, body, **headers):
        """With what the page sends beside; a dict goes as JSON."""
        return self.ask("POST", path, body, {"x-cir-jax": self.csrf} | headers)

    def search(self, **query):
        return self.post("/api/search", query)

    def ask(self, method, path, body=None, headers=()):
        """(status, headers, JSON or bytes)."""
        body = json.dumps(body).encode() if isinstance(body, dict | list) else body
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            data = answer.read()
        kind = answer.getheader("content-type", "")
        return answer.status, answer.headers, json.loads(data) if "json" in kind else data

    def raw(self, data):
        """The first bytes that come for these."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as opened:
            opened.sendall(data)
            return opened.recv(4096)
