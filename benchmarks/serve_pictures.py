"""The page of `cir serve --demo` as a browser shows it: benchmarks/serve.png and serve_narrow.png.

    python benchmarks/serve_pictures.py [--output=benchmarks]

A red star asked to be blue, explained; the same in a window of 400 pixels. Needs Chromium and the
extra `serve`; the pictures differ with the fonts of the machine.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from cir_jax import loading  # noqa: E402
from cir_jax.library import cli  # noqa: E402
from cir_jax.library.serve import command  # noqa: E402
from cir_jax.library.store import Store  # noqa: E402
from tests.browser import Browser  # noqa: E402
from tests.library import serving  # noqa: E402

REFERENCE = "black/solid-red-star_065.png"
QUERY = "text=is+blue&explain=1"


def number(store: Store, path: str) -> int:
    return next(photo.id for photo in store.photos() if photo.path == path.encode())


def picture(browser: Browser, address: str, width: int, height: int, down: str = "") -> Image.Image:
    """A window of that size after the query was answered; scrolled to an element, if one is
    named."""
    browser.resize(width, height)
    for _ in range(2):  # the first one compiles
        browser.open(address)
        browser.until("document.querySelectorAll('#found .tile').length")
        browser.until("!document.querySelector('.busy')")
    browser.until("[...document.images].every(one => one.complete)")
    if down:
        browser.run(f"document.querySelector('{down}').scrollIntoView()")
        browser.until("[...document.images].every(one => one.complete)")
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        browser.screenshot(Path(file.name))
        return Image.open(io.BytesIO(Path(file.name).read_bytes())).convert("RGB")


def save(image: Image.Image, path: Path) -> None:
    """In 256 colours: a picture of a page needs no more, and is a third of the bytes."""
    few = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    args = parser.parse_args()
    searchers = {name: loading.load(name, backbone=cli.DEMO["backbone"]) for name in cli.SERVED}
    with tempfile.TemporaryDirectory() as scratch:
        libraries = command.beside(cli.DEMO["photos"], searchers, Path(scratch, "s.sqlite"))
        with libraries[cli.METHOD] as library, serving.served(libraries) as client:
            library.update()
            browser = Browser(Path(scratch, "profile"))
            address = f"{client.address}/?image=p{number(library.store, REFERENCE)}&{QUERY}"
            save(picture(browser, address, 1120, 830), args.output / "serve.png")
            top, below = (picture(browser, address, 400, 800, d) for d in ("", "#explained"))
            both = Image.new("RGB", (830, 800), "#c3c8ce")
            both.paste(top, (0, 0))
            both.paste(below, (430, 0))
            save(both, args.output / "serve_narrow.png")
            browser.close()


if __name__ == "__main__":
    main()
