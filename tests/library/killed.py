"""Indexes slowly, to be killed: `python tests/library/killed.py PHOTOS STORE LOG SECONDS`.

LOG: there when it has begun; the names of each batch, as soon as it is kept. SECONDS: per photo.
"""

import contextlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax  # noqa: E402

from cir_jax import composers  # noqa: E402
from cir_jax.library import Library, photos  # noqa: E402
from cir_jax.library.store import Store  # noqa: E402
from cir_jax.retrieval.search import Searcher  # noqa: E402
from cir_jax.sharding.mesh import make_mesh  # noqa: E402
from tests import tiny  # noqa: E402

BATCH = 4


def searcher() -> Searcher:
    backbone, params = tiny.backbone()
    slerp = composers.build("slerp", backbone)
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    return Searcher(slerp, {}, {"backbone": params}, mesh=mesh, batch_size=BATCH)


def main(folder: Path, store: Path, log: Path, seconds: float) -> None:
    read, add, indexing = photos.read, Store.add, Store.indexing

    def slow(path, transform):
        time.sleep(seconds)
        return read(path, transform)

    def told(self, encoder, news, vectors):
        add(self, encoder, news, vectors)
        with log.open("a") as file:
            file.write("".join(f"{new.file.path.decode()}\n" for new in news))

    @contextlib.contextmanager
    def begun(self):
        with indexing(self) as alone:
            log.touch()
            yield alone

    photos.read, Store.add, Store.indexing = slow, told, begun
    with Library(folder, searcher(), store=store) as library:
        library.update()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), float(sys.argv[4]))
