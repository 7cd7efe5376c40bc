"""launch/triplets.py's work: the same lines, whatever was killed and however many shared it."""

import contextlib
import dataclasses
import json
import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from cir_jax.composers.lincir import LinCir
from cir_jax.composers.pic2word import Pic2Word
from cir_jax.errors import ConfigError, DataError, WeightsError
from cir_jax.input.keywords import DictionaryTagger, clean
from cir_jax.input.tables import Table
from cir_jax.sharding.mesh import make_mesh
from data import build, sharing
from data.text_triplets import captions, editing, embedders, generation, inversion_filter, templates
from data.text_triplets.generation import Recipe, Shard, generate
from data.text_triplets.parts import Growing
from tests.data.corpora import records
from tests.launch import binaries

NOUNS = ("star", "heart", "ring", "cross", "box")
TAG = DictionaryTagger(dict.fromkeys(NOUNS, "NOUN"))
FIVE = {"keywords": "five", "embedder": "x"}
RULES = editing.Rules({"": templates.RTD}, per_caption=2)
RECIPE = Recipe(RULES, least=3, band=(0.5, 0.999))


class Killed(BaseException):
    pass


def embedder() -> embedders.Embedder:
    features = np.random.default_rng(0).random((len(NOUNS), 4), np.float32)
    return embedders.Embedder(lambda texts: features[[NOUNS.index(t) for t in texts]], {"e": "x"})


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(generation, "BLOCK", 8)
    monkeypatch.setattr(generation, "POLL", 0.01)
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "captions.txt"
    rng = np.random.default_rng(0)
    lines = [f"{i} a {rng.choice(NOUNS)} by a {rng.choice(NOUNS)}" for i in range(100)]
    lines[50:53] = ["", "nothing known", "a \u2028 star"]  # the middle one ends lines for some
    file.write_text("\n".join(lines))
    return file


class Longer(inversion_filter.InversionFilter):
    """Keeps captions of an even number of words, whatever they are inverted to."""

    def __init__(self):
        self.identity, self.seen = {"phi": "none"}, []

    def similarities(self, captions, streams):
        self.seen += list(zip(captions, streams, strict=True))
        return np.asarray([0.75 - (len(c.split()) % 2) * 1e-3 for c in captions], np.float32)


def run(texts, output, **changes):
    source = captions.read(str(texts), Path("/nowhere"), {})
    arguments = dict(
        recipe=RECIPE, tag=TAG, embedder=embedder, names={"keywords": "five", "embedder": "x"}
    )
    return generate(source, output, **(arguments | changes))


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """What one process writes that nothing stops, and its statistics."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIR_JAX_CACHE", str(folder / "cache"))
        patch.setattr(generation, "BLOCK", 8)
        statistics = run(texts, folder / "t.jsonl")
    assert sorted(p.name for p in folder.iterdir()) == ["cache", "t.jsonl"]
    return (folder / "t.jsonl").read_bytes(), statistics


def test_the_triplets_are_read_by_the_builder(whole, tmp_path):
    content, statistics = whole
    (tmp_path / "t.jsonl").write_bytes(content)
    lines = [json.loads(line) for line in content.decode().split("\n")[:-1]]
    fields = [
        *generation.NAMES.values(),
        "conditioning_caption",
        "source_keyword",
        "target_keyword",
    ]
    assert all(list(line) == fields for line in lines)
    for line in lines:  # of a deletion there is no target
        words = (line["source_keyword"], line["target_keyword"])
        reference, target = (line[name].lower() for name in generation.NAMES.values())
        assert words[0] in NOUNS and words[0] in reference
        assert editing.replaced(reference, *words) == target and words[1] in ("", *NOUNS)
    read = records("text_triplets", tmp_path)
    assert [r["text"] for r in read] == [line["conditioning_caption"] for line in lines]
    assert sum(statistics[kind] for kind in templates.KINDS) == len(lines) > 150
    assert statistics["captions"] == 99 and statistics["empty"] == 1
    assert statistics["captions without"] == 1 and statistics["filtered"] == 0
    assert f"{len(lines):,} triplets (" in generation.describe(statistics)
    assert len({line["conditioning_caption"] for line in lines}) > 120  # each caption draws anew
    assert any("\u2028" in line["reference_caption"] for line in lines)


@contextlib.contextmanager
def dying(monkeypatch, where, block):
    """Writing this block ends the run, with half of it and of its journal's line on the disk."""
    add = Growing.add

    def dies(self, lines, note):
        if self.path.name.startswith(where) and len(self.blocks) == block:
            for file in (self.path, self.path.with_name(self.path.name + ".journal")):
                with file.open("ab") as half:
                    half.write(b'{"half')
            raise Killed
        add(self, lines, note)

    with monkeypatch.context() as patch:
        patch.setattr(Growing, "add", dies)
        yield


