"""`tests/parity.py` on tests/golden, and the tool itself."""

import dataclasses
import gzip
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cir_jax.models import light
from cir_jax.weights import timm as timm_weights
from cir_jax.weights.convert import flatten
from tests import parity, peers

GOLDEN = Path(__file__).parent / "golden"
SLOW = ("full_*", "light_shapes.json")


def marked(path: Path):
    slow = any(path.match(pattern) for pattern in SLOW)
    return pytest.param(path, id=path.name, marks=pytest.mark.slow if slow else ())


@pytest.fixture(scope="module")
def printed(request):
    """Fixture -> the command's line about it; of those that this session wants, in one process."""
    tests = [item for item in request.session.items if item.name.startswith("test_golden[")]
    names = [item.callspec.params["path"].name for item in tests]
    tests_own = ("JAX_", "XLA_")  # how they compile; a user's programs are optimised
    done = subprocess.run(
        [sys.executable, "tests/parity.py", "tests/golden", "--only", *names],
        cwd=GOLDEN.parents[1],
        env={k: v for k, v in os.environ.items() if not k.startswith(tests_own)}
        | {"XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1"},  # the same code, made faster
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    return {line.partition(" ")[0]: line for line in done.stdout.splitlines()}


@pytest.mark.parametrize("path", list(map(marked, parity.fixtures(GOLDEN))))
def test_golden(path, printed):
    assert path.name in printed, "the process ended before"
    verdict = printed[path.name].split(maxsplit=5)[-1]
    skip_unless_strict(verdict)
    assert verdict == "ok"


def skip_unless_strict(verdict):
    """What cannot be compared is skipped; not where CI is set, which has all there is to it."""
    if verdict.startswith("skipped") and not os.environ.get("CI"):
        pytest.skip(verdict)


def fixture(**changes):
    meta = {
        "family": "double",
        "tolerance": {"tol": "1e-5", "exceptions": {"grad/*": "1e-2", "ids, top*": "exact"}},
    }
    values = {"meta": meta, "inputs": {"x": np.ones(3)}, "expected": {"y": np.full(3, 2.0)}}
    return parity.Fixture(Path("f.npz"), **(values | changes))


def test_a_fixture_passes_or_says_why_not():
    def handler(factor):
        return {"double": lambda f: {"y": factor * f.inputs["x"]}}

    assert parity.check(fixture(), handler(2.00001)).passed
    short = parity.check(fixture(), handler(2.0001))
    assert short.verdict == "FAILED: y 5.0e-05 > 1e-05" and not short.passed
    assert short.relative == pytest.approx(5e-5) and short.absolute == pytest.approx(1e-4)
    for broken, why in (
        ({"double": lambda f: {}}, "y was not computed"),
        ({"double": lambda f: {"y": np.zeros(2)}}, r"y has shape (2,), expected (3,)"),
        ({"double": lambda f: {"y": np.full(3, np.nan)}}, "y nan > 1e-05"),
        ({"double": lambda f: f.inputs["z"]}, "KeyError: 'z'"),
        ({}, "unknown family 'double'"),
    ):
        result = parity.check(fixture(), broken)
        assert why in result.verdict and not result.passed


def test_tolerances():
    f = fixture()
    names = ("y", "grad/w", "ids", "top50")
    assert [f.tolerance(n) for n in names] == [1e-5, 1e-2, 0.0, 0.0]
    exact = {"tol": "1e-5", "exceptions": {"a, grad_a and losses after step 0": "1e-4"}}
    f = fixture(meta={"tolerance": exact})
    assert [f.tolerance(n) for n in ("a", "grad_a", "losses", "b")] == [1e-4, 1e-4, 1e-4, 1e-5]


def test_the_rule_for_generated_parameters():
    x = parity.rule_v1("a.weight", (4, 3), 3, 2.0)
    assert x.shape == (4, 3) and x.dtype == np.float32
    assert (parity.rule_v1("b.weight", (4, 3), 3, 2.0) != x).all()
    assert parity.rule_v1("s", (), 0, 1.0) == np.float32(2.6592)
    assert abs(parity.rule_v1("n.weight", (1000,), 0, 1.0).mean() - 1) < 0.02
    assert (parity.rule_v1("n.running_var", (1000,), 0, 1.0) >= 0.5).all()
    assert abs(parity.rule_v1("class_embedding", (1000,), 0, 1.0).std() - 0.5) < 0.05


def test_the_vocabulary_is_found_where_ci_has_it(tmp_path, monkeypatch):
    """Beside the other packages, not on the path; and nothing else is taken for it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "APART", tmp_path)
    assert parity.parity_core.installed_clip_merges() is None
    (tmp_path / "open_clip").mkdir()
    text = '"bpe_simple_vocab_16e6.txt#version: 0.2\ni n\nt h\na n\nr e\n'
    packed = tmp_path / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    monkeypatch.setattr(parity.parity_core, "CLIP_MERGES", 4)
    packed.write_bytes(gzip.compress(text.encode()))
    merges = [("i", "n"), ("t", "h"), ("a", "n"), ("r", "e")]
    assert parity.parity_core.installed_clip_merges() == merges


def test_what_is_skipped_is_said_and_fails_where_it_must(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parity.parity_core, "installed_clip_merges", lambda: None)
    path = tmp_path / "clip_tokens.json"
    path.write_text((GOLDEN / path.name).read_text())
    for strict, status in (([], 0), (["--strict"], 1)):
        monkeypatch.setattr("sys.argv", ["parity.py", str(tmp_path), *strict])
        assert parity.main() == status
        printed = capsys.readouterr().out
        assert "skipped: CLIP's vocabulary is not here: pip install" in printed
        assert "0 passed, 1 skipped, 0 failed" in printed
    (result,) = parity.run([path])
    assert result.skipped and not result.passed
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="CLIP's vocabulary"):
        skip_unless_strict(result.verdict)
    monkeypatch.setenv("CI", "1")
    skip_unless_strict(result.verdict)


def test_the_command_fails_on_unknown_families(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "x.npz", meta='{"family": "surprise", "tolerance": {"tol": "1"}}')
    (tmp_path / "y.npz").write_bytes(b"nothing")
    monkeypatch.setattr("sys.argv", ["parity.py", str(tmp_path)])
    assert parity.main() == 1
    printed = capsys.readouterr().out
    assert "unknown family 'surprise'" in printed and "y.npz" in printed
    assert "0 passed, 0 skipped, 2 failed" in printed


# --- fixtures with other settings than those of tests/golden, made here of the same modules


def made(name, config, inputs, params, expected):
    """The golden fixture's kind, with other contents."""
    meta = parity.Fixture.read(GOLDEN / f"{name}.npz").meta
    meta = meta | {"config": meta["config"] | config}
    return parity.Fixture(Path(f"{name}.npz"), meta, inputs, expected, params)


def assert_passes(fixture):
    result = parity.check(fixture, parity.all_handlers())
    assert result.passed, result.verdict


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


def arrays(module, prefix=""):
    return {f"{prefix}{name}": tensor.numpy() for name, tensor in module.state_dict().items()}


@pytest.mark.peer
@pytest.mark.parametrize("n_layer", [1, 2, 4])
def test_pic2words_network_of_any_depth(torch, n_layer):
    """Also wider than it was released, and at any dropout, which does nothing here."""
    nn = torch.nn
    network = nn.Module()
    blocks = [
        nn.Sequential(nn.Linear(20 if i == 0 else 28, 28), nn.Dropout(0.3), nn.ReLU())
        for i in range(n_layer)
    ]
    network.layers, network.fc_out = nn.Sequential(*blocks), nn.Linear(28, 36)
    x = torch.randn(3, 20)
    with torch.no_grad():
        y = network.eval().fc_out(network.layers(x)).numpy()
    config = {"embed_dim": 20, "middle_dim": 28, "output_dim": 36, "dropout": 0.3}
    config["n_layer"] = n_layer
    assert_passes(
        made("pic2word_im2text", config, {"x": x.numpy()}, arrays(network.eval()), {"y": y})
    )


@pytest.mark.peer
def test_lincirs_loss_with_normalised_inputs(torch):
    """The trainer's statements with the golden fixture's inputs; without: its very numbers."""
    transformers = pytest.importorskip("transformers")
    functional = torch.nn.functional
    golden = parity.Fixture.read(GOLDEN / "lincir_smp_loss.npz")
    config = golden.config["text_config"]
    text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)).eval()
    dim, width = config["projection_dim"], config["hidden_size"]
    phi = torch.nn.Module()
    activation = {i: torch.nn.GELU() for i in (1, 4)} | {i: torch.nn.Identity() for i in (2, 5)}
    linear = {0: (dim, 4 * dim), 3: (4 * dim, 4 * dim), 6: (4 * dim, width)}
    layers = activation | {i: torch.nn.Linear(*sizes) for i, sizes in linear.items()}
    phi.layers = torch.nn.Sequential(*(layers[i] for i in range(7)))
    for module, prefix in ((text, "text."), (phi, "phi.")):
        stored = {
            name.removeprefix(prefix): torch.tensor(x)
            for name, x in golden.params.items()
            if name.startswith(prefix)
        }
        assert not module.load_state_dict(stored, strict=False).unexpected_keys
    ids = {n: torch.tensor(golden.inputs[f"{n}_ids"]).long() for n in ("original", "replaced")}
    uniform, normal = (torch.tensor(golden.inputs[f"noise_{n}"]) for n in ("uniform", "normal"))

    where = (ids["replaced"] == 259).unsqueeze(-1)
    table = text.text_model.embeddings.token_embedding
    with torch.no_grad():
        original = text(input_ids=ids["original"]).text_embeds

    def step(features):
        words = phi.layers(features)
        hook = table.register_forward_hook(lambda *a: torch.where(where, words[:, None], a[2]))
        replaced = text(input_ids=ids["replaced"])
        hook.remove()
        return words, replaced, functional.mse_loss(replaced.text_embeds, original)

    features = original + uniform.unsqueeze(-1) * normal
    np.testing.assert_allclose(step(features)[-1].item(), golden.expected["loss"], rtol=1e-5)
    features = functional.normalize(features, dim=-1)
    words, replaced, loss = step(features)
    loss.backward()
    expected = {
        "original_text_embeds": original,
        "phi_input": features,
        "estimated_token_embeddings": words,
        "replaced_text_embeds": replaced.text_embeds,
        "replaced_last_hidden_state": replaced.last_hidden_state,
        "loss": loss,
    } | {f"grad/phi.{name}": p.grad for name, p in phi.named_parameters()}
    expected = {name: tensor.detach().numpy() for name, tensor in expected.items()}
    assert expected.keys() == golden.expected.keys()
    config = {"l2_normalize": True}
    assert_passes(made("lincir_smp_loss", config, golden.inputs, golden.params, expected))


