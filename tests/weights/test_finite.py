"""Numbers that are none: refused with every way of loading weights, and never an image's fault."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cir_jax import composers, weights
from cir_jax.composers import official
from cir_jax.errors import WeightsError
from cir_jax.weights import finite
from tests import tiny as factory
from tests.weights import siglip_worlds, worlds

BROKEN = "holds 1 of [0-9]+ values that are NaN or infinite"


def spoil(file):
    """One value of one tensor of a safetensors file."""
    tensors = load_file(file)
    name = min(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = np.array(tensors[name])
    tensors[name][0, 0] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize(
    "kind", ["hugging face", "open_clip", "open_clip resnet", "blip", "siglip"]
)
def test_backbones(tmp_path, kind):
    if kind == "blip":
        made = worlds.make_blip(tmp_path)
    elif kind == "siglip":
        made = siglip_worlds.make(tmp_path)
    else:
        made = worlds.make("resnet" if "resnet" in kind else "vit")
    path = tmp_path / "weights"
    if "open_clip" in kind:
        worlds.write_open_clip(path, *made)
    else:
        weights.save(path, *made)
    weights.load(path)
    (file,) = path.glob("*.safetensors")
    name = spoil(file)
    with pytest.raises(WeightsError, match=f"{file.name}: {name} {BROKEN}"):
        weights.load(path)


def test_a_file_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    backbone, params = worlds.make()
    path = worlds.write_open_clip(tmp_path / "weights", backbone, params)
    (path / "open_clip_model.safetensors").unlink()
    tensors = worlds.openai_tensors(backbone, params)
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    tensors["text_projection"][1, 2] = torch.inf
    torch.save(tensors, path / "open_clip_pytorch_model.bin")
    with pytest.raises(WeightsError, match=f"open_clip_pytorch_model.bin: text_proj.* {BROKEN}"):
        weights.load(path)


SETTINGS = {
    "lincir": {},
    "pic2word": {"hidden_dim": 20},
    "compodiff": {"depth": 1, "heads": 2, "dim_head": 8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_checkpoints_of_the_authors(tiny, tmp_path, name):
    pytest.importorskip("torch")
    composer = composers.build(name, tiny[0], **SETTINGS[name])
    params = jax.device_get(jax.jit(composer.init)(jax.random.key(0)))
    leaves, tree = jax.tree.flatten(params)
    position = next(i for i, leaf in enumerate(leaves) if leaf.ndim == 2)
    leaves[position] = np.array(leaves[position])
    leaves[position][0, 0] = np.nan
    frozen = composer.freeze(tiny[1])
    official.save(composer, tmp_path / "file.pt", jax.tree.unflatten(tree, leaves), frozen)
    with pytest.raises(WeightsError, match=f"file.pt: .* {BROKEN}"):
        official.load(composer, tmp_path / "file.pt", frozen)


# --- rows


def test_unreadable_and_not_finite_are_told_apart():
    rows = np.ones((5, 3), np.float32)
    rows[1, 2], rows[2, 0], rows[3] = np.nan, -np.inf, np.nan
    marked = np.asarray(finite.marked(rows, np.array([False, False, False, True, False])))
    np.testing.assert_array_equal(marked[[0, 4]], rows[[0, 4]])
    assert np.isinf(marked[[1, 2]]).all() and np.isnan(marked[3]).all()
    assert np.isinf(np.asarray(finite.marked(rows))[3]).all()


def test_rows_that_are_not_finite_are_named_before_any_is_handed_on():
    backbone, _ = factory.backbone()
    rows = np.ones((3, 3), np.float32)
    rows[2] = np.nan  # an unreadable image
    rows[0] = np.finfo(np.float32).max  # the sum overflows, the values do not
    ended = []

    def pieces():
        try:
            yield rows
            yield np.full((5, 3), np.inf, np.float32)
        finally:
            ended.append(True)

    message = (
        "features: not finite, though the input was read: record 13, record 14, record 15 and 2 "
        "more. Computed in float32 with tiny@0: these weights or .* damaged.*To do: get the weights"
    )
    checked = finite.checked(pieces(), 10, "features", backbone, lambda row: f"record {row}")
    np.testing.assert_array_equal(next(checked), rows)
    with pytest.raises(WeightsError, match=message):
        next(checked)
    assert ended
    half = finite.checked(pieces(), 0, "features", backbone.with_dtype("bfloat16"), str)
    next(half)
    with pytest.raises(WeightsError, match="try .*--config.evaluation.dtype=float32"):
        next(half)


def test_what_earlier_versions_stored():
    rows = np.ones((4, 3), np.float32)
    rows[0] = np.finfo(np.float32).max
    assert finite.stored_whole(rows, unreadable=False)
    rows[1] = np.nan
    assert finite.stored_whole(rows, unreadable=True)
    assert not finite.stored_whole(rows, unreadable=False)
    rows[1, 0] = 1
    assert not finite.stored_whole(rows, unreadable=True)
    rows[1] = np.inf
    assert not finite.stored_whole(rows, unreadable=True)
