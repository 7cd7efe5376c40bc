"""ARTEMIS' checkpoints, as its train.py writes them, beside its own model in PyTorch."""

import argparse
import io
import json
import pickle
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

import cir_jax
from cir_jax import weights
from cir_jax.composers import official
from cir_jax.composers.artemis import Artemis
from cir_jax.errors import WeightsError
from cir_jax.input import vocabulary
from cir_jax.models.artemis import ResNet, ResNetConfig, WordConfig
from cir_jax.weights import artemis, convert
from tests import peers

torch = pytest.importorskip("torch")

CAPTIONS = ["is red, not (blue)", "has longer sleeves and no collar", "more colorful t-shirt"]
WORDS = vocabulary.build(CAPTIONS)
DIM, WORD_DIM = 8, 5


def trunk(bottleneck=True, width=4):
    """torchvision's ResNet of one block per stage, narrower; without pool and classes."""
    resnet = peers.torchvision().models.resnet
    block = resnet.Bottleneck if bottleneck else resnet.BasicBlock

    class Small(resnet.ResNet):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self._norm_layer, self.inplanes, self.dilation = torch.nn.BatchNorm2d, width, 1
            self.groups, self.base_width = 1, 64
            self.conv1 = torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.bn1, self.relu = torch.nn.BatchNorm2d(width), torch.nn.ReLU()
            self.maxpool = torch.nn.MaxPool2d(3, 2, 1)
            for i in range(4):
                stride = 2 if i else 1
                layer = self._make_layer(block, width * 2**i, 1, stride=stride)
                setattr(self, f"layer{i + 1}", layer)
            self.avgpool = self.fc = torch.nn.Sequential()

    torch.manual_seed(0)
    made = Small().eval()
    for name, x in made.state_dict().items():  # as if trained, and so that maps are not zeros
        if name.endswith("running_var") or (x.ndim == 1 and name.endswith("weight")):
            x.uniform_(0.5, 1.5)
        elif x.ndim == 1:
            x.uniform_(-0.3, 0.3)
    return made