def test_phis_of_other_widths_and_inputs():
    """A normalised input, a hidden layer that is not four times as wide: read from the config."""
    golden = parity.Fixture.read(GOLDEN / "lincir_phi.npz")
    scaled = golden.inputs["x"] / np.linalg.norm(golden.inputs["x"], axis=-1, keepdims=True)
    unit = dataclasses.replace(golden, inputs={"x": scaled})
    y = parity.all_handlers()["lincir_phi"](unit)["y"]
    config = {"l2_normalize": True}
    assert_passes(made("lincir_phi", config, golden.inputs, golden.params, {"y": np.asarray(y)}))
    # hidden units that nothing reads change nothing
    params = dict(golden.params)
    for name, pads in (("0.weight", ((0, 3), (0, 0))), ("0.bias", ((0, 3),)),
                       ("3.weight", ((0, 3), (0, 3))), ("3.bias", ((0, 3),)),
                       ("6.weight", ((0, 0), (0, 3)))):  # fmt: skip
        params[f"layers.{name}"] = np.pad(params[f"layers.{name}"], pads)
    config = {"hidden_dim": golden.config["hidden_dim"] + 3}
    assert_passes(made("lincir_phi", config, golden.inputs, params, golden.expected))


def mobilevit(multiplier):
    peers.timm()
    from timm.models import byobnet, mobilevit

    return byobnet.ByobNet(mobilevit._mobilevitv2_cfg(multiplier), num_classes=0).eval()