@pytest.mark.parametrize("where", ["keywords", "triplets"])
@pytest.mark.parametrize("block", [0, 4])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    whole, texts, tmp_path, monkeypatch, where, block
):
    output = tmp_path / "t.jsonl"
    for at in (block, block + 2):  # what the first kill leaves is no stumbling block for the second
        with dying(monkeypatch, where, at), pytest.raises(Killed):
            run(texts, output)
    assert not output.exists()
    tagged = []

    def tag(text):
        tagged.append(text)
        return TAG(text)

    assert run(texts, output, tag=tag) == whole[1]
    assert output.read_bytes() == whole[0]
    # what was done is not done again
    assert len(tagged) == {"keywords": 99 - 8 * (block + 2), "triplets": 0}[where]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "t.jsonl"]


def test_a_run_killed_right_before_its_end(whole, texts, tmp_path, monkeypatch):
    output = tmp_path / "t.jsonl"

    def dies(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(generation.shutil, "rmtree", dies)
        with pytest.raises(Killed):
            run(texts, output)
    assert output.read_bytes() == whole[0]
    os.rename(output, tmp_path / "away.jsonl")
    with pytest.raises(DataError, match="t.jsonl: was written, and is gone. Delete .*parts"):
        run(texts, output)
    os.rename(tmp_path / "away.jsonl", output)
    assert run(texts, output) == whole[1] and output.read_bytes() == whole[0]
    assert not (tmp_path / "t.jsonl.parts").exists()


def test_shards_make_the_lines_of_one_run(whole, texts, tmp_path, capsys, monkeypatch):
    output = tmp_path / "t.jsonl"
    shards = [Shard.read(f"{i}/3") for i in range(3)]
    with dying(monkeypatch, "keywords", 2), pytest.raises(Killed):
        run(texts, output, shard=shards[1])
    # each alone: what it needs of the others is not there yet
    assert [run(texts, output, shard=s, wait=False) for s in shards[:2]] == [None, None]
    assert "keywords of other shards are not there yet (counts-00001.json, counts-0000" in (
        capsys.readouterr().err
    )
    assert run(texts, output, shard=shards[2], wait=False) is None
    assert "alternatives of other shards are not there yet (voc" in capsys.readouterr().err
    with dying(monkeypatch, "triplets", 1), pytest.raises(Killed):
        run(texts, output, shard=shards[0])
    found = [run(texts, output, shard=s, wait=False) for s in shards]
    files = sorted(tmp_path.glob("*.jsonl"))
    assert [f.name for f in files] == [f"t-0000{i}-of-00003.jsonl" for i in range(3)]
    lines = [line for f in files for line in f.read_bytes().split(b"\n")[:-1]]
    assert sorted(lines) == sorted(whole[0].split(b"\n")[:-1])
    assert {key: sum(s[key] for s in found) for key in found[0]} == whole[1]
    assert not (tmp_path / "t.jsonl.parts").exists()


def test_a_shard_waits_for_the_others(texts, tmp_path, monkeypatch):
    output, others = tmp_path / "t.jsonl", [Shard(1, 2), Shard(0, 2)]

    def meanwhile(seconds):  # another process goes on
        if others:
            run(texts, output, shard=others.pop(), wait=False)

    assert run(texts, output, shard=Shard(1, 2), wait=False) is None
    others = [Shard(0, 2)]
    monkeypatch.setattr(generation.time, "sleep", meanwhile)
    assert run(texts, output, shard=Shard(1, 2)) is not None and not others


def test_the_filter_wants_both_captions(whole, texts, tmp_path):
    lines = [json.loads(line) for line in whole[0].decode().split("\n")[:-1]]
    keep = Longer()
    statistics = run(texts, tmp_path / "t.jsonl", keep=keep)
    odd = [any(len(line[name].split()) % 2 for name in generation.NAMES.values()) for line in lines]
    kept = [line for line, bad in zip(lines, odd, strict=True) if not bad]
    found = [json.loads(x) for x in (tmp_path / "t.jsonl").read_text().split("\n")[:-1]]
    assert found == kept and 0 < len(kept) < len(lines)
    assert statistics["filtered"] == sum(odd)
    assert len({stream for _, stream in keep.seen}) == len(keep.seen) == 2 * len(lines)
    strict = dataclasses.replace(RECIPE, threshold=0.751)
    assert run(texts, tmp_path / "s.jsonl", keep=keep, recipe=strict)["filtered"] == len(lines)


def test_what_is_refused(texts, tmp_path):
    output, parts = tmp_path / "t.jsonl", tmp_path / "t.jsonl.parts"
    with pytest.raises(ConfigError, match="--output=.*t.json: expected a name that ends in .jsonl"):
        run(texts, tmp_path / "t.json")
    with pytest.raises(DataError, match="is in .*captions|in 1,000 captions or more"):
        run(texts, output, recipe=dataclasses.replace(RECIPE, least=1000))
    with pytest.raises(DataError, match=r"none of 5 keywords .* of 0.999 to 1.0. Their simil.*: 0"):
        run(texts, output, recipe=dataclasses.replace(RECIPE, band=(0.999, 1.0)))
    tagged = []
    assert run(texts, output, tag=tagged.append) and not (
        tagged or parts.exists()
    )  # counted keywords serve another recipe
    with pytest.raises(DataError):
        run(texts, output, recipe=dataclasses.replace(RECIPE, least=1000))
    message = "of other captions or keywords .keywords five, now six; shards 1, now 2"
    with pytest.raises(DataError, match=message):
        run(texts, output, names={**FIVE, "keywords": "six"}, shard=Shard(0, 2))
    with sharing.alone(parts / "lock-00000"):
        with pytest.raises(DataError, match="lock-00000: another process makes these triplets"):
            run(texts, output)
    settings = parts / "settings.json"
    settings.write_text("{")
    with pytest.raises(DataError, match="settings.json: damaged"):
        run(texts, output)
    settings.unlink()
    file = parts / "keywords-00000.jsonl"
    (parts / "counts-00000.json").unlink()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="keywords-00000.jsonl: has .* its journal says"):
        run(texts, output)
    (parts / "keywords-00000.jsonl.journal").write_text("[]\n")
    with pytest.raises(DataError, match="journal: damaged .*begin again"):
        run(texts, output)

    def absent():
        raise WeightsError("no such model")

    calls = []
    with pytest.raises(WeightsError):  # before the captions are read
        run(texts, tmp_path / "u.jsonl", embedder=absent, tag=calls.append)
    assert not calls


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(RULES, band=(0.7, 0.5)), "--similarity=0.7,0.5: expected two cosines"),
        (lambda: Recipe(RULES, band=(0.5, 1.5)), "--similarity"),
        (lambda: Recipe(RULES, least=0), "--min_count=0: expected 1 or more"),
        (lambda: Recipe(editing.Rules({}, per_caption=0)), "--per_caption=0"),
        (lambda: generation.read_band(["0.5"]), "--similarity=0.5: expected two numbers"),
        (lambda: generation.read_band(["a", "b"]), "--similarity=a,b: expected two numbers"),
        (lambda: Shard.read("3/3"), "--shard=3/3: expected I/N"),
        (lambda: Shard.read("-1/3"), "--shard=-1/3"),
        (lambda: Shard.read("1"), "--shard=1: "),
    ],
)
def test_settings_that_cannot_work(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_captions_of_files_and_tables(tmp_path):
    data_dir = tmp_path / "data"
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    source = captions.read(str(tmp_path / "a.jsonl"), data_dir, {})
    with pytest.raises(DataError, match="a.jsonl line 2: text is 3.*--allow_partial"):
        list(source.entries(0))
    (tmp_path / "b.csv").write_text("id,said\n1,a star\n2,\n3,a ring\n")
    source = captions.read(str(tmp_path / "b.csv"), data_dir, {"text": "said"})
    assert [e.captions for e in source.entries(0)] == [["a star"], [""], ["a ring"]]
    assert [e.captions for e in source.entries(2)] == [["a ring"]]
    for name in ("nothing", "no/captions", "nothing:train"):
        with pytest.raises(DataError, match=f"--captions={name}: neither a file"):
            captions.read(name, data_dir, {})
    source = captions.read("shapes_tiny/captions", data_dir, {})  # made, as it was not there
    table = Table(data_dir, "shapes_tiny", "captions", "train")
    assert source.total == len(table) and source.identity == table.identity()
    ((several, done),) = [e for e in source.entries(255)]
    assert done == 256 and several == [c.decode() for c in table[255]["captions"]]
    part = captions.read("shapes_tiny/captions:train[:3]", data_dir, {})
    assert part.total == 3
    build.prepare("shapes_tiny", ["circo"], data_dir)
    with pytest.raises(DataError, match="has no field captions; its fields are"):
        captions.read("shapes_tiny/circo:val", data_dir, {})


def test_features_are_computed_once(tmp_path):
    made, calls = embedder(), []

    def encode(texts):
        calls.append(len(texts))
        return made.encode(texts)

    counting = dataclasses.replace(made, encode=encode)
    first = embedders.stored_features(counting, NOUNS, tmp_path)
    np.testing.assert_array_equal(first, made.encode(NOUNS))
    np.testing.assert_array_equal(embedders.stored_features(counting, NOUNS, tmp_path), first)
    assert calls == [5]
    embedders.stored_features(dataclasses.replace(counting, identity={}), NOUNS, tmp_path)
    embedders.stored_features(counting, NOUNS[1:], tmp_path)
    assert calls == [5, 5, 4]


def test_sentence_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"sbert:x: .*pip install cir_jax\[triplets\]"):
        embedders.read("sbert:x")

    def absent(name):
        raise OSError("x is no model\nof any kind")

    package = types.SimpleNamespace(SentenceTransformer=absent)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    with pytest.raises(WeightsError, match="sbert:x: no sentence transformer .* .x is no"):
        embedders.read("sbert:x")


