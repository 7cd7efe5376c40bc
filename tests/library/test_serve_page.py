"""The page of `cir serve` in a browser: what a person does there, and what the library is asked."""

import io
import os
from urllib.parse import parse_qs, urlsplit

import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

from cir_jax import composers
from cir_jax.composers.compodiff import CompoDiff
from cir_jax.library import photos
from cir_jax.retrieval.search import Searcher
from cir_jax.sharding.mesh import make_mesh
from tests.browser import Browser
from tests.library import serving

serving.installed()

SIZE = (600, 400)
TOLD = "document.querySelector('#said').textContent"
LOADED = "[...document.images].every(one => one.complete && (one.naturalWidth || !one.src))"
HOSTILE = '<img src=x onerror=alert(1)> "&.png'


def picture(seed, size=SIZE):
    """Two rectangles on a ground, as PNG: much to tell apart, little to encode."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(map(int, rng.integers(0, 255, 3))))
    for _ in range(2):
        x, y = (int(rng.integers(0, side // 2)) for side in size)
        colour = tuple(map(int, rng.integers(0, 255, 3)))
        ImageDraw.Draw(image).rectangle([x, y, x + 200, y + 150], colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def libraries(tiny, scratch):
    from cir_jax.library.serve import command

    folder = scratch / "photos"
    (folder / "2024").mkdir(parents=True)
    for i in range(11):
        (folder / ("2024" if i % 2 else ".") / f"{i:02}.png").write_bytes(picture(i))
    (folder / HOSTILE).write_bytes(picture(99))
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    sizes = {"depth": 1, "heads": 2, "dim_head": 8, "cross_heads": 2}
    compodiff = CompoDiff(tiny[0], **sizes, steps=1, samples_per_query=1)
    params = jax.jit(compodiff.init)(jax.random.key(5))
    frozen = compodiff.freeze(tiny[1])
    made = {"slerp": (composers.build("slerp", tiny[0]), {}), "compodiff": (compodiff, params)}
    searchers = {
        name: Searcher(composer, params, frozen, mesh=mesh, batch_size=4)
        for name, (composer, params) in made.items()
    }
    libraries = command.beside(folder, searchers, scratch / "s.sqlite")
    with libraries["slerp"] as library:
        library.update()
        yield libraries


@pytest.fixture(scope="module")
def server(libraries):
    with serving.served(libraries) as client:
        yield client


@pytest.fixture(scope="module")
def tab(scratch, server):
    browser = Browser(scratch / "profile")
    yield browser
    browser.close()


@pytest.fixture
def page(tab, server, asked):
    """A fresh page; afterwards nothing was wrong in it, and no request went anywhere else."""
    tab.resize(1200, 1000)
    tab.open(f"{server.address}/")
    tab.until("document.querySelector('#library').textContent")
    yield tab
    assert tab.complaints(f"{server.address}/") == []
    sent = [one for one in tab.events if one["method"] == "Network.requestWillBeSent"]
    assert any(one["params"]["request"]["url"].endswith("/page.js") for one in sent)


@pytest.fixture
def asked(libraries, monkeypatch):
    """What the library is asked, in order."""
    seen = []
    for name, library in libraries.items():

        def spy(*image, name=name, real=library.search, **given):
            seen.append({"method": name, **given})
            return real(*image, **given)

        monkeypatch.setattr(library, "search", spy)
    return seen


def settled(page):
    page.until(f"/^(No photo|[0-9]+ photo).* ms/.test({TOLD}) && {LOADED}")


def tiles(page):
    return page.run("[...document.querySelectorAll('#found [data-id] img')].map(i => i.alt)")


def where(page):
    return parse_qs(urlsplit(page.run("location.href")).query)


def test_a_text_and_then_a_reference_and_back(page, asked, libraries):
    page.click("#text")
    page.press(*"a red star", "Enter")
    settled(page)
    assert asked[-1]["text"] == "a red star" and where(page) == {"text": ["a red star"]}
    library = libraries["slerp"]
    first = [str(p.relative_to(library.folder)) for p, _ in library.search(text="a red star", k=24)]
    assert tiles(page) == first and len(first) == 12 and HOSTILE in first
    page.run("document.activeElement.blur()")
    page.press("ArrowRight", "ArrowRight", "r")  # the second one
    settled(page)
    (number,) = where(page)["image"]
    assert asked[-1]["images"] == [(library.folder / first[1]).read_bytes()]
    assert first[1] not in tiles(page) and f"/pictures/{number}/large" in page.run(
        "document.querySelector('.reference img').src"
    )
    second = tiles(page)
    page.run("history.back()")
    page.until("location.search === '?text=a+red+star' && !document.querySelector('.reference')")
    settled(page)
    assert tiles(page) == first
    page.run("history.forward()")
    page.until("document.querySelector('.reference')")
    settled(page)
    assert tiles(page) == second
    page.open(page.run("location.href"))  # as somebody who was sent the address
    page.until("document.querySelectorAll('#found .tile').length")
    settled(page)
    assert (
        tiles(page) == second and page.run("document.querySelector('#text').value") == "a red star"
    )


def test_dropped_pasted_and_chosen(page, asked, scratch):
    files = []
    for i, name in enumerate(("dropped", "pasted", "chosen")):
        files.append(scratch / f"{name}.png")
        files[-1].write_bytes(picture(200 + i))
    page.drop(files[:1], 700, 600)
    page.until("document.querySelectorAll('.reference').length === 1")
    data = list(files[1].read_bytes())
    page.run(
        "(() => { const data = new DataTransfer(); data.items.add(new File([new Uint8Array("
        f"{data})], 'pasted.png', {{type: 'image/png'}})); document.body.dispatchEvent("
        "new ClipboardEvent('paste', {clipboardData: data, bubbles: true})); })()"
    )
    page.until("document.querySelectorAll('.reference').length === 2")
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=node, files=[str(files[2])])
    page.until("document.querySelectorAll('.reference').length === 3")
    page.choose(".reference:nth-child(2) input", -0.5)
    page.click("#search")
    settled(page)
    assert asked[-1]["images"] == [file.read_bytes() for file in files]
    assert asked[-1]["weights"] == [1, -0.5, 1]
    assert "approximate: 3 images are composed one by one" in page.run(TOLD)
    ids = [f"u{photos.digest(file.read_bytes()).hex()}" for file in files]
    assert where(page)["image"] == [ids[0], f"{ids[1]}:-0.5", ids[2]]
    page.click(".reference:nth-child(1) button")
    page.until("document.querySelectorAll('.reference').length === 2")
    (scratch / "no.png").write_bytes(b"no picture")
    page.drop([scratch / "no.png"], 700, 600)
    page.until("document.querySelector('#taken').textContent.includes('of no format')")
    # the browser tells of a refusal in its console; nothing else was wrong
    page.events[:] = [e for e in page.events if "400" not in str(e.get("params", ""))]


def test_a_drop_of_an_address_fetches_nothing(page):
    page.run(
        "(() => { const data = new DataTransfer(); data.setData('text/uri-list', "
        "'http://evil.example/a.png'); document.body.dispatchEvent(new DragEvent('drop', "
        "{dataTransfer: data, bubbles: true, cancelable: true})); })()"
    )
    page.until("document.querySelector('#taken').textContent.includes('not fetched')")
    assert not page.run("document.querySelectorAll('.reference').length")


def test_a_mask_arrives_as_it_was_drawn(page, asked, scratch):
    file = scratch / "masked.png"
    file.write_bytes(picture(300))
    page.choose("#method", "compodiff")
    page.run("document.querySelector('#method').dispatchEvent(new Event('change'))")
    page.drop([file], 700, 600)
    page.until("document.querySelector('.mask')")
    page.run("document.activeElement.blur()")
    page.press("m")
    page.until("document.querySelector('#masking').open")
    x, y, width, height = page.run(
        "(() => { const r = document.querySelector('#mask').getBoundingClientRect(); "
        "return [r.x, r.y, r.width, r.height]; })()"
    )
    scale = width / SIZE[0]
    assert height == pytest.approx(SIZE[1] * scale, abs=1)
    brush = page.run("+document.querySelector('#width').value") / scale

    def stroke(*points):
        page.drag([(x + a * scale, y + b * scale) for a, b in points])

    expected = Image.new("1", SIZE)
    drawn = ImageDraw.Draw(expected)

    def line(points, fill):
        drawn.line(points, fill, round(brush))
        for a, b in points:
            r = brush / 2
            drawn.ellipse([a - r, b - r, a + r, b + r], fill)

    stroke((100, 100), (400, 100), (400, 300))
    stroke((60, 350), (200, 350))  # is taken back
    page.click("#undo")
    stroke((500, 60), (540, 60))
    page.click("#erase")
    stroke((380, 200), (420, 200))
    line([(100, 100), (400, 100), (400, 300)], 1)
    line([(500, 60), (540, 60)], 1)
    line([(380, 200), (420, 200)], 0)
    page.click("#done")
    page.until("!document.querySelector('#masking').open")
    settled(page)
    received = np.asarray(asked[-1]["mask"])
    assert received.shape == SIZE[::-1] and set(np.unique(received)) == {0, 255}
    assert near(received > 0, np.asarray(expected), 2) and where(page)["mask"][0][0] == "u"
    page.click(".mask")  # what was drawn is there, and can be cleared
    page.until("document.querySelector('#masking').open")
    assert not page.run("document.querySelector('#undo').disabled")
    page.click("#clear")
    assert page.run("document.querySelector('#done').disabled")
    page.press("Escape")
    page.until("!document.querySelector('#masking').open")
    page.click(".mask + button")
    settled(page)
    page.until("!location.search.includes('mask')")
    assert "mask" not in asked[-1]


def near(a, b, pixels):
    """Whether the edges of two regions are nowhere farther apart."""

    def grown(mask):
        out = np.zeros_like(mask)
        for dy in range(-pixels, pixels + 1):
            for dx in range(-pixels, pixels + 1):
                out |= np.roll(mask, (dy, dx), (0, 1))
        return out

    return not (a & ~grown(b)).any() and not (b & ~grown(a)).any()


def test_controls_are_those_of_the_method(page, asked):
    assert page.run("[...document.querySelectorAll('#controls [name]')].map(e => e.name)") == [
        "alpha"
    ]
    page.choose("#text", "red")
    page.choose("[name=alpha]", 0.3)
    page.choose("#negative", "star")
    page.choose("#under", "2024")
    page.choose("#min_score", -1)
    page.choose("#after", "2001-02-03")
    page.choose("#k", 3)
    page.click("#search")
    settled(page)
    # without an image, Slerp's share of the text is told to the library all the same
    assert asked[-1] == {
        "method": "slerp", "text": "red", "negative": ["star"], "images": [], "weights": None,
        "under": "2024", "after": "2001-02-03", "k": 3, "min_score": -1, "alpha": 0.3,
    }  # fmt: skip
    assert len(tiles(page)) == 3 and all(name.startswith("2024/") for name in tiles(page))
    there = page.run("location.href")
    page.choose("#method", "compodiff")
    page.run("document.querySelector('#method').dispatchEvent(new Event('change'))")
    page.until("location.search.includes('method=compodiff')")
    settled(page)
    assert asked[-1]["method"] == "compodiff" and "alpha" not in asked[-1]
    names = page.run("[...document.querySelectorAll('#controls [name]')].map(e => e.name)")
    assert names[:2] == ["image_weight", "text_weight"] and "alpha" not in names
    page.open(there)
    page.until("document.querySelectorAll('#found .tile').length")
    assert page.run("document.querySelector('[name=alpha]').value") == "0.3"
    assert page.run("document.querySelector('#filters').open")
    page.click("#reset")
    assert where(page) == {} and not tiles(page)


def test_explained(page, libraries, asked):
    library = libraries["slerp"]
    number = next(p.id for p in library.store.photos() if p.path == b"2024/03.png")
    page.open(page.run(f"location.origin + '/?image=p{number}&text=red&explain=1'"))
    page.until("!document.querySelector('#explained').hidden")
    settled(page)
    reference = library.folder / "2024" / "03.png"
    found = library.search(reference, "red", k=24, explain=True)
    shown = page.run(
        "[...document.querySelectorAll('#explained ol')].map(ol => "
        "[...ol.querySelectorAll('img')].map(i => i.alt))"
    )
    for name, paths in zip(("image", "text"), shown, strict=True):
        numbers = [n for n, _ in found.explained[name].found][:8]
        assert [os.fsencode(path) for path in paths] == library.store.paths(numbers)
    first = page.run("document.querySelector('#found .tile p').textContent")
    ranks = [found.explained[name].ranks[0] for name in ("image", "text")]
    assert f"image {ranks[0]} text {ranks[1]}" in first
    page.run("document.activeElement.blur()")
    page.press("e")
    page.until("document.querySelector('#explained').hidden")


def test_it_fits_a_narrow_window_and_a_keyboard(page):
    page.resize(400, 800)
    page.open(page.run("location.origin + '/?text=red'"))
    page.until("document.querySelectorAll('#found .tile').length")
    settled(page)
    assert page.run("document.documentElement.scrollWidth") <= 400
    narrow = page.run(
        "[...document.querySelectorAll('button, input, select, textarea')].filter(one => "
        "one.offsetParent && one.getBoundingClientRect().right > 400).length"
    )
    assert narrow == 0
    page.press("ArrowRight", "Enter")
    page.until("document.querySelector('#large').open")
    caption = page.run("document.querySelector('#caption').textContent")
    page.press("ArrowRight")
    assert page.run("document.querySelector('#caption').textContent") != caption
    assert page.run("document.documentElement.scrollWidth") <= 400
    page.press("Escape")
    page.until("!document.querySelector('#large').open")
    page.press("/")
    assert page.run("document.activeElement.id") == "text"
    page.press("Escape", "?")
    page.until("document.querySelector('#keys').open")


def test_a_server_that_was_started_anew_or_is_gone(page, libraries, server):
    with serving.served(libraries) as first:
        page.open(f"{first.address}/?text=red")
        page.until("document.querySelectorAll('#found .tile').length")
    page.click("#search")
    page.until(f"{TOLD}.includes('is `cir serve` still running')")
    with serving.served(libraries, port=first.port):  # at the same place, with another number
        page.click("#search")
        settled(page)
    assert any("ERR_CONNECTION_REFUSED" in str(one) for one in page.complaints(f"{first.address}/"))
    page.open(f"{server.address}/")
