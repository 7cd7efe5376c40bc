"""As much of the Hugging Face hub as a push, a download and a stream need, on this machine, for the
real clients: accounts, repositories of models and of datasets with branches, commits of git's and
of large files, `tree`, `resolve` with ranges.

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
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

TOKENS = {"hf_mine": "me", "hf_read": "reader"}
"""Token -> account. `reader` may write nothing."""
LARGE = ".safetensors"
"""What goes the way of large files, as on the hub."""


class Hub:
    """What is on it. repos: name -> branch -> commits, the newest last: (id, {path: bytes}); the
    name of a dataset is "datasets/ORG/NAME". warns: of each request, by its number, which a client
    prints. broken: how many contents break off. sent: bytes of contents."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, list[tuple[str, dict[str, bytes]]]]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.broken = self.sent = 0
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


def use_for_datasets(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, cache: Path, token: str = "hf_mine"
) -> None:
    """`use`, for the package `datasets`, too."""
    use(monkeypatch, hub, cache, token)
    import datasets
    from huggingface_hub import HfFileSystem

    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_DATASETS_CACHE": cache / "datasets",
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    HfFileSystem.clear_instance_cache()  # of other endpoints


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        self.query = parse_qs(urlsplit(self.path).query)
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
        hidden = name in self.hub.private and _owner(name) != self.account
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
        if _owner(name) == self.account != "reader":
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
            name = name.removeprefix("datasets/")
            self._json({"id": name, "sha": found[0], "private": private, "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        """All below a folder, or with `recursive=False` what is right in it."""
        if (found := self._commit(name, revision)) is None:
            return
        start = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for path, content in found[1].items():
            if path.startswith(start):
                parts = path.removeprefix(start).split("/")
                for end in range(1, len(parts)):
                    inner = start + "/".join(parts[:end])
                    entries[inner] = {"type": "directory", "path": inner, "oid": "0", "size": 0}
                entries[path] = _listed(path, content)
        if start and not entries:
            self._error(404, f"{folder} does not exist", "EntryNotFound")
            return
        depth = start.count("/")
        self._json([e for p, e in entries.items() if recursive or p.count("/") == depth])

    def paths_info(self, name: str, revision: str) -> None:
        if (found := self._commit(name, revision)) is not None:
            asked = parse_qs(self.body.decode())["paths"]
            self._json([_listed(path, found[1][path]) for path in asked if path in found[1]])

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
        content, status, headers = found[1][path], 200, {}
        headers = {"X_Repo_Commit": found[0], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.hub.sent += len(content) if self.command == "GET" else 0
        if self.hub.broken and self.command == "GET":
            self.hub.broken -= 1
            headers["Content_Length"] = str(len(content))
            content = content[: len(content) // 2]
            self.close_connection = True
        self._send(content, status, **headers)


def _owner(name: str) -> str:
    return name.removeprefix("datasets/").partition("/")[0]


def _listed(path: str, content: bytes) -> dict[str, object]:
    number = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": number}


_NAME = r"(?P<name>[^/]+/[^/]+)"
_ANY = r"(?P<name>(?:datasets/)?[^/]+/[^/]+)"
_DATASET = r"(?P<name>datasets/[^/]+/[^/]+)"
_ROUTES = (
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.info),
    (rf"GET /api/{_DATASET}", _Handler.info),
    (rf"GET /api/{_DATASET}/revision/(?P<revision>.+)", _Handler.info),
    (rf"GET /api/{_DATASET}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (rf"POST /api/{_DATASET}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    (rf"POST /api/models/{_NAME}/branch/(?P<branch>.+)", _Handler.branch),
    (rf"POST /api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /large/(?P<oid>\w+)", _Handler.store),
    (rf"(?:GET|HEAD) /{_ANY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