@pytest.fixture(scope="module")
def inversion(tiny):
    """A filter of a random LinCIR, without `cir_jax.load`."""
    made = object.__new__(inversion_filter.InversionFilter)
    made.composer, made.mesh = LinCir(tiny[0]), make_mesh({"data": -1})
    made.params = jax.jit(made.composer.init)(jax.random.key(0))
    made.frozen = made.composer.freeze(tiny[1])
    return made


def test_the_filter_is_lincirs_inversion(inversion, tiny):
    backbone, params = tiny
    texts = ["A red star", "a photo of $ red circle", "blue star and two"]
    composer, n = inversion.composer, 32
    names = [f"{i}/{j}" for i in range(3) for j in range(n)]
    found = inversion.similarities([text for text in texts for _ in range(n)], names)
    ids = backbone.tokenizer([clean(text, backbone.tokenizer) for text in texts])
    prompt = np.repeat(backbone.tokenizer(["a photo of $"]), 3, axis=0)

    @jax.jit
    def without_noise(params, frozen):
        caption = backbone.encode_text(frozen["backbone"], ids)
        word = composer.words(params, caption)
        return caption, composer.text_features(frozen["backbone"], prompt, word)

    a, b = map(np.asarray, without_noise(inversion.params, inversion.frozen))
    plain = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    found = found.reshape(3, n)
    assert (found.std(axis=1) > 1e-6).all() and len(set(found.ravel().tolist())) > 2 * n
    assert (np.abs(found.mean(axis=1) - plain) < 3 * found.std(axis=1)).all()
    # whatever is beside it, and without the placeholder, as LinCIR reads captions
    (one,) = inversion.similarities(["a photo of red circle"], names[n : n + 1])
    np.testing.assert_allclose(one, found[1, 0], atol=2e-6)
    assert inversion.similarities([], []).shape == (0,)


