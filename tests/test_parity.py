"""`tests/parity.py` on tests/golden, and the tool itself."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests import parity

GOLDEN = Path(__file__).parent / "golden"
# full size, or compared in other tests too
SLOW = ("full_*", "light_shapes.json", "blip_*", "timm_*", "t5_*", "compodiff_*")


def marked(path: Path):
    slow = any(path.match(pattern) for pattern in SLOW)
    return pytest.param(path, id=path.name, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize("path", list(map(marked, parity.fixtures(GOLDEN))))
def test_golden(path):
    (result,) = parity.run([path])
    print(f"{result.relative:.1e} {result.verdict}")
    skip_unless_strict(result)
    assert result.passed, result.verdict


def skip_unless_strict(result):
    """What cannot be compared is skipped; not where CI is set, which has all there is to it."""
    if result.skipped and not os.environ.get("CI"):
        pytest.skip(result.verdict)


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
        skip_unless_strict(result)
    monkeypatch.setenv("CI", "1")
    skip_unless_strict(result)


def test_the_command_fails_on_unknown_families(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "x.npz", meta='{"family": "surprise", "tolerance": {"tol": "1"}}')
    (tmp_path / "y.npz").write_bytes(b"nothing")
    monkeypatch.setattr("sys.argv", ["parity.py", str(tmp_path)])
    assert parity.main() == 1
    printed = capsys.readouterr().out
    assert "unknown family 'surprise'" in printed and "y.npz" in printed
    assert "0 passed, 0 skipped, 2 failed" in printed