class Reference(torch.nn.Module):
    """The original's modules by their names, and what it computes of them."""

    def __init__(self, kind):
        super().__init__()
        linear = torch.nn.Linear
        self.temperature = torch.nn.Parameter(torch.tensor([2.5]))
        self.txt_enc = torch.nn.Module()
        self.txt_enc.embed = torch.nn.Embedding(len(WORDS), WORD_DIM)
        self.img_enc = torch.nn.Module()
        if kind == "fashionIQ":
            gru = torch.nn.GRU(WORD_DIM, DIM // 2, bidirectional=True, batch_first=True)
            self.txt_enc.sent_enc = gru
            self.img_enc.cnn, self.img_enc.fc = trunk(), linear(128, DIM)
        else:
            self.txt_enc.sent_enc = torch.nn.Sequential(
                torch.nn.LSTM(WORD_DIM, 6), torch.nn.Dropout(0.1), linear(6, DIM)
            )
            self.img_enc.linear = linear(128, DIM)
        self.Transform_m = torch.nn.Sequential(linear(DIM, DIM))
        for name in ("Attention_EM", "Attention_IS"):
            made = torch.nn.Module()
            made.attention = torch.nn.Sequential(
                linear(DIM, DIM), torch.nn.ReLU(), linear(DIM, DIM), torch.nn.Softmax(dim=1)
            )
            setattr(self, name, made)

    def image(self, pixels):
        x = self.img_enc.cnn(pixels).view(-1, 128, 7, 7)
        x = x.clamp(min=1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)
        return torch.nn.functional.normalize(self.img_enc.fc(x))

    def text(self, ids):
        _, last = self.txt_enc.sent_enc(self.txt_enc.embed(torch.tensor([ids])))
        return torch.nn.functional.normalize(last.permute(1, 0, 2).reshape(1, -1))

    def score(self, r, m, t):
        unit = torch.nn.functional.normalize
        em = unit(self.Transform_m(m)) * unit(self.Attention_EM.attention(m) * t)
        a = self.Attention_IS.attention(m)
        return (em + unit(a * r) * unit(a * t)).sum(-1)


def checkpoint(folder, kind="fashionIQ", words=WORDS, **args):
    """model_best.pth and NAME_vocab.pkl as train.py and vocab.py write them."""
    torch.manual_seed(1)
    model = Reference(kind).eval()
    # best_score holds tensors, the optimiser moments
    sum(p.sum() for p in model.parameters()).backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    optimizer.step()
    args = argparse.Namespace(**{"data_name": kind, "model_version": "ARTEMIS"} | args)
    state = {"epoch": 3, "best_score": {"val": torch.tensor(41.5)}}
    state |= {"args": args, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "model_best.pth")
    (folder / f"{kind}_vocab.pkl").write_bytes(pickled(words))
    if kind == "cirr":
        stored = trunk().state_dict() | {"fc.weight": torch.zeros(3, 128), "fc.bias": torch.ones(3)}
        torch.save(stored, folder / "resnet152-394f9c45.pth")
    return model, folder / "model_best.pth"


def pickled(words):
    """`pickle.dump` of the original's class, in the module that it has there."""
    module = types.ModuleType("vocab")
    module.Vocabulary = type("Vocabulary", (), {"__module__": "vocab"})
    made = module.Vocabulary()
    made.idx, made.idx2word = len(words), dict(enumerate(words))
    made.word2idx = {word: i for i, word in enumerate(words)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vocab", module)
        return pickle.dumps(made, pickle.HIGHEST_PROTOCOL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def loaded(saved):
    backbone, params = weights.load(saved[1])
    composer = Artemis(backbone, embed_dim=0)
    return composer, official.load(composer, saved[1], {"backbone": params}), {"backbone": params}


def test_a_string_and_a_picture_find_what_the_original_finds(saved, tmp_path):
    """From files alone: its preprocessing, words, networks and scores."""
    model, path = saved
    rng = np.random.default_rng(0)
    pictures = []
    for i, size in enumerate([(300, 260), (90, 200), (256, 256)]):
        pixels = rng.integers(0, 255, (*size[::-1], 3), np.uint8)
        pictures.append(tmp_path / "images" / f"{i}.png")
        pictures[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(pixels // (i + 1)).resize(size).save(pictures[-1])
    search = cir_jax.load("artemis:official", backbone=path, weights=path)
    search.batch_size, search.cache_dir = 1, tmp_path / "cache"
    search.index(pictures[0].parent)
    found = search.search(pictures[1], "is more RED/(unheard-of) <and> no sleeves.")

    def tensor(file):
        """transforms.py: white to a square, 256, the middle 224, ImageNet's statistics."""
        image = Image.open(file)
        side = max(image.size)
        square = Image.new("RGB", (side, side), (255, 255, 255))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        square = square.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        x = (np.asarray(square, np.float32) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
        return torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None]

    said = ["<start>", "is", "more", "red", "(", "<unk>", "<unk>", ")", "<and>"]
    ids = [WORDS.index(word) for word in [*said, "no", "sleeves", "<end>"]]
    with torch.no_grad():
        t = torch.cat([model.image(tensor(file)) for file in pictures])
        expected = model.score(t[1:2], model.text(ids), t).numpy()
    assert np.diff(np.sort(expected)).min() > 1e-3
    assert [path for path, _ in found] == [pictures[i] for i in np.argsort(-expected)]
    np.testing.assert_allclose([score for _, score in found], -np.sort(-expected), atol=1e-5)


def test_written_checkpoints_are_the_originals(saved, loaded, tmp_path):
    model, path = saved
    composer, params, frozen = loaded
    params, frozen = jax.device_get((params, frozen))
    official.save(composer, tmp_path / "ours.pth", params, frozen)
    content = torch.load(tmp_path / "ours.pth", weights_only=False)
    assert set(content) == {"args", "epoch", "best_score", "model", "optimizer"}
    args = content["args"]
    assert (args.cnn_type, args.txt_enc_type, args.load_image_feature) == ("resnet14", "bigru", 0)
    fresh = Reference("fashionIQ")
    fresh.load_state_dict(content["model"], strict=True)
    for name, x in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(fresh.state_dict()[name], x, err_msg=name)
    torch.optim.AdamW(fresh.parameters()).load_state_dict(content["optimizer"])
    backbone, again = weights.load(tmp_path / "ours.pth")  # its words lie beside it
    jax.tree.map(np.testing.assert_array_equal, again, frozen["backbone"])
    assert backbone.tokenizer.identity == composer.backbone.tokenizer.identity
    found = official.load(Artemis(backbone, 0), tmp_path / "ours.pth", {"backbone": again})
    jax.tree.map(np.testing.assert_array_equal, found, params)
    # tuned encoders are written as they became
    tuned = Artemis(composer.backbone, 0, train_backbone=True)
    trained = {"networks": params, "backbone": jax.tree.map(lambda x: x + 0.25, frozen["backbone"])}
    official.save(tuned, tmp_path / "tuned.pth", trained, frozen)
    moved = torch.load(tmp_path / "tuned.pth", weights_only=False)["model"]
    expected = model.state_dict()["txt_enc.embed.weight"] + 0.25
    np.testing.assert_array_equal(moved["txt_enc.embed.weight"], expected)


def test_a_directory_of_the_backbone_comes_back(loaded, tmp_path):
    composer, _, frozen = loaded
    backbone = composer.backbone
    weights.save(tmp_path / "own", backbone, frozen["backbone"])
    again, params = weights.load(tmp_path / "own")
    assert again.config == backbone.config and again.image_transform == backbone.image_transform
    assert again.tokenizer.identity == backbone.tokenizer.identity
    texts = ["is (red) <and> no"]
    np.testing.assert_array_equal(again.tokenizer(texts), backbone.tokenizer(texts))
    jax.tree.map(np.testing.assert_array_equal, params, frozen["backbone"])
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config["text_config"]["vocab_size"] += 1
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=f"has {len(WORDS)} words, the model embeddings of"):
        weights.load(tmp_path / "own")
    del config["text_config"]
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="config.json: no config of ARTEMIS.*'text_config'"):
        weights.load(tmp_path / "own")


def test_cirr_reads_features_of_a_resnet_beside_it(tmp_path):
    model, path = checkpoint(tmp_path, "cirr")
    backbone, params = weights.load(path)
    assert backbone.config.vision.pool == "mean" and backbone.config.text.recurrent == "lstm"
    own = trunk().state_dict()
    kernel = params["vision"]["stage2_0"]["conv2"]["kernel"].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(kernel, own["layer2.0.conv2.weight"])
    ids = backbone.tokenizer(["is red", "has longer sleeves and no collar"], 16)
    # a text is read as it is alone, whatever is beside it
    texts = jax.jit(backbone.encode_text)(params, ids)
    for text, row in zip(texts, ids, strict=True):
        words = model.txt_enc.embed(torch.tensor(row[: list(row).index(3) + 1])[:, None])
        states, _ = model.txt_enc.sent_enc[0](words)
        expected = model.txt_enc.sent_enc[2](states.max(dim=0)[0])[0]
        np.testing.assert_allclose(text, expected.detach().numpy(), atol=1e-5)
    composer, frozen = Artemis(backbone, 0), {"backbone": params}
    networks = official.load(composer, path, frozen)
    official.save(composer, tmp_path / "ours.pth", jax.device_get(networks), frozen)
    content = torch.load(tmp_path / "ours.pth", weights_only=False)
    Reference("cirr").load_state_dict(content["model"], strict=True)  # the ResNet is not in it
    (tmp_path / "resnet152-394f9c45.pth").unlink()
    with pytest.raises(WeightsError, match=r"of torchvision's ResNet-152.*is none. Put one"):
        weights.load(path)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_the_trunk_is_torchvisions(bottleneck):
    theirs = trunk(bottleneck)
    config = ResNetConfig((1, 1, 1, 1), bottleneck, 4)
    table = convert.Names()
    artemis._trunk_names(table, config, "")
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    params = convert.to_ours(tensors, table, ignore=artemis.IGNORE)["vision"]
    images = np.random.default_rng(0).standard_normal((2, 96, 96, 3)).astype(np.float32)
    ours = jax.jit(ResNet(config).apply)({"params": params}, images)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    expected = expected.reshape(2, -1, 3, 3).transpose(0, 2, 3, 1)
    assert np.median(expected.std(axis=(0, 1, 2))) > 1e-2
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_training_begins_with_a_resnet_captions_and_vectors(tmp_path):
    file = tmp_path / "resnet50.pth"
    torch.save(trunk().state_dict() | {"fc.weight": torch.ones(3, 128)}, file)
    vectors = tmp_path / "glove.txt"
    vectors.write_text("red 1 2 3 4 5\nat name@domain.com 9 9 9 9 9\nnobody 0 0 0 0 0\n")
    sizes = {"config": WordConfig(hidden_size=WORD_DIM, state_size=DIM // 2), "dim": DIM}
    artemis.begin(tmp_path / "start", file, CAPTIONS, glove=vectors, **sizes)
    backbone, params = weights.load(tmp_path / "start")
    assert backbone.tokenizer.words == WORDS
    table = params["text"]["embed"]["embedding"]
    np.testing.assert_array_equal(table[WORDS.index("red")], [1, 2, 3, 4, 5])
    others = np.delete(table, WORDS.index("red"), axis=0)
    assert 0.6 < others.std() < 1.4
    mean = params["vision"]["norm1"]["mean"]
    np.testing.assert_array_equal(mean, trunk().state_dict()["bn1.running_mean"])
    vectors.write_text("red 1 2 3\n")
    with pytest.raises(WeightsError, match="glove.txt: 3 numbers of a word, expected 5"):
        artemis.begin(tmp_path / "other", file, CAPTIONS, glove=vectors, **sizes)
    assert not (tmp_path / "other").exists()


def damaged(path, change):
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["model"].pop("img_enc.fc.bias"),
            r"Missing tensors \(1\): img_enc.fc.bias",
        ),
        (
            lambda c: c["model"].update({"img_enc.cnn.extra": torch.ones(2)}),
            r"Tensors nothing takes \(1\): img_enc.cnn.extra",
        ),
        (
            lambda c: c["model"].update({"txt_enc.embed.weight": torch.ones(9, WORD_DIM)}),
            f"_vocab.pkl: {len(WORDS)} words, but .*model_best.pth has embeddings of 9",
        ),
        (lambda c: setattr(c["args"], "data_name", "shoes"), "expected shoes_vocab.pkl beside it"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(tmp_path, change, message):
    _, path = checkpoint(tmp_path)
    damaged(path, change)
    with pytest.raises(WeightsError, match=message):
        weights.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["model"]["txt_enc.sent_enc.bias_ih_l0"].add_(1),
            r"encoders are not those of the backbone .*\(1 tensors, txt_enc.sent_enc.bias_ih_l0 fi",
        ),
        (lambda c: c.pop("args"), "no model_version in its args"),
        (
            lambda c: setattr(c["args"], "model_version", "EM-only"),
            "composer.version=EM-only",
        ),
        (
            lambda c: setattr(c["args"], "model_version", "TIRG"),
            "version='TIRG', expected AR",
        ),
        (lambda c: c["model"].pop("temperature"), r"Missing tensors \(1\): temperature"),
        (
            lambda c: c["model"].update({"Transform_m.0.weight": torch.ones(3, DIM)}),
            r"wrong shapes: transform/kernel \(8, 3\), expected \(8, 8\)",
        ),
    ],
)
def test_networks_of_other_encoders_or_methods_are_refused(loaded, tmp_path, change, message):
    composer, _, frozen = loaded
    _, path = checkpoint(tmp_path)
    damaged(path, change)
    with pytest.raises(WeightsError, match=f"(?i){message}"):
        official.load(composer, path, frozen)


def test_a_vocabulary_is_read_and_never_run(tmp_path):
    path = tmp_path / "cirr_vocab.pkl"
    path.write_bytes(pickled(WORDS))
    assert vocabulary.read(path) == WORDS

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    file = io.BytesIO()
    pickle.dump(Evil(), file)
    for content, message in (
        (file.getvalue(), "no readable vocabulary .it names"),
        (pickled(WORDS)[:-9], "no readable vocabulary"),
        (pickle.dumps(["red"]), "expected a Vocabulary with word2idx"),
        (pickled(WORDS).replace(b"word2idx", b"word2ids"), "expected a Vocabulary with word2idx"),
    ):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=f"cirr_vocab.pkl: {message}.*vocab.py from"):
            vocabulary.read(path)
    assert not (tmp_path / "written").exists()
    with pytest.raises(WeightsError, match="words: begins with red, blue; expected <pad>, <start>"):
        vocabulary.tokenizer(["red", "blue"], "words")
    vocabulary.write(path, WORDS)
    assert vocabulary.read(path) == WORDS
