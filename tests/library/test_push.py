"""`cir push`, and `cir_jax.load` of what was pushed: huggingface_hub's own client, a hub of this
machine."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard, constants
from PIL import Image

import cir_jax
from cir_jax import experiment as experiments
from cir_jax import loading, weights
from cir_jax.errors import ConfigError, WeightsError
from cir_jax.evaluation import runner, sharing
from cir_jax.library import cli
from cir_jax.training import stages
from cir_jax.weights import hub as directories
from launch import common
from tests import hub_server

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory):
    """A composer as `--config.export_to=hub:DIR` writes it, and another one, on the same CLIP."""
    folder = tmp_path_factory.mktemp("shared")
    weights.save(folder / "toy", *tiny)
    for name in ("slerp", "image_text"):
        experiment, _ = loading.experiment_of(name, backbone=folder / "toy")
        sharing.write(experiment, None, folder / name)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.running() as hub:
        hub_server.use(monkeypatch, hub, tmp_path / "cache")
        yield hub


@pytest.fixture
def push(capsys):
    """Runs `cir push`: (status, stdout, the last line of stderr)."""

    def push(*argv):
        status = cli.main(["push", *map(str, argv)])
        out, err = capsys.readouterr()
        return status, out, err.strip().rpartition("\n")[2]

    return push


def files_of(hub, name, revision="main"):
    return hub.at(name, revision)[1]


def test_pushed_and_loaded(hub, shared, push, tmp_path, monkeypatch):
    status, out, _ = push(shared / "slerp", "me/mine", "--license", "cc-by-nc-4.0")
    assert status == 0 and out.startswith(f"{hub.url}/me/mine (")
    assert out.endswith('): cir_jax.load("me/mine")\n')
    there = files_of(hub, "me/mine")
    here = {
        str(path.relative_to(shared / "slerp")): path.read_bytes()
        for path in (shared / "slerp").rglob("*")
        if path.is_file()
    }
    assert {k: v for k, v in there.items() if k != "README.md"} == {
        ".gitattributes": there[".gitattributes"],
        **{k: v for k, v in here.items() if k != "README.md"},
    }
    card = ModelCard(there["README.md"].decode())
    assert card.data.license == "cc-by-nc-4.0" and card.data.library_name == "cir_jax"
    assert 'cir_jax.load("me/mine")' in card.text and "ORG/NAME" not in str(card)
    assert "ORG/NAME" in here["README.md"].decode()  # what was given is as it was
    monkeypatch.chdir(tmp_path)
    search = cir_jax.load("me/mine")
    before = cir_jax.load(shared / "slerp")
    assert search.composer.settings == before.composer.settings
    jax.tree.map(np.testing.assert_array_equal, search.frozen, before.frozen)
    assert not [line for line in hub.asked if "README" in line and "resolve" in line]
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cir_jax.load("me/mine").composer.alpha == 0.8
    assert hub.asked == []


def test_pushed_again_and_to_a_branch(hub, shared, push, capsys):
    """One commit each; what the composer before had and this one has not goes."""
    assert push(shared / "slerp", "me/mine")[0] == 0
    stale = {"files/old.json": b"{}", "notes.txt": b"kept", "backbone/old/config.json": b"{}"}
    first = hub.put("me/mine", files_of(hub, "me/mine") | stale)
    status, out, _ = push(shared / "image_text", "me/mine", "--revision", "next")
    assert status == 0 and out.endswith('cir_jax.load("me/mine", revision="next")\n')
    assert len(hub.repos["me/mine"]["next"]) == 2  # the branch, and one commit
    names = set(files_of(hub, "me/mine", "next"))
    assert set(stale) & names == {"notes.txt"} and "backbone/toy/model.safetensors" in names
    assert push(shared / "image_text", "me/mine", "--revision", "next")[0] == 0
    names = [loading.read_shared("me/mine", x).composer.name for x in (None, "next", first)]
    assert names == ["slerp", "image_text", "slerp"]
    loaded = cir_jax.load("me/mine", revision="next")
    assert type(loaded.composer).__name__ == "ImageText"
    with pytest.raises(WeightsError, match="me/mine: there is no revision 'nxt'"):
        cir_jax.load("me/mine", revision="nxt")
    with pytest.raises(ConfigError, match="of ORG/NAME on the hub, not of slerp"):
        cir_jax.load("slerp", revision="next")
    with pytest.raises(ConfigError, match="is a directory of this machine, which has none"):
        cir_jax.load(shared / "slerp", revision="next")
    with pytest.raises(ConfigError, match="it has a config and weights of its own"):
        cir_jax.load("me/mine", weights="phi.pt")


def test_a_method_and_private_ones(hub, shared, push):
    status, out, _ = push("slerp", "me/quiet", "--private", "--backbone", shared / "toy")
    assert status == 0 and "me/quiet" in hub.private
    assert cir_jax.load("me/quiet").composer.backbone.weights_id.startswith("toy@")
    assert push(shared / "slerp", "me/quiet", "--private")[0] == 0
    hub.private.clear()
    status, out, err = push(shared / "slerp", "me/quiet", "--private")
    assert (status, out) == (2, "") and "is there and public, so --private would hide" in err


def test_a_dry_run_sends_nothing(hub, shared, push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    status, out, _ = push(shared / "slerp", "me/mine", "--dry_run", "--license", "mit", "--private")
    assert status == 0 and hub.asked == [] and hub.repos == {}
    assert "library_name: cir_jax" in out and "license: mit" in out
    names = [line.split("  ")[-1] for line in out.splitlines()]
    assert {"README.md", "config.json", "digests.json", "backbone/toy/model.safetensors"} <= set(
        names
    )
    assert out.endswith("bytes would go to me/mine, private if it is new. Nothing was sent.\n")


def damaged(shared, tmp_path):
    target = tmp_path / "damaged"
    target.mkdir()
    for path in (shared / "slerp").iterdir():
        (target / path.name).symlink_to(path)
    (target / "config.json").unlink()
    (target / "config.json").write_bytes((shared / "slerp" / "config.json").read_bytes() + b" ")
    return target


def cut_off(*_):
    raise WeightsError("it was cut off.")


@pytest.mark.parametrize(
    ("name", "prepare", "message"),
    [
        ("mine", None, "'mine': give ORG/NAME, your name or your organisation's before it"),
        ("a/b/c", None, "'a/b/c': no name of a repository, ORG/NAME"),
        ("me/x y", None, "no name of a repository"),
        ("you/mine", None, "you/mine: not yours to write, or the token may only read"),
        ("me/mine", lambda m: m.delenv("HF_TOKEN"), "nobody is logged in to http://127.0.0.1"),
        ("me/mine", lambda m: m.setenv("HF_TOKEN", "hf_old"), "the hub does not take the token"),
        ("reader/mine", lambda m: m.setenv("HF_TOKEN", "hf_read"), "the token may only read"),
        ("me/mine", lambda m: m.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is"),
        ("me/mine", lambda m: m.setattr(constants, "ENDPOINT", "http://127.0.0.1:9"),
         "http://127.0.0.1:9 was not reached"),
        ("you/theirs", None, "you/theirs: not yours to write"),
        ("me/clip", None, "holds something else than a composer of cir_jax, or one of a newer"),
        ("me/data", None, "holds something else than a composer of cir_jax: there is no config"),
        ("me/clip", lambda m: m.setattr(directories, "fetch", cut_off), "error: it was cut off."),
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_says_so(hub, shared, push, monkeypatch, name, prepare, message):
    hub.put("you/theirs", {"README.md": b"mine"})
    hub.put("me/clip", {"config.json": b'{"model_type": "clip"}'})
    hub.put("me/data", {"train.parquet": b"rows"})
    before = json.dumps({k: len(v["main"]) for k, v in hub.repos.items()})
    if prepare:
        prepare(monkeypatch)
    status, out, err = push(shared / "slerp", name)
    assert (status, out) == (2, "") and message in err, err
    assert json.dumps({k: len(v["main"]) for k, v in hub.repos.items()}) == before


def test_directories_that_cannot_be_pushed(hub, shared, push, tmp_path):
    for what, message in (
        (tmp_path / "nothing", "unknown workdir or method"),
        (tmp_path, "no config.json, so this is no workdir"),
        (damaged(shared, tmp_path), "damaged: config.json has"),
    ):
        status, out, err = push(what, "me/mine")
        assert (status, out) == (2, "") and message in err, err
    card = tmp_path / "damaged" / "README.md"
    card.unlink()
    (tmp_path / "damaged" / "config.json").write_bytes(
        (shared / "slerp" / "config.json").read_bytes()
    )
    assert "README.md is missing: export the composer again" in push(card.parent, "me/mine")[2]
    card.write_text("---\na: b: c\n---\n")
    assert "its metadata are wrong" in push(card.parent, "me/mine")[2]
    status, _, err = push(shared / "slerp", "me/mine", "--backbone", "x")
    assert status == 2 and "has a backbone and weights. Leave out --backbone" in err
    assert "me/mine" not in hub.repos


def test_what_cannot_be_loaded_says_so(hub, shared, push, tmp_path, monkeypatch):
    assert push(shared / "slerp", "me/mine")[0] == 0
    whole = files_of(hub, "me/mine")
    hub.put("me/clip", {"config.json": b'{"model_type": "clip"}'})
    hub.put("me/empty", {"README.md": b""})
    hub.put("me/part", {k: v for k, v in whole.items() if "model.safetensors" not in k})
    wrong = whole | {"backbone/toy/model.safetensors": b"\0" * 99}
    hub.put("me/damaged", wrong)
    newer = json.loads(whole["config.json"]) | {"format": 2}
    hub.put("me/newer", {"config.json": json.dumps(newer).encode()})
    hub.put("me/gated", whole)
    hub.gated.add("me/gated")
    hub.put("you/secret", whole)
    hub.private.add("you/secret")
    for name, message in (
        ("me/nothing", "me/nothing: no such directory here, and no such repository on http://127"),
        ("you/secret", "a private one is seen only with HF_TOKEN set, or after `hf auth login`"),
        ("me/clip", "the config of a 'clip', expected a composer of cir_jax"),
        ("me/empty", "me/empty: has no config.json, so it is no composer of cir_jax"),
        ("me/part", "has no backbone/toy/model.safetensors, so it is no composer of cir_jax, or"),
        ("me/damaged", "model.safetensors has 99 bytes instead of .*`hf download me/damaged --rev"),
        ("me/newer", "format 2; this version of cir_jax reads up to 1. Update"),
        ("me/gated", "wants to know who gets it. Ask at http://127.0.0.1:.*/me/gated"),
        ("me/..", "neither a directory here nor a name on the hub"),
    ):
        with pytest.raises(WeightsError, match=message):
            cir_jax.load(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="not reached .*Where there is a network: `hf download"):
        cir_jax.load("me/other")


def test_the_cache_was_damaged(hub, shared, push):
    assert push(shared / "slerp", "me/mine")[0] == 0
    directory = directories.located("me/mine")
    assert directories.find("me/mine") == directory
    file = (directory / "backbone/toy/model.safetensors").resolve()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match="content has changed. `hf download me/mine --revision"):
        cir_jax.load("me/mine")


def test_what_is_begun_with_is_what_was_checked(hub, shared, push):
    """Not what was pushed since; and what is made of it says which it was."""
    assert push(shared / "slerp", "me/mine")[0] == 0
    commit = hub.at("me/mine")[0]
    config = loading.read_experiment("slerp:smoke")
    config.backbone, config.init_from = str(shared / "toy"), "hub:me/mine"
    experiment = experiments.setup(config)
    assert push(shared / "image_text", "me/mine")[0] == 0
    hub.asked.clear()
    with pytest.raises(WeightsError, match=f"{commit}: a training-free slerp, without parameters"):
        stages.given_params(experiment)
    assert hub.asked == []
    made = sharing._made(experiment, runner.Trained({}))
    assert made["init_from"] == f"me/mine at {commit}"


def test_search_with_a_shared_composer(hub, shared, push, tmp_path, monkeypatch, capsys):
    """`--method ORG/NAME`, with its own backbone; results alone are on stdout."""
    assert push(shared / "slerp", "me/mine")[0] == 0
    monkeypatch.setenv("CIR_JAX_LIBRARY", str(tmp_path / "stores"))
    (tmp_path / "photos").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "photos" / "a.png")
    monkeypatch.chdir(tmp_path)
    search = ["search", "photos", "--method", "me/mine", "--text", "red", "--paths"]
    assert cli.main(search) == 0
    out, err = capsys.readouterr()
    assert out == "photos/a.png\n"
    said = "me/mine is not here yet: it comes from the Hugging Face hub, once (1 MB).\n"
    assert err.startswith(said)
    assert loading.to_fetch("me/mine") == {}


def test_a_config_of_the_binaries(hub, shared, push):
    """`--config=ORG/NAME` and `--config=DIR` stand for the experiment that the composer is."""
    file = str(common.ROOT / "launch" / "shared.py")
    assert common._with_shared(["eval.py", "--config=me/mine", "--split=val"]) == [
        "eval.py",
        f"--config={file}:me/mine",
        "--split=val",
    ]
    given = ["eval.py", "--config", str(shared / "slerp")]
    assert common._with_shared(given)[2] == f"{file}:{shared / 'slerp'}"
    for kept in ("experiments/slerp.py:smoke", "experiments/slerp", "slerp", "my.py"):
        assert common._with_shared(["x", f"--config={kept}"]) == ["x", f"--config={kept}"]
    assert push(shared / "slerp", "me/mine")[0] == 0
    config = loading.read_shared("me/mine")
    assert (config.name, config.preset) == ("slerp", "mine")
    assert isinstance(config.evaluation.benchmarks, tuple)
    assert config.init_from.startswith("hub:") and config.backbone.endswith("backbone/toy")


@pytest.mark.slow
def test_as_a_user_stands(shared, tmp_path):
    """From another directory, without a terminal, with the real environment variables."""
    code = """
import sys, cir_jax
from cir_jax.library import cli
assert cli.main(sys.argv[1:]) == 0
print(cir_jax.load("me/mine").composer.alpha)
"""
    with hub_server.running() as hub:
        hub.warns = True
        env = os.environ | hub_server.environment(hub, tmp_path / "cache")
        done = subprocess.run(
            [sys.executable, "-c", code, "push", str(shared / "slerp"), "me/mine"],
            env=env | {"PYTHONPATH": str(common.ROOT), "JAX_PLATFORMS": "cpu"}, cwd=tmp_path,
            text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0.8", done.stderr
    warned = re.findall(r"warning \d+\.", done.stderr)
    assert len(warned) == len(set(warned)) == len(hub.asked)
