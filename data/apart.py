"""Builds tables in a process of their own, beside those that this process builds."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def building(dataset: str, tables: Sequence[str], data_dir: Path) -> Iterator[None]:
    """Another process builds these tables during the block, which ends when it has ended.

    What it could not build is not there then; build it here for the reason. If the block fails, it
    is stopped. If this process is killed, it goes on, and whoever wants its tables waits for it.
    """
    names = ", ".join(f"{dataset}/{table}" for table in tables)
    print(f"building {names} in another process meanwhile", file=sys.stderr, flush=True)
    # its bars would be written over ours
    process = subprocess.Popen(
        [sys.executable, "-m", "data.apart", dataset, ",".join(tables), str(data_dir)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
        if process.poll() is None:
            print(f"waiting for {names}", file=sys.stderr, flush=True)
            process.wait()
    finally:
        process.terminate()
        process.wait()


def main(dataset: str, tables: str, data_dir: str) -> None:
    from data import build

    build.prepare(dataset, tables.split(","), data_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