def test_the_filter_is_of_a_lincir(tiny, monkeypatch):
    loaded = types.SimpleNamespace(composer=Pic2Word(tiny[0]))
    monkeypatch.setattr(inversion_filter, "load", lambda what, weights: loaded)
    with pytest.raises(ConfigError, match="--filter=w: a Pic2Word, expected a LinCIR"):
        inversion_filter.InversionFilter("w")


def test_the_binary(tmp_path):
    (tmp_path / "c.txt").write_text("a small red star\na large blue ring on white\n" * 40)
    flags = (
        f"--captions={tmp_path / 'c.txt'}", f"--output={tmp_path / 'made' / 't.jsonl'}",
        "--keywords=data/shapes/parts_of_speech.json", "--parts=NOUN,ADJ", "--min_count=40",
        "--similarity=0.5,0.9", "--embedder=data/shapes/clip", "--deletions=modifiers",
    )  # fmt: skip
    status, said = binaries.run("triplets", *flags, scratch=tmp_path)
    assert status == 0, said
    assert "7 keywords, 7 of them in 40 captions or more, 7 of these with an alternative" in said
    made = [json.loads(line) for line in (tmp_path / "made/t.jsonl").read_text().splitlines()]
    assert len(made) == 80 and "80 triplets" in said
    status, said = binaries.run("triplets", *flags[1:], "--captions=nowhere", scratch=tmp_path)
    assert status == 2 and "error: --captions=nowhere: neither" in said
