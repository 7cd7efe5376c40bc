"""The command `cir`, on the embedded world: what goes where, and exit statuses."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

import cir_jax
from cir_jax import loading
from cir_jax.library import cli, library
from cir_jax.library.library import Library
from cir_jax.library.store import Store
from cir_jax.weights import files
from data.shapes import photos as world
from tests.launch.binaries import ROOT, environment

SHIPPED = ROOT / "data" / "shapes" / "photos"
load = functools.cache(loading.load)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def folder(scratch):
    """Two of the shipped folders, 48 photos or so."""
    for name in ("navy", "olive"):
        shutil.copytree(SHIPPED / name, scratch / "photos" / name)
    return scratch / "photos"


@pytest.fixture
def run(folder, scratch, monkeypatch, capsys):
    """Runs `cir` in the folder above the photos: (status, stdout, stderr)."""
    monkeypatch.setattr(loading, "load", lambda method, **how: load(method, **how))
    monkeypatch.setenv("CIR_JAX_LIBRARY", str(scratch / "stores"))
    monkeypatch.chdir(scratch)

    def run(*argv):
        try:
            status = cli.main([*map(str, argv), "--demo"])
        except SystemExit as ended:  # argparse
            status = ended.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_index_says_what_is_new(run, folder):
    status, out, err = run("index", "photos")
    count = len(list(folder.rglob("*.png")))
    assert (status, out, err) == (0, f"{count} photos: {count} new\n", "")
    assert run("index", "photos") == (0, f"{count} photos: nothing new\n", "")


def test_results_alone_are_on_stdout(run, folder):
    reference = next((folder / "navy").iterdir())
    asked = ("search", "photos", "--text", "a red star", "-n", "3")
    (folder / "navy" / "broken.png").write_bytes(b"no image")
    status, out, err = run(*asked)
    assert status == 0 and re.fullmatch(r"(0\.\d{3}\tphotos/\w+/[\w-]+\.png\n){3}", out)
    assert re.search(r"left out: .*/photos/navy/broken.png: not a readable image", err)
    assert "1 new, 1 left out" in err
    (folder / "navy" / "broken.png").unlink()
    assert "1 deleted" in run(*asked)[2]
    paths = [line.split("\t")[1] for line in out.splitlines()]
    assert run(*asked, "--paths") == (0, "".join(f"{path}\n" for path in paths), "")
    assert run(*asked, "-0") == (0, "".join(f"{path}\0" for path in paths), "")
    found = json.loads(run(*asked, "--json")[1])
    assert [row["path"] for row in found["results"]] == paths and not found["approximate"]
    assert all(f"{row['score']:.3f}" in out for row in found["results"])
    both = run("search", "photos", "--image", reference, "--text", "is red", "--paths", "-n", 99)
    assert both[0] == 0 and reference.name not in both[1]
    assert len(both[1].splitlines()) == len(list(folder.rglob("*.png"))) - 1


def test_an_index_is_made_searched_and_measured(run, folder, monkeypatch):
    pytest.importorskip("faiss")
    status, out, err = run("index", "photos", "--index", "faiss", "--check", "5")
    count = len(list(folder.rglob("*.png")))
    assert status == 0 and re.search(
        rf"^faiss: recall@5 1.000 of an exact scan, {min(50, count)} composed queries of {count} "
        r"photos; \d+\.\d ms each$", out, re.M
    )  # fmt: skip
    assert re.search(r"\.faiss: made of the store's vectors \(there was none\)\.$", err, re.M)
    asked = ("search", "photos", "--text", "a red star", "--json")
    assert run(*asked, "--index", "faiss") == run(*asked) and run(*asked)[2] == ""
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("weights come later"))
    status, out, err = run("index", "photos", "--index", "fais")
    assert (status, out) == (2, "") and "unknown index 'fais'. Did you mean 'faiss'" in err


def test_the_current_folder_is_the_default(run, folder, monkeypatch):
    monkeypatch.setattr(cli, "DEMO", cli.DEMO | {"photos": Path()})  # as without --demo
    monkeypatch.chdir(folder)
    status, out, _ = run("search", "--text", "a red star", "--paths", "--under", "navy")
    assert status == 0 and all(line.startswith("navy/") for line in out.splitlines())


def test_statuses(run, folder, scratch):
    assert run("search", "photos", "--text", "a red star", "--min_score", "2") == (1, "", "")
    assert run("search", "photos", "--text", "a red star", "--after", "2999")[:2] == (1, "")
    empty = scratch / "empty"
    empty.mkdir(exist_ok=True)
    assert run("index", "empty") == (1, "0 photos: nothing new\n", "")
    for argv, message in (
        (["search", "nowhere", "--text", "a"], "error: nowhere: no such folder"),
        (["search", "photos"], "error: an empty query: give an image, a text, or both."),
        (["search", "photos", "--image", "no.png"], "error: no.png: cannot be read"),
        (["search", "photos", "--text", "a", "-n", "0"], "error: k=0"),
        (["search", "photos", "--text", "a", "--under", "x"], "error: under='x': no folder of"),
        (["search", "photos", "--text", "a", "--image_weight", "2"],
         "error: Slerp takes no guidance. Methods that do: compodiff."),
        (["search", "photos", "--text", "a", "--json", "--paths"], "not allowed with argument"),
        (["search", "photos", "--text", "a", "--store", "/proc/x"], "error: /proc/x: "),
        (["find", "photos"], "invalid choice: 'find'"),
        ([], "required: command"),
    ):  # fmt: skip
        status, out, err = run(*argv)
        assert (status, out) == (2, "") and message in err, (argv, err)
        assert "Traceback" not in err


def test_an_accident_is_no_empty_result(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("of a kind that nobody thought of")

    monkeypatch.setattr(Library, "search", fail)
    status, out, err = run("search", "photos", "--text", "a")
    assert (status, out) == (2, "") and "Traceback" in err and "error: of a kind that" in err
    monkeypatch.setattr(
        Library, "search", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert run("search", "photos", "--text", "a")[0] == 130


def test_several_images_and_negatives_are_said_to_be_approximate(run, folder):
    a, b, c = sorted((folder / "navy").iterdir())[:3]
    odd = folder / "olive" / "odd:2.png"
    shutil.copy(c, odd)
    asked = ("search", "photos", "--image", a, "--image", f"{b}:-0.5", "--image", odd)
    status, out, err = run(*asked, "--text", "is red", "--not", "a star", "--json", "-n", 99)
    odd.unlink()
    said = (
        "approximate: 3 images are composed one by one and added, the negative text is subtracted"
    )
    found = json.loads(out)
    assert status == 0 and said in err and found["approximate"] == said
    with Library(folder, load("slerp", backbone=cli.DEMO["backbone"])) as lib:
        given = {"images": [a, b, c], "weights": [1, -0.5, 1], "negative": ["a star"]}
        for path, score in lib.search(text="is red", k=99, **given):
            name = str(Path("photos") / path.relative_to(folder))
            assert {"path": name, "score": round(score, 6)} in found["results"]


def test_a_page_of_the_results(run, folder, scratch):
    reference = sorted((folder / "navy").iterdir())[0]
    asked = ("search", "photos", "--image", reference, "--text", "is <b> red", "-n", "4")
    status, out, err = run(*asked, "--html", "out.html", "--paths")
    assert status == 0 and "wrote out.html" in err and len(out.splitlines()) == 4
    page = (scratch / "out.html").read_text()
    assert "is &lt;b&gt; red" in page and "<b>" not in page
    assert page.count("data:image/jpeg;base64,") == 5 and "http" not in page.replace(
        "http-equiv", ""
    )
    for line in out.splitlines():
        assert line in page
    assert run(*asked, "--html", "/proc/out.html")[0] == 2


def test_no_update_looks_at_no_file(run, folder, monkeypatch):
    monkeypatch.setattr(library.photos, "walk", lambda _: pytest.fail("the folder was read"))
    status, out, err = run("search", "photos", "--text", "a red star", "--no_update")
    assert status == 0 and out and not err


def test_what_stands_in_the_way_of_an_update_alone(run, monkeypatch, scratch):
    """The search goes on with what there is, `cir index` does not."""
    asked = ("search", "photos", "--text", "a red star", "-n", "2")
    whole = run(*asked)
    (store,) = (scratch / "stores").glob("photos-*.sqlite")
    with Store(store).indexing() as alone:
        assert alone
        said = "another process is indexing: searching what it has done so far.\n"
        assert run(*asked) == (0, whole[1], said)
        status, out, err = run("index", "photos")
        assert (status, out) == (2, "") and "another process is indexing it." in err
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    status, out, err = run(*asked)
    assert (status, out) == whole[:2]
    assert re.fullmatch(r"not brought up to date: .*\.sqlite cannot be written\.\n", err)
    status, out, err = run("index", "photos")
    assert (status, out) == (2, "") and "cannot be written: what is in it can be searched" in err


def test_pages_say_what_they_need(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "starlette", None)
    for command in (["serve"], ["annotate", "--out", tmp_path]):
        status, out, err = run(*command)
        assert (status, out) == (2, "")
        assert f"cir {command[0]} needs Starlette" in err and "pip install 'cir_jax[serve]'" in err


def test_the_backbone_is_the_methods_or_a_real_one(tmp_path):
    def chosen(*argv):
        args = cli._parser().parse_args(["search", *argv])
        return cli._backbone(args, args.method)

    assert chosen() == "openai/clip-vit-base-patch32"
    assert chosen("--method", "searle") == "openai/clip-vit-base-patch32"
    assert chosen("--method", "searle:vit_l14") is None  # the preset says it
    assert chosen("--method", str(tmp_path)) == "openai/clip-vit-base-patch32"  # any folder
    (tmp_path / "config.json").write_text("{}")
    assert chosen("--method", str(tmp_path)) is None  # the workdir does
    assert chosen("--method", "mine.py") is None
    assert chosen("--method", "org/name") is None  # it brings its own
    assert chosen("--demo") == "data/shapes/clip"
    assert chosen("--backbone", "mine", "--demo") == "mine"


def test_weights_of_image_and_text_are_guidance():
    def asked(*argv):
        args = cli._parser().parse_args(["search", *argv])
        return cli._controls(args, types.SimpleNamespace(composer=composer))

    composer = types.SimpleNamespace(guidance=(1.5, 7.5))
    assert asked() == {}
    assert asked("--image_weight", "2") == {"guidance": (2.0, 7.5)}
    assert asked("--text_weight", "0", "--steps", "3") == {"guidance": (1.5, 0.0), "steps": 3}
    assert asked("--alpha", "0.5", "--seed", "0") == {"alpha": 0.5, "seed": 0}


def test_the_first_use_says_what_is_fetched(run, monkeypatch):
    import huggingface_hub

    name = "openai/clip-vit-base-patch32"
    size = types.SimpleNamespace(rfilename="pytorch_model.bin", size=605_247_071)
    found = types.SimpleNamespace(siblings=[size])
    cached = {"path": None}
    api = type("Api", (), {"model_info": lambda *_, **__: found})
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: cached["path"])
    assert files.to_fetch(name) == "605 MB"
    status, _, err = run("search", "photos", "--text", "a", "--backbone", name)
    said = f"{name} is not here yet: it comes from the Hugging Face hub, once (605 MB).\n"
    assert err.startswith(said) and status == 2
    assert "and set --backbone=DIR. Or see it work without: --demo." in err
    cached["path"] = "/somewhere/model.safetensors"
    assert files.to_fetch(name) == "" == files.to_fetch("data/shapes/clip")


@pytest.mark.slow
def test_a_fresh_folder_of_500_photos(tmp_path):
    """The command itself, with nothing cached: under a minute on two cores."""
    import time

    world.write(tmp_path / "photos", world.photos(100, "fresh"))
    env = environment(tmp_path) | {
        "CIR_JAX_LIBRARY": str(tmp_path / "stores"),
        "PYTHONPATH": str(ROOT),
    }
    env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "xla")
    began = time.monotonic()
    for argv in (["index", "photos"], ["search", "photos", "--text", "a red star", "--paths"]):
        command = [sys.executable, "-m", "cir_jax.library.cli", *argv, "--demo"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10 and Image.open(tmp_path / done.stdout.split()[0])
    assert time.monotonic() - began < 60
    assert cir_jax.__file__.startswith(str(ROOT))
