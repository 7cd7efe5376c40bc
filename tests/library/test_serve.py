"""`cir serve`: what it answers, and what it does not, whoever asks."""

import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks.machine import held_mib
from cir_jax import composers
from cir_jax.composers.compodiff import CompoDiff
from cir_jax.errors import ConfigError
from cir_jax.library import cli
from cir_jax.retrieval.search import Searcher
from cir_jax.sharding.mesh import make_mesh
from tests.launch.binaries import ROOT, environment
from tests.library import serving
from tests.library.folders import fill

serving.installed()

MB = 1_000_000


def png(size, seed=0, **options):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def bomb(width, height, mode=2):
    """A PNG that says to be so large; its pixels never come."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = fill(tmp_path_factory.mktemp("served") / "photos", 12)
    picture = Image.fromarray(np.full((40, 60, 3), (200, 30, 30), np.uint8))
    exif = picture.getexif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    picture.save(where / "turned.jpg", exif=exif, comment=b"at home", icc_profile=b"profile" * 20)
    return where


@pytest.fixture(scope="module")
def searchers(tiny):
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    sizes = {"depth": 1, "heads": 2, "dim_head": 8, "cross_heads": 2}
    compodiff = CompoDiff(tiny[0], **sizes, steps=1, samples_per_query=1)
    params = jax.jit(compodiff.init)(jax.random.key(5))
    frozen = compodiff.freeze(tiny[1])
    made = {"slerp": (composers.build("slerp", tiny[0]), {}), "compodiff": (compodiff, params)}
    return {
        name: Searcher(composer, params, frozen, mesh=mesh, batch_size=4)
        for name, (composer, params) in made.items()
    }


@pytest.fixture(scope="module")
def libraries(folder, searchers):
    from cir_jax.library.serve import command

    made = command.beside(folder, searchers, folder.parent / "s.sqlite")
    with made["slerp"] as library:
        library.update()
        yield made


@pytest.fixture(scope="module")
def page(libraries):
    with serving.served(libraries) as client:
        yield client


@pytest.fixture(scope="module")
def numbers(libraries):
    """Name of a photo -> its id."""
    return {
        os.path.basename(p.path).decode(): f"p{p.id}" for p in libraries["slerp"].store.photos()
    }


@pytest.fixture
def alive(page):
    """After whatever happened: it answers, and there is nothing left to wait for."""
    yield
    assert page.search(text="a red star", k=3)[0] == 200


def refused(answer, status, *words):
    """A status, and a sentence."""
    assert answer[0] == status, answer
    said = answer[2]["error"]
    assert said[-1] in ".?" and len(said) > 15 and "Traceback" not in said, said
    for word in words:
        assert word in said, said
    return answer


def test_it_answers_as_the_library_does(page, libraries, numbers, folder):
    status, _, said = page.search(text="make it red", images=[{"id": numbers["03.png"]}], k=5)
    found = libraries["slerp"].search(folder / "2024" / "03.png", "make it red", k=5)
    assert status == 200 and [r["path"] for r in said["results"]] == [
        str(path.relative_to(folder)) for path, _ in found
    ]
    np.testing.assert_allclose([r["score"] for r in said["results"]], [s for _, s in found], 1e-4)
    assert [r["id"] for r in said["results"]] == [numbers[p.name] for p, _ in found]
    assert "2024/03.png" not in {r["path"] for r in said["results"]}


def test_methods_share_the_vectors_and_the_parameters(libraries):
    one, other = libraries.values()
    assert one.store is other.store and one._index(False) is other._index(False)
    ours, theirs = (jax.tree.leaves(x.searcher.frozen["backbone"]) for x in (one, other))
    assert all(a is b for a, b in zip(ours, theirs, strict=True))


def test_every_control_arrives(page, libraries, numbers, monkeypatch):
    seen = []
    for library in libraries.values():
        monkeypatch.setattr(library, "search", lambda **asked: seen.append(asked) or found())
    image = {"id": numbers["03.png"]}
    page.search(method="slerp", images=[image, image | {"weight": -0.5}], text="red",
                negative=["star"], controls={"alpha": 0.33}, under="2024", after="2024-05",
                min_score=0.2, k=7)  # fmt: skip
    assert len(seen[0].pop("images")) == 2
    assert seen[0] == {
        "text": "red", "negative": ["star"], "weights": [1, -0.5], "under": "2024", "alpha": 0.35,
        "after": "2024-05", "min_score": 0.2, "k": 7,
    }  # fmt: skip
    page.search(method="compodiff", images=[image], controls={"text_weight": 3, "steps": 5})
    own = libraries["compodiff"].composer.guidance[0]
    assert seen[1]["guidance"] == (own, 3) and seen[1]["steps"] == 5
    about = page.get("/api/about")[2]
    assert {m["name"]: sorted(m["controls"]) for m in about["methods"]} == {
        "slerp": ["alpha"],
        "compodiff": ["image_weight", "noised_reference", "samples_per_query", "seed",
                      "source_mixing", "steps", "text_weight"],
    }  # fmt: skip
    assert ["mask" in m["takes"] for m in about["methods"]] == [False, True]


def found():
    from cir_jax.library.library import Results

    return Results()


def test_what_a_query_may_not_say(page, numbers, alive):
    refused(page.search(text=""), 400, "an empty query")
    refused(page.search(text="a", method="clip"), 400, "expected one of slerp, compodiff")
    refused(page.search(text="a", weird=1), 400, "no 'weird'")
    refused(page.search(text="a", k=10**6), 400, "expected 1 to 200")
    refused(page.search(text="a" * 5000), 400, "at most 2000")
    refused(page.search(text=5), 400, "expected a text")
    refused(page.search(text="a", under="/etc"), 400, "no folder of photos")
    refused(page.search(text="a", under="../.."), 400, "no folder of photos")
    refused(page.search(text="a", after="soon"), 400, "expected a day")
    refused(page.search(text="a", images=[{"id": "p1"}] * 9), 400, "too many")
    refused(page.search(text="a", controls={"steps": 5}), 400, "Slerp takes no steps", "compodiff")
    refused(page.search(text="a", controls={"steps": 10**7}, method="compodiff"), 400, "one of")
    refused(page.search(text="a", controls={"alpha": 1e400}), 400, "no JSON")
    refused(page.search(text="a", controls={"alpha": True}), 400, "a number")
    refused(page.search(text="a", controls={"epsilon": 1}), 400, "no control")
    refused(page.search(text="a", mask="u" + "0" * 32), 400, "Give one")
    refused(page.search(text="a", under="\ud800"), 400, "no folder of photos")
    refused(page.search(text="a", **{"\ud800": 1}), 400, "a query has no")
    refused(page.search(text="a", images=[{"id": "\ud800"}]), 404, "by id")
    assert page.search(text="\ud800 red\0")[0] == 200
    for body in (b"", b"{", b"[1]", b'{"k": NaN}', b"[" * 90_000, b"\xff\xfe"):
        refused(page.post("/api/search", body), 400, "no JSON")
    refused(page.post("/api/search", b" " * 200_000), 413, "at most 100,000 bytes")


def test_pictures_are_named_by_id_alone(page, libraries, alive):
    library = libraries["slerp"]
    root = str(library.folder)
    for name in (
        f"{root}/00.png", "00.png", "../s.sqlite", "file:///etc/passwd", "p0", "p-1", "p1/../p2",
        "http://127.0.0.1:1/a.png", "p99999", "p1\0", "p" + "9" * 30, "u" + "0" * 32, "",
    ):  # fmt: skip
        refused(page.search(text="a", images=[{"id": name}]), 404)
    for given in ("p1", 1, None, {"url": "http://a/b.png"}, {"id": 3}):
        refused(page.search(text="a", images=[given]), 400, "by id")
    for path in (
        "/pictures/..%2f..%2fetc%2fpasswd/small", "/pictures/p1/huge", "/pictures/../../etc/passwd",
        "/etc/passwd", "/page.py", "/..%2fapp.py", "//etc/passwd", "/pictures/p99999/small",
    ):  # fmt: skip
        refused(page.get(path), 404)


def test_no_link_is_followed(page, libraries, folder, tmp_path, alive):
    """Photos that became links, in a folder that became one, or pipes, after they were indexed."""
    (tmp_path / "secret.png").write_bytes(png((20, 20)))
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "b.png").write_bytes(png((20, 20), 2))
    names = ["a.png", "album/b.png", "c.png", "d.png"]
    (folder / "album").mkdir()
    for seed, name in enumerate(names):
        (folder / name).write_bytes(png((20, 20), seed + 10))
    library = libraries["slerp"]
    library.update()
    known = {os.fsdecode(photo.path): photo.id for photo in library.store.photos()}
    ids = [f"p{known[name]}" for name in names]
    assert {page.get(f"/pictures/{i}/small")[0] for i in ids} == {200}
    for name in names:
        (folder / name).unlink()
    (folder / "album").rmdir()
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    (folder / "album").symlink_to(tmp_path / "album")
    os.mkfifo(folder / "c.png")
    try:
        for number in ids:
            refused(page.get(f"/pictures/{number}/small"), 404, "this photo cannot be read")
            refused(page.search(text="a", images=[{"id": number}]), 404, "cannot be read")
    finally:
        for name in ("a.png", "album", "c.png"):
            (folder / name).unlink()
        library.update()
    refused(page.get(f"/pictures/{ids[0]}/small"), 404, "gone from the library")


def test_thumbnails_are_turned_and_say_nothing_else(page, numbers):
    status, headers, data = page.get(f"/pictures/{numbers['turned.jpg']}/small")
    shown = Image.open(io.BytesIO(data))
    assert status == 200 and headers["content-type"] == "image/jpeg" and shown.size == (40, 60)
    assert not shown.getexif() and not {"icc_profile", "comment", "exif"} & set(shown.info)
    assert b"camera" not in data and b"home" not in data and headers["cache-control"] != "no-store"


def test_an_upload_is_asked_with_by_its_id(page, libraries, folder, alive):
    content = (folder / "2024" / "03.png").read_bytes()
    status, _, said = page.post("/api/pictures", content)
    assert status == 201 and said["id"][0] == "u" and (said["width"], said["height"]) == (20, 20)
    paths = {r["path"] for r in page.search(images=[{"id": said["id"]}], k=50)[2]["results"]}
    assert paths and "2024/03.png" not in paths  # it is the same photo
    assert Image.open(io.BytesIO(page.get(f"/pictures/{said['id']}/large")[2])).size == (20, 20)


def test_uploads_that_are_no_pictures(page, alive):
    before = held_mib("VmRSS")
    for content, words in (
        (b"", "no format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) show\n", "no format"),
        (b"P6 30000 30000 255\n", "no format"),
        (png((20, 20))[:-30], "not a readable image"),
        (bomb(60_000, 60_000), "3600 megapixels"),
        (bomb(9_000, 9_000), "at most 64 megapixels"),
        (bomb(2_000_000, 1), "the longest side"),
        (bomb(5_000, 5_000), "not a readable image"),
    ):
        refused(page.post("/api/pictures", content), 400, words)
    assert held_mib("VmRSS") - before < 150


def test_several_images_are_bounded_together(page, monkeypatch, alive):
    from cir_jax.library.serve import questions

    ids = [{"id": page.post("/api/pictures", png((30, 30), i))[2]["id"]} for i in range(3)]
    monkeypatch.setattr(questions, "MEGAPIXELS", 0.002)
    assert page.search(text="a", images=ids[:2])[0] == 200
    refused(page.search(text="a", images=ids), 400, "0.0027 megapixels together; at most 0.002")


def test_bodies_are_bounded(page, alive):
    before = held_mib("VmRSS")
    refused(page.post("/api/pictures", bytes(100 * MB)), 413, "at most 20 MB")
    endless = (bytes(MB) for _ in range(100))  # in chunks, without a length
    refused(page.post("/api/pictures", endless), 413, "at most 20 MB")
    assert held_mib("VmRSS") - before < 200
    headers = f"POST /api/pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nx-cir-jax: {page.csrf}\r\n"
    assert b" 400 " in page.raw(f"{headers}Content-Length: -5\r\n\r\n".encode())
    assert b" 400 " in page.raw(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nx: " + b"a" * 10**6)
    assert b" 400 " in page.raw(b"\0" * 100 + b"\r\n\r\n")


def test_uploads_that_are_forgotten(page, monkeypatch):
    from cir_jax.library.serve import pictures

    kept = pictures.Kept(100)
    for i in range(20):
        kept.put(i, bytes(30))
    kept.get(18)
    kept.put(20, bytes(60))
    assert [i for i in range(21) if kept.get(i)] == [18, 20]
    kept.put(21, bytes(1000))
    assert not any(map(kept.get, range(22)))


def test_other_hosts_and_other_sites(page, alive):
    for host in ("evil.example", "evil.example:8317", "127.0.0.1.evil.example", "", "192.168.1.5"):
        refused(page.get("/", host=host), 421, "this server is not")
    assert b" 400 " in page.raw(b"GET / HTTP/1.1\r\nHost: a\r\nHost: 127.0.0.1\r\n\r\n")
    for host in ("localhost:9000", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert page.get("/", host=host)[0] == 200
    for path in ("/", "/api/about", "/pictures/p1/small", "/page.js"):
        refused(page.get(path, origin="http://evil.example"), 403, "another site")
        refused(page.get(path, origin="null"), 403, "another site")
        refused(page.get(path, **{"sec-fetch-site": "cross-site"}), 403, "another site")
        assert page.get(path, **{"sec-fetch-site": "same-origin"})[0] == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert page.get("/?text=a", **link)[0] == 200
    refused(page.get("/api/about", **link), 403)
    assert page.post("/api/search", {"text": "a"}, origin=page.address)[0] == 200


def test_posts_need_what_only_the_page_has_read(page, alive):
    for headers in ({}, {"x-cir-jax": ""}, {"x-cir-jax": "guess"}, {"x-cir-jax": "\xe9"}):
        for path in ("/api/search", "/api/pictures"):
            refused(page.ask("POST", path, b"{}", headers), 403, "load it again")
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        refused(page.ask(method, "/api/search", None, {"x-cir-jax": page.csrf}), 405)
    refused(page.get("/api/search"), 405)
    refused(page.post("/", b""), 405)


def test_every_answer_keeps_others_out(page, numbers):
    for path in ("/", "/page.js", "/api/about", "/nothing", f"/pictures/{numbers['00.png']}/small"):
        _, headers, _ = page.get(path, origin=page.address)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert not [name for name in headers if name.lower().startswith("access-control")]
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["referrer-policy"] == "no-referrer" and headers["x-frame-options"] == "DENY"


def test_queries_queue_and_then_are_refused(page, libraries, monkeypatch, alive):
    at_once, most, lock, real = [0], [0], threading.Lock(), libraries["slerp"].search

    def slow(**asked):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.05)
        with lock:
            at_once[0] -= 1
        return real(**asked)

    monkeypatch.setattr(libraries["slerp"], "search", slow)
    page.csrf  # noqa: B018
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: page.search(text="a red star", k=3), range(50)))
    done = [answer for answer in answers if answer[0] == 200]
    assert most[0] == 1 and len(done) >= 5
    for answer in answers:
        if answer not in done:
            refused(answer, 429, "too many queries at once")
            assert answer[1]["retry-after"] == "1"
    assert len(done) < 50


def test_bodies_that_wait_are_not_held(page, alive):
    """50 uploads of 15 MB at once: few are read, the others are refused."""
    before = held_mib("VmRSS")
    content, csrf = bytes(15 * MB), page.csrf

    def upload(_):
        try:
            return page.ask("POST", "/api/pictures", content, {"x-cir-jax": csrf})
        except OSError:  # told so while it was still sending
            return 429, {}, {"error": "too many uploads at once."}

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(upload, range(50)))
    assert {answer[0] for answer in answers} == {400, 429}
    assert held_mib("VmRSS") - before < 400


def test_an_accident_is_a_sentence(page, libraries, monkeypatch, alive):
    def fail(**_):
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(libraries["slerp"], "search", fail)
        answer = refused(page.search(text="a"), 500, "RuntimeError")
        assert "secret" not in str(answer[2])


def test_a_client_that_goes_leaves_no_turn_taken(page, alive):
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", page.port)) as opened:
            head = f"POST /api/pictures HTTP/1.1\r\nHost: localhost\r\nx-cir-jax: {page.csrf}\r\n"
            opened.sendall(f"{head}Content-Length: 1000\r\n\r\nabc".encode())
    time.sleep(0.1)
    assert page.post("/api/pictures", png((10, 10)))[0] == 201


def test_a_token_is_asked_for(libraries):
    token = "a-token-of-24-letters-or-so"
    with serving.served(libraries, host="0.0.0.0", token=token) as client:
        for path in ("/", "/page.js", "/api/about", "/pictures/p1/small"):
            refused(client.get(path), 401, "wants its token")
            refused(client.get(path, cookie="cir_jax_session=guess"), 401)
            refused(client.get(path, cookie=f"cir_jax_session={token}"), 401)
        refused(client.get("/?token=wrong"), 401, "the token is wrong")
        refused(client.get("/api/about?token=" + token), 401)
        status, headers, _ = client.get(f"/?token={token}")
        cookie = headers["set-cookie"]
        assert status == 303 and headers["location"] == "/" and token not in cookie
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        session = {"cookie": f"other=1; {cookie.split(';')[0]}"}
        status, _, about = client.get("/api/about", **session)
        assert status == 200
        post = session | {"x-cir-jax": about["csrf"]}
        assert client.ask("POST", "/api/search", {"text": "a"}, post)[0] == 200
        refused(client.ask("POST", "/api/search", {"text": "a"}, session), 403)
        assert client.get("/api/about", host="192.168.1.5:80", **session)[0] == 200
        refused(client.get("/api/about", host="evil.example", **session), 421)


def test_where_it_listens():
    from cir_jax.library.serve import command

    for host in ("0.0.0.0", "::", "192.168.1.5", "myhost"):
        with pytest.raises(ConfigError, match="others can reach it.*Add --token"):
            command.checked_token(host, None)
    assert {command.checked_token(host, None) for host in ("127.0.0.1", "localhost", "::1")} == {""}
    assert len(command.checked_token("0.0.0.0", "")) >= 32
    with pytest.raises(ConfigError, match="at least 16 ASCII characters, here are 5"):
        command.checked_token("0.0.0.0", "short")
    with pytest.raises(ConfigError, match="--port=99999: expected"):
        command.listening("127.0.0.1", 99999)
    with command.listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port={port}: cannot be listened on.*--port=0"):
            command.listening("127.0.0.1", port)
    assert command.address("::1", 80, "t") == "http://[::1]:80/?token=t"


def test_the_command_from_another_directory(folder, tmp_path):
    """As a user starts it, without a terminal, and ends it."""
    command = [sys.executable, "-m", "cir_jax.library.cli", "serve", "photos", "--demo", "--port=0",
               "--token", "--method=slerp", "--method=text_only"]  # fmt: skip
    env = environment(tmp_path) | {"CIR_JAX_LIBRARY": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    with subprocess.Popen(
        command,
        cwd=folder.parent,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            address = process.stdout.readline().strip()
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/\?token=[\w-]{32})", address)
            assert found, (address, process.poll() is not None and process.stderr.read())
            client = serving.Client(int(found[1]))
            status, headers, _ = client.get(found[2])
            session = {"cookie": headers["set-cookie"].split(";")[0]}
            about = client.get("/api/about", **session)[2]
            assert [one["name"] for one in about["methods"]] == ["slerp", "text_only"]
            post = session | {"x-cir-jax": about["csrf"]}
            said = client.ask("POST", "/api/search", {"text": "a red star", "k": 3}, post)[2]
            assert len(said["results"]) == 3
            process.send_signal(signal.SIGTERM)  # ends it as Ctrl-C does
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "") and "Traceback" not in err, err
    assert "13 photos: 13 new" in err and "token" not in err


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    assert cli.main(["serve", "--demo"]) == 2
    assert "pip install 'cir_jax[serve]'" in capsys.readouterr().err
