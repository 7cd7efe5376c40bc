"""A query of `cir serve` over 120,000 photos: what comes on top of encoding it.

    python benchmarks/serve.py [--photos=120000] [--dim=512]

The vectors are random, of unit norm, in a store as `cir index` writes it, and no photo's file is
there. The page's queries are sent over HTTP by a client in the same process, all on one core (its
affinity, not a wish), so what the client takes is measured, too. The CLIP is small and random:
what encoding takes is timed by itself, on the same queries, and taken off. Of a query each, after
three that are not timed: the median and the 9th of ten, and the processor's time, which another
load on the core disturbs less:

    both       an uploaded photo and a text, Slerp
    filtered   the same below a folder that has half of the photos, taken since a day
    explained  the same with what the image alone and the text alone would give
    about      what the page asks when it is opened, after the first, which lists the folders

Needs the extra `serve`. Writes benchmarks/serve.json.
"""

import argparse
import contextlib
import http.client
import io
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.library import clocks, vectors  # noqa: E402
from benchmarks.machine import signed  # noqa: E402
from cir_jax import composers  # noqa: E402
from cir_jax.input.images import ImageTransform  # noqa: E402
from cir_jax.input.text import word_tokenizer  # noqa: E402
from cir_jax.library import Library  # noqa: E402
from cir_jax.library.photos import File  # noqa: E402
from cir_jax.library.serve import command  # noqa: E402
from cir_jax.library.store import New  # noqa: E402
from cir_jax.models.backbone import Backbone  # noqa: E402
from cir_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig  # noqa: E402
from cir_jax.retrieval.search import Searcher  # noqa: E402
from cir_jax.sharding.mesh import make_mesh  # noqa: E402

TEXTS = "red blue green star circle heart".split()
K = 24


def searcher(dim: int) -> Searcher:
    """Slerp on a random CLIP of two narrow layers."""
    tokenizer = word_tokenizer(TEXTS, 16)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = TextConfig(
        hidden_size=32, intermediate_size=64, vocab_size=5 + len(TEXTS), max_position_embeddings=16,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id, **layers,
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=32, intermediate_size=64, image_size=32, patch_size=16, **layers
    )
    clip = Clip(ClipConfig(text=text, vision=vision, projection_dim=dim))
    backbone = Backbone(clip, tokenizer, ImageTransform(resize=32, crop=32), weights_id="random")
    params = jax.jit(backbone.init)(jax.random.key(0))
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    return Searcher(composers.build("slerp", backbone), {}, {"backbone": params}, mesh=mesh)


def fill(library: Library, count: int, dim: int) -> None:
    """Half of the photos in 2023/, half in 2024/, each taken in its year."""
    done = 0
    for piece in vectors(count, dim):
        news = []
        for i in range(done, done + len(piece)):
            year = 2023 + 2 * i // count
            file = File(f"{year}/{i % 100:02}/{i:07}.jpg".encode(), 1, 1)
            news.append(New(file, i.to_bytes(16, "big"), f"{year}-05-17T12:00:00", ""))
        library.store.add(library._plain.number, news, piece)
        done += len(piece)


@contextlib.contextmanager
def served(library: Library) -> Iterator[int]:
    """The port of a server in a thread."""
    with contextlib.closing(command.listening("127.0.0.1", 0)) as listening:
        server = command.server({"slerp": library}, "127.0.0.1", "")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


class Client:
    def __init__(self, port: int):
        self._port = port
        self._headers: dict[str, str] = {}
        self._headers = {"x-cir-jax": self.ask("GET", "/api/about")["csrf"]}

    def ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, self._headers)
            answer = connection.getresponse()
            said = json.loads(answer.read())
        assert answer.status in (200, 201), said
        return said


def timed(work: Callable[[int], Any], count: int) -> np.ndarray:
    """[wall, processor]: milliseconds of each of so many calls, after three."""
    took = []
    for i in range(3 + count):
        began = clocks()
        work(i)
        took.append(1000 * (clocks() - began))
    return np.array(took[3:]).T


def spread(took: np.ndarray, *less: np.ndarray) -> dict[str, float]:
    """What is `less` is taken off, median by median, mean by mean."""
    wall, cpu = took
    wall = np.sort(wall) - sum(np.median(one[0]) for one in less)
    return {
        "ms": round(float(np.median(wall)), 1),
        "ms_9_of_10": round(float(wall[int(0.9 * (len(wall) - 1))]), 1),
        "cpu_ms": round(float(cpu.mean() - sum(one[1].mean() for one in less)), 1),
    }


def measure(folder: Path, count: int, dim: int, queries: int) -> dict[str, Any]:
    """Of a library of so many photos in an empty folder."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    with Library(folder, searcher(dim), store=folder / "serve.sqlite") as library:
        fill(library, count, dim)
        with served(library) as port:
            client = Client(port)
            image = client.ask("POST", "/api/pictures", buffer.getvalue())["id"]

            def asked(i: int, **more: Any) -> None:
                query = {"images": [{"id": image}], "text": TEXTS[i % len(TEXTS)], "k": K, **more}
                said = client.ask("POST", "/api/search", json.dumps(query).encode())
                assert len(said["results"]) == K

            composing = library.searcher.composing
            both, image_alone, text_alone = (
                timed(lambda i, one=one: composing.compose(*one(i)), queries)
                for one in (
                    lambda i: (picture, TEXTS[i % 6]),
                    lambda i: (picture, None),
                    lambda i: (None, TEXTS[i % 6]),
                )
            )
            filtered = {"under": "2024", "after": "2024-01-01"}
            return {
                "encoding": spread(both),
                "both": spread(timed(asked, queries), both),
                "filtered": spread(timed(lambda i: asked(i, **filtered), queries), both),
                "explained": spread(
                    timed(lambda i: asked(i, explain=True), queries), both, image_alone, text_alone
                ),
                "about": spread(timed(lambda i: client.ask("GET", "/api/about"), queries // 5)),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=120_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=50, help="that are timed")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "serve.json")
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as scratch:
        for year in ("2023", "2024"):
            Path(scratch, year).mkdir()
        found = measure(Path(scratch), args.photos, args.dim, args.queries)
    report = {
        "photos": args.photos,
        "dim": args.dim,
        "queries": args.queries,
        **found,
        **signed("python benchmarks/serve.py", load, "jax"),
    }
    text = json.dumps(report, indent=1) + "\n"
    args.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
