"""As much of the Hugging Face hub as a push and a download need, on this machine, for the real
client: accounts, repositories with branches, commits of git's and of large files, `resolve`.

No published fake holds commits. What it answers is as the hub's own API does, errors too: the
client takes what they mean from the status and from X-Error-Code.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKENS = {"hf_mine": "me", "hf_read": "reader"}
"""Token -> account. `reader` may write nothing."""
LARGE = ".safetensors"
"""What goes the way of large files, as on the hub."""


class Hub:
    """What is on it. repos: name -> branch -> commits, the newest last: (id, {path: bytes}).
    warns: of each request, by its number, which a client prints."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, list[tuple[str, dict[str, bytes]]]]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.warns = False
        self.url = ""

    def put(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit; returns its id."""
        commits = self.repos.setdefault(name, {"main": []}).setdefault(branch, [])
        number = hashlib.sha1(f"{name} {branch} {len(commits)}".encode()).hexdigest()
        commits.append((number, dict(files)))
        return number

    def at(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """The commit that a branch or an id stands for."""
        branches = self.repos.get(name, {})
        if branches.get(revision):
            return branches[revision][-1]
        found = [c for commits in branches.values() for c in commits if c[0] == revision]
        if not found and revision in branches:
            return "0" * 40, {}
        return found[0] if found else None


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(hub: Hub, cache: Path, token: str = "hf_mine") -> dict[str, str]:
    """Variables by which a process talks to it."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }


def use(monkeypatch: pytest.MonkeyPatch, hub: Hub, cache: Path, token: str = "hf_mine") -> None:
    """This process talks to it: what huggingface_hub read from the environment when it was imported
    is put in by hand."""
    from huggingface_hub import constants

    for name, value in environment(hub, cache, token).items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {self.path}")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        self.account = TOKENS.get(token, "")
        if token and not self.account:
            self._error(401, "Invalid credentials in Authorization header")
            return
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {self.path}"):
                method(self, **found.groupdict())
                return
        self._error(404, f"no such page: {self.command} {self.path}")

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        number = len(self.hub.asked)
        also = {"X_HF_Warning": f"{number}; warning {number}."} if self.hub.warns else {}
        for name, value in ({"Content_Length": str(len(content))} | also | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, said: str, code: str = "") -> None:
        headers = {"X_Error_Message": said, "Content_Type": "application/json"}
        if code:
            headers["X_Error_Code"] = code
        self._send(json.dumps({"error": said}).encode(), status, **headers)

    def _commit(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """The commit, or None when an error was sent."""
        hidden = name in self.hub.private and name.partition("/")[0] != self.account
        if name not in self.hub.repos or hidden:
            self._error(401 if not self.account else 404, "Repository not found", "RepoNotFound")
        elif name in self.hub.gated:
            self._error(403, "Access to model is restricted", "GatedRepo")
        elif (found := self.hub.at(name, revision)) is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
        else:
            return found
        return None

    def _may_write(self, name: str) -> bool:
        if name.partition("/")[0] == self.account != "reader":
            return True
        self._error(403, "You don't have the rights to write here")
        return False

    def whoami(self) -> None:
        if self.account:
            self._json({"type": "user", "name": self.account, "orgs": []})
        else:
            self._error(401, "Invalid username or password.")

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization'] or self.account}/{asked['name']}"
        if not self._may_write(name):
            return
        if name in self.hub.repos:
            self._error(409, "You already created this model repo")
            return
        self.hub.put(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(name)
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def branch(self, name: str, branch: str) -> None:
        if not self._may_write(name):
            return
        if branch in self.hub.repos[name]:
            self._error(409, "Reference already exists")
            return
        self.hub.put(name, self.hub.at(name)[1], branch)
        self._json({})

    def info(self, name: str, revision: str | None = None) -> None:
        if (found := self._commit(name, revision or "main")) is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            private = name in self.hub.private
            self._json({"id": name, "sha": found[0], "private": private, "siblings": siblings})

    def validate(self) -> None:
        parts = json.loads(self.body)["content"].split("---\n")
        try:
            wrong = [] if isinstance(yaml.safe_load(parts[1]), dict) else ["no metadata"]
        except (IndexError, yaml.YAMLError) as error:
            wrong = [str(error)]
        answer = {"errors": [{"message": text} for text in wrong], "warnings": []}
        self._send(json.dumps(answer).encode(), 400 if wrong else 200)

    def preupload(self, name: str, revision: str) -> None:
        found = self._may_write(name) and self._commit(name, revision)
        if found:
            files = json.loads(self.body)["files"]
            self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for file in files
                    ]
                }
            )

    def batch(self, name: str) -> None:
        objects = [
            {**x, "actions": {"upload": {"href": f"{self.hub.url}/large/{x['oid']}"}}}
            for x in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.large[oid] = self.body
        self._send(b"")

    def commit(self, name: str, revision: str) -> None:
        found = self._may_write(name) and self._commit(name, revision)
        if not found:
            return
        files = dict(found[1])
        for line in self.body.splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        number = self.hub.put(name, files, revision)
        url = f"{self.hub.url}/{name}/commit/{number}"
        self._json({"success": True, "commitOid": number, "commitUrl": url})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self._commit(name, revision)
        if found is None:
            return
        if path not in found[1]:
            self._error(404, "Entry not found", "EntryNotFound")
            return
        content = found[1][path]
        tag = hashlib.sha256(content).hexdigest()
        self._send(content, X_Repo_Commit=found[0], ETag=f'"{tag}"', Accept_Ranges="none")


_NAME = r"(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.info),
    (rf"POST /api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.branch),
    (rf"POST /api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /large/(?P<oid>\w+)", _Handler.store),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
