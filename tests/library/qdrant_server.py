"""Answers what `cir_jax.library.indexes.qdrant` asks over HTTP, out of qdrant-client's local mode.

No Qdrant: it shows that what is sent is what Qdrant's interface takes, as its client's own models
have it, and that answers are understood; not how well a server searches.
"""

import contextlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

from qdrant_client import QdrantClient, models
from qdrant_client.http.models import models as http_models

KEY = "a secret"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        given = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        assert len(given) < 32 << 20  # a server refuses more
        path = self.path.partition("?")[0]
        status, result = 404, None
        if self.headers.get("api-key") != KEY:
            status = 401
        else:
            for pattern, function in ROUTES.items():
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    body = json.loads(given) if given else {}
                    status, result = 200, function(self.server.client, found[1], body)
        text = json.dumps({"result": plain(result), "status": "ok", "time": 0.0}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = answer

    def log_message(self, *_: Any) -> None:
        pass


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def create(client: QdrantClient, name: str, body: Any) -> bool:
    asked = http_models.CreateCollection(**body)
    return client.create_collection(name, vectors_config=asked.vectors)


def update(client: QdrantClient, name: str, body: Any) -> bool:
    return client.update_collection(name, metadata=http_models.UpdateCollection(**body).metadata)


def done() -> models.UpdateResult:
    return models.UpdateResult(operation_id=0, status=models.UpdateStatus.COMPLETED)


def upsert(client: QdrantClient, name: str, body: Any) -> Any:
    client.upsert(name, http_models.PointsBatch(**body).batch)
    return done()


def delete(client: QdrantClient, name: str, body: Any) -> Any:
    kind = http_models.PointIdsList if "points" in body else http_models.FilterSelector
    client.delete(name, kind(**body))
    return done()


def query(client: QdrantClient, name: str, body: Any) -> Any:
    asked = http_models.QueryRequestBatch(**body).searches
    return client.query_batch_points(name, asked)


def scroll(client: QdrantClient, name: str, body: Any) -> Any:
    asked = http_models.ScrollRequest(**body)
    given = {"limit": asked.limit, "offset": asked.offset, "with_vectors": asked.with_vector}
    points, following = client.scroll(name, **given)
    return {"points": points, "next_page_offset": following}


ROUTES = {
    r"GET /collections/(\w+)/exists": lambda c, name, _: {"exists": c.collection_exists(name)},
    r"GET /collections/(\w+)": lambda c, name, _: c.get_collection(name),
    r"PUT /collections/(\w+)": create,
    r"PATCH /collections/(\w+)": update,
    r"DELETE /collections/(\w+)": lambda c, name, _: c.delete_collection(name),
    r"PUT /collections/(\w+)/points": upsert,
    r"POST /collections/(\w+)/points/delete": delete,
    r"POST /collections/(\w+)/points/query/batch": query,
    r"POST /collections/(\w+)/points/scroll": scroll,
    r"POST /collections/(\w+)/points/count": lambda c, name, _: c.count(name),
}


@contextlib.contextmanager
def served() -> Iterator[str]:
    """Its address, for as long as this lasts."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.client = QdrantClient(":memory:")
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
