"""PyTorch's files without PyTorch: the same tensors, and no code run."""

import os
import pickle
import zipfile

import jax
import numpy as np
import pytest

from cir_jax import weights
from cir_jax.errors import WeightsError
from cir_jax.weights import convert, torch_files
from tests.weights import worlds


class Attack:
    """What a hostile file does."""

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def archive(path, tree, storages=None):
    """A zip archive in PyTorch's layout around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", pickle.dumps(tree))
        for key, data in (storages or {}).items():
            file.writestr(f"model/data/{key}", data)


def test_code_in_a_file_is_not_run(tmp_path):
    attack = Attack()
    attack.path = tmp_path / "owned"
    archive(tmp_path / "x.pt", {"state_dict": attack})
    with pytest.raises(WeightsError, match="x.pt: holds no tensors"):
        torch_files.read(tmp_path / "x.pt")
    assert not attack.path.exists()
    pickle.loads(pickle.dumps(attack))  # it would have worked
    assert attack.path.exists()


def test_files_that_are_none(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match="x.pt: a zip archive, but not one of PyTorch"):
        torch_files.read(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", b"\x80\x02garbage")
    with pytest.raises(WeightsError, match="x.pt: not a readable PyTorch file .* copy it again"):
        torch_files.read(path)
    path.write_bytes(b"\0garbage")
    with pytest.raises(WeightsError, match="x.pt: not a PyTorch file, or damaged. Download or co"):
        torch_files.read(path)


# --- against PyTorch


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.peer
def test_every_kind_of_tensor(tmp_path, torch):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "half": base.half(),
        "bf16": base.bfloat16() / 3,
        "double": base.double(),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "transposed": base.T,
        "view": base[1:3, 2:4],
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
        "expanded": base[:1].expand(3, 6),
    }
    nested = {"state_dict": tensors, "epoch": 3, "args": torch.float32, "optimizer": {"m": base}}
    for tree in (tensors, nested, {"model": {f"module.{k}": v for k, v in tensors.items()}}):
        torch.save(tree, tmp_path / "x.pt")
        got = torch_files.read(tmp_path / "x.pt")
        assert sorted(got) == sorted(tensors)
        for name, tensor in tensors.items():
            expected = tensor.detach().float().numpy()
            np.testing.assert_array_equal(np.asarray(got[name], np.float32), expected, name)
    assert got["half"].dtype == np.float16 and got["bf16"].dtype.name == "bfloat16"


@pytest.mark.peer
def test_a_file_from_before_zip_archives(tmp_path, torch):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16()}
    torch.save({"model": tensors}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    got = torch_files.read(tmp_path / "x.pth")
    np.testing.assert_array_equal(got["a"], tensors["a"])
    np.testing.assert_array_equal(got["b"], np.ones(2))


def openai_archive(torch, path, tensors, size):
    """A TorchScript archive as OpenAI publishes: half precision, three constants beside."""

    class Node(torch.nn.Module):
        def forward(self, x):
            return x

    root = Node()
    constants = {"input_resolution": size, "context_length": 16, "vocab_size": worlds.VOCABULARY}
    for name, value in constants.items():
        root.register_buffer(name, torch.tensor(value))
    for name, array in tensors.items():
        *parents, leaf = name.split(".")
        node = root
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, Node())
            node = getattr(node, parent)
        tensor = torch.from_numpy(np.array(array)).half()
        node.register_parameter(leaf, torch.nn.Parameter(tensor))
    torch.jit.save(torch.jit.script(root), path)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_an_archive_of_openai(tmp_path, torch, kind):
    """TorchScript, loaded without compiling its code; sizes and activation are known."""
    backbone, params = worlds.make(kind)
    tensors = worlds.openai_tensors(backbone, params)
    size = backbone.config.vision.image_size
    openai_archive(torch, tmp_path / "ViT-tiny.pt", tensors, size)
    worlds.write_merges(tmp_path)
    loaded, got = weights.load(tmp_path / "ViT-tiny.pt")
    assert loaded.config == backbone.config
    assert loaded.weights_id.startswith("ViT-tiny@")
    for path, leaf in convert.flatten(got).items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, np.float16(convert.flatten(params)[path]))
    assert loaded.image_transform == backbone.image_transform


@pytest.mark.peer
def test_open_clip_bin(tmp_path, torch):
    backbone, params = worlds.make()
    path = worlds.write_open_clip(tmp_path / "oc", backbone, params)
    (path / "open_clip_model.safetensors").unlink()
    tensors = worlds.openai_tensors(backbone, params)
    torch.save(
        {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()},
        path / "open_clip_pytorch_model.bin",
    )
    _, got = weights.load(path)
    for name, leaf in convert.flatten(got).items():
        np.testing.assert_array_equal(leaf, convert.flatten(params)[name])


# --- export


@pytest.mark.peer
@pytest.mark.parametrize(
    ("dtype", "tolerance", "tuned"),
    [(np.float32, 1e-5, False), (np.float16, 1e-5, False), (np.float32, 1e-5, True)],
)
def test_transformers_loads_what_we_export(tmp_path, torch, tiny, dtype, tolerance, tuned):
    """Equal image, text and hidden states, and equal token ids; also with a tuned text tower."""
    transformers = pytest.importorskip("transformers")
    backbone, params = tiny
    before = params
    if tuned:  # as RTD does: the text tower moves, the image tower stays
        rng = np.random.default_rng(1)
        text = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), params["text"])
        params = params | {"text": text}
    weights.save(tmp_path / "out", backbone, params, dtype)
    backbone, params = weights.load(tmp_path / "out")
    if tuned:
        ids = backbone.tokenizer(["a red star"])
        encode = jax.jit(backbone.encode_text)
        assert not np.allclose(*(encode(p, ids) for p in (before, params)))
        kept = [(before[name], params[name]) for name in before if name != "text"]
        assert all(jax.tree.all(jax.tree.map(np.array_equal, *pair)) for pair in kept)
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["a red star", "a photo of $ that is blue"]
    ids = backbone.tokenizer(texts, backbone.context_length)
    theirs = tokenizer(texts, padding="max_length", max_length=backbone.context_length)
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    pixels = np.random.default_rng(0).uniform(-1.7, 1.9, (2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        out = model(torch.tensor(ids.astype(np.int64)), torch.tensor(pixels.transpose(0, 3, 1, 2)))
        hidden = out.text_model_output.last_hidden_state.numpy()

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    @jax.jit
    def run(params):
        image, text = backbone.encode_image(params, pixels), backbone.encode_text(params, ids)
        return image, text, backbone.text_hidden_states(params, ids)

    image, text, states = run(params)
    for ours, expected in (
        (unit(image), unit(out.image_embeds.numpy())),
        (unit(text), unit(out.text_embeds.numpy())),
        (states, hidden),
    ):
        error = np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max()
        assert error < tolerance, error


@pytest.mark.peer
def test_bfloat16_beside_transformers(tmp_path, torch, tiny):
    """Both compute in bfloat16 and differ from float32 about as much."""
    transformers = pytest.importorskip("transformers")
    import jax.numpy as jnp

    weights.save(tmp_path / "out", *tiny)
    exact, params = weights.load(tmp_path / "out")
    half, _ = weights.load(tmp_path / "out", jnp.bfloat16)
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    pixels = np.random.default_rng(0).uniform(-1.7, 1.9, (4, 16, 16, 3)).astype(np.float32)
    images = torch.tensor(pixels.transpose(0, 3, 1, 2)).bfloat16()
    with torch.no_grad():
        theirs = model.get_image_features(images)
        theirs = getattr(theirs, "pooler_output", theirs).float().numpy()
    expected = np.asarray(jax.jit(exact.encode_image)(params, pixels))
    ours = np.asarray(jax.jit(half.encode_image)(params, pixels))

    def error(x):
        return np.abs(x - expected).max() / np.abs(expected).max()

    print(f"bfloat16 relative error: ours {error(ours):.1e}, PyTorch {error(theirs):.1e}")
    assert error(ours) < 0.03 and error(ours) < 2 * error(theirs) + 1e-3


def test_reading_is_lazy():
    """Nothing is read before it is asked for: a file needs the memory of one tensor."""
    reads = []
    tensors = torch_files.Lazy({"a": lambda: reads.append("a") or np.zeros(1)})
    assert list(tensors) == ["a"] and len(tensors) == 1 and "a" in tensors and not reads
    assert tensors["a"].shape == (1,) and reads == ["a"]