@pytest.mark.peer
def test_mobilevit_of_any_multiplier_has_timms_shapes(torch):
    for multiplier in (0.1, 0.3, 0.375):
        model = light.from_dict({"arch": "mobilevitv2", "multiplier": multiplier})
        ours = {n: path for n, (path, _) in timm_weights.names(model).items()}
        shapes = flatten(timm_weights.shapes(model))
        with torch.device("meta"):
            original = mobilevit(multiplier)
        theirs = {
            name: tuple(x.shape)
            for name, x in original.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }
        order = {4: (3, 2, 0, 1), 1: (0,)}
        got = {n: shapes[path].shape for n, path in ours.items()}
        assert {n: tuple(s[i] for i in order[len(s)]) for n, s in got.items()} == theirs
        assert model.config.num_features == original.num_features


@pytest.mark.peer
def test_mobilevit_of_another_multiplier_equals_timms(torch):
    """Where rounding shows: 0.3 x 64 = 19 -> 24; and a map that is not divided by two."""
    model = mobilevit(0.3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand(tensor.shape) if "var" in name else
                         torch.randn(tensor.shape) * (0.1 if tensor.ndim == 1 else
                                                      tensor[0].numel() ** -0.5))  # fmt: skip
            if tensor.ndim == 1 and name.endswith("weight"):
                tensor += 1
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        feature_map = model.forward_features(x)
        pooled = model.forward_head(feature_map, pre_logits=True)
    expected = {"forward_features": feature_map.numpy(), "pooled": pooled.numpy()}
    config = {"multiplier": 0.3, "image_size": 96}
    assert_passes(made("timm_mobilevitv2_tiny", config, {"x": x.numpy()}, arrays(model), expected))
