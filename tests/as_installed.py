"""An installed wheel alone: no repository, no file paths; run from another directory (`.ci/run`).

python -m pip install . && cd / && python .../tests/as_installed.py
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cir_jax
from cir_jax import loading
from cir_jax.errors import ConfigError, WeightsError

REPOSITORY = Path(__file__).resolve().parents[1]


def refusal(error: type[Exception], *args: object, **kwargs: object) -> str:
    try:
        cir_jax.load(*args, **kwargs)
    except error as caught:
        return str(caught)
    raise AssertionError(f"load({args}, {kwargs}) did not raise")


def main() -> None:
    from PIL import Image

    installed = Path(cir_jax.__file__).resolve().parent
    assert installed.parent != REPOSITORY, f"{installed} is the repository, not an installation"
    assert not [p for p in sys.path if p and Path(p).resolve() == REPOSITORY]
    assert {"slerp", "searle", "compodiff"} <= set(loading.methods())
    for name in loading.methods():
        assert loading.read_experiment(name).name
    # a program may have a package of this name
    assert "experiments" not in sys.modules
    with tempfile.TemporaryDirectory() as folder:
        for color in ("red", "blue", "green"):
            Image.new("RGB", (40, 30), color).save(Path(folder) / f"{color}.png")
        search = cir_jax.load(config="slerp")
        search.index(folder)
        found = search.search(Path(folder) / "red.png", "is blue", k=3)
        names = sorted(path.name for path, _ in found)
        assert names == ["blue.png", "green.png", "red.png"], names
        os.environ["CIR_JAX_LIBRARY"] = folder
        command = [Path(sys.executable).with_name("cir"), "search", "--demo", "--text", "a star"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert len(lines.splitlines()) == 10, lines
    # files beside the config: phrases and parts of speech travel, too
    stage = loading.read_experiment("searle").stage.oti.composer
    from cir_jax.composers.phrases import Phrases

    Phrases.read(stage.phrases, search.composer.backbone, stage.top_k)
    from cir_jax.evaluation import published
    from cir_jax.evaluation.page import page

    assert published.rows("circo", "test", ["slerp"])
    assert "function histogram(" in page("a run", []) and "--hit:" in page("a run", [])
    for name in ("page.html", "page.js", "mask.js", "server.js", "page.css", "icon.svg"):
        assert (installed / "library" / "serve" / "page" / name).is_file(), name
    for name in ("page.html", "annotate.js", "annotate.css"):
        assert (installed / "library" / "annotate" / "page" / name).is_file(), name
    assert "no such file" in refusal(WeightsError, "searle", weights="nowhere.pt")
    assert "Did you mean 'slerp'" in refusal(ConfigError, config="slrp")
    print(f"cir_jax {cir_jax.__version__} works as installed in {installed}")


if __name__ == "__main__":
    main()
