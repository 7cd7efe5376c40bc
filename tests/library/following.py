"""Brings a FAISS file up to date: `python tests/library/following.py STORE FILE LOG SECONDS`.

LOG: "writing" when the file is written, but for its name. SECONDS: until it gets that, too.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cir_jax.library.indexes import faiss_ivf, ladder  # noqa: E402
from cir_jax.library.indexes.faiss_ivf import Faiss  # noqa: E402
from cir_jax.library.store import Store  # noqa: E402
from cir_jax.library.vectors import Vectors  # noqa: E402


def main(store: Path, path: Path, log: Path, seconds: float) -> None:
    write_atomically = faiss_ivf.write_atomically

    def slowly(path, write):
        def written(file):
            write(file)
            file.flush()
            log.write_text("writing")
            time.sleep(seconds)

        write_atomically(path, written)

    faiss_ivf.write_atomically = slowly
    vectors = Vectors(Store(store), 1)
    ladder.follow(Faiss(path, vectors.of, print), vectors)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), float(sys.argv[4]))
