"""A composer as others get it: the same numbers from another directory, and nothing of this one."""

import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest
from huggingface_hub import ModelCard
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import cir_jax
from cir_jax import experiment as experiments
from cir_jax import loading, weights
from cir_jax.composers import shared
from cir_jax.errors import CheckpointError, ConfigError, DataError, WeightsError
from cir_jax.evaluation import runner, sharing
from cir_jax.input import images, vocabulary
from cir_jax.models.artemis import Artemis, ArtemisConfig, ResNetConfig, WordConfig
from cir_jax.models.backbone import Backbone
from cir_jax.retrieval.search import Searcher
from cir_jax.sharding.mesh import make_mesh
from cir_jax.storage import digests
from cir_jax.weights import files
from experiments import base

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 24, 3), np.uint8)
SMALL = {
    "slerp": {},
    "pic2word": {"hidden_dim": 8},
    "searle": {"phrases": "book.json", "top_k": 1},
    "pdv": {"word.phrases": "book.json", "word.names": "names.txt", "word.iterations": 2},
    "combiner": {"projection_dim": 8, "hidden_dim": 8},
    "compodiff": {"depth": 1, "heads": 2, "dim_head": 8, "steps": 2},
    "rtd": {"word.hidden_dim": 8},
    "tat": {"rank": 2},
    "artemis": {"embed_dim": 0, "train_backbone": True},
}

ASKED = ("slerp", "searle", "pdv", "rtd", "artemis")
"""Others get these with other settings, or a tokenizer of its own."""


def save_backbone(folder, name, tiny):
    """A random CLIP that lies here alone; of ARTEMIS encoders with a vocabulary of their own."""
    backbone, params = tiny
    if name == "artemis":
        words = vocabulary.tokenizer(vocabulary.build(["is red not blue"]), "words")
        sizes = WordConfig(words.vocab_size, 12, "bigru", 8)
        config = ArtemisConfig(sizes, ResNetConfig((1, 1, 1, 1), True, 4), 16)
        backbone = Backbone(Artemis(config), words, images.artemis(), "own")
        params = drawn(backbone.init)
    weights.save(folder, backbone, params)


def drawn(init):
    """Parameters of the shapes that `init` makes, above 0 as variances are; nothing is compiled."""
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: rng.uniform(0.01, 0.2, x.shape).astype(x.dtype),
        jax.eval_shape(init, jax.random.key(0)),
    )


def made(name, folder, tiny, monkeypatch=None):
    """An experiment on files in `folder`, and its parameters as if they were trained there."""
    save_backbone(folder / "toy", name, tiny)
    book = {"concepts": {"star": ["a red star"], "circle": ["a blue circle", "a circle"]}}
    (folder / "book.json").write_text(json.dumps(book))
    (folder / "names.txt").write_text("star\ncircle\nstar\n")
    config = loading.read_experiment("pdv:searle_oti" if name == "pdv" else f"{name}:smoke")
    config.backbone, config.data_dir = str(folder / "toy"), str(folder / "data")
    config.composer.update_from_flattened_dict(
        {k: str(folder / v) if str(v).startswith(("book", "names")) else v
         for k, v in SMALL[name].items()}
    )  # fmt: skip
    experiment = experiments.setup(config)
    params = {}
    if experiment.composer.trained:
        params = drawn(experiment.composer.init)
        tables = {"Table(toy/triplets:train@1.0.0)": {"records": 7, "lengths": [7]}}
        position = {"next_batch": 3, "steps": 4, "tables": tables}
        trained = runner.Trained(params, "a_stage", position)
        monkeypatch.setattr(runner, "trained", lambda *_: trained)
    return experiment, params


def answer(composer, params, frozen):
    """A query, on one device: there is less to compile."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    return Searcher(composer, params, jax.device_get(frozen), mesh=mesh).query(PIXELS, "is red")


@pytest.mark.parametrize("name", SMALL)
def test_it_answers_alike_from_another_directory(name, tiny, tmp_path, monkeypatch):
    """Asked itself, unless it has the same settings: then parameters are all that could differ."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    experiment, params = made(name, here, tiny, monkeypatch)
    experiment = experiments.for_evaluation(experiment)
    sharing.write(experiment, None, tmp_path / "shared")
    asked = name in ASKED and answer(experiment.composer, params, experiment.frozen)
    monkeypatch.undo()
    shutil.rmtree(here)
    (tmp_path / "shared").rename(there)
    monkeypatch.chdir(there.parent)
    search = cir_jax.load("there")
    for ours, theirs in ((params, search.params), (experiment.frozen, search.frozen)):
        ours, theirs = jax.device_get(ours), jax.device_get(theirs)
        if name == "searle" and "phrases" in ours:
            ours = {key: tree for key, tree in ours.items() if key != "phrases"}
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    if name in ASKED:
        again = answer(search.composer, *jax.device_get((search.params, search.frozen)))
        np.testing.assert_array_equal(again, asked)
    else:
        assert search.composer.settings == experiment.composer.settings
    written = {path.relative_to(there): path for path in there.rglob("*") if path.is_file()}
    assert {path.suffix for path in written} <= {".json", ".safetensors", ".md", ".txt"}
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in written.values())
    assert (there / "model.safetensors").is_file() == bool(params)
    assert {path.stat().st_mode & 0o777 for path in written.values()} == {0o644}
    card = ModelCard.load(there / "README.md")
    assert card.data.library_name == "cir_jax" and card.data.pipeline_tag
    assert {"composed-image-retrieval", name} <= set(card.data.tags)
    assert card.data.eval_results is None  # nothing was measured
    assert card.data.datasets == (["toy"] if params else None)
    assert ("3 of 4" in card.text) == bool(params)


def test_a_backbone_of_the_hub_is_named_and_checked(tiny, tmp_path, monkeypatch):
    """Not included, and looked for again by that name; other weights of that name are refused."""
    experiment, _ = made("slerp", tmp_path, tiny)
    experiment.config.backbone = "org/clip"
    sharing.write(experiment, None, tmp_path / "shared")
    assert not (tmp_path / "shared" / "backbone").exists()
    assert ModelCard.load(tmp_path / "shared" / "README.md").data.base_model == ["org/clip"]
    assert "`org/clip`, is fetched" in (tmp_path / "shared" / "README.md").read_text()
    asked = []
    monkeypatch.setattr(
        experiments.weights, "load", lambda name, *_, **__: asked.append(name) or tiny
    )
    with pytest.raises(WeightsError, match=r"made on the backbone toy@\w+, this one is tiny@0"):
        cir_jax.load(tmp_path / "shared")
    assert asked == ["org/clip"]
    monkeypatch.undo()
    monkeypatch.setattr(files, "to_fetch", lambda name: "605 MB")
    assert loading.to_fetch(tmp_path / "shared") == {"org/clip": "605 MB"}
    search = cir_jax.load(tmp_path / "shared", backbone=tmp_path / "toy")  # the same, from here
    assert search.composer.alpha == 0.8


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """A training-free composer, and where it was written; read alone."""
    folder = tmp_path_factory.mktemp("written")
    experiment, _ = made("slerp", folder, tiny)
    sharing.write(experiment, None, folder / "shared")
    return experiment, folder / "shared"


@pytest.fixture
def slerp(written, tmp_path):
    """The same to be changed."""
    shutil.copytree(written[1], tmp_path / "shared")
    return written[0], tmp_path / "shared"


def results_of(experiment, folder, **changes):
    """A results.json of one result, as `report.to_dict` makes it, which these weights have."""
    composer = experiments.for_evaluation(experiment).composer
    setting = {
        "method": json.loads(json.dumps(dict(composer.settings))),
        "beside": {},
        "trained": "",
        "weights_id": composer.backbone.weights_id,
        "preprocessing": repr(composer.backbone.image_transform),
        "dtype": "float32",
    }
    result = {
        "benchmark": "shapes/circo", "split": "test_0", "protocol": "circo(gallery=all)",
        "partial": False, "data": "shapes@1.0.0", "setting_id": "12345678",
        "counts": {"queries": 12, "gallery": 34}, "headline": ["mAP@10"],
        "metrics": {"mAP@10": {"value": 12.5, "se": 1.25, "n": 12},
                    "R@1": {"value": 1.0, "se": None, "n": 12}},
    }  # fmt: skip
    result |= {"setting": setting | changes.pop("setting", {})} | changes
    baseline = result | {"setting": result["setting"] | {"method": {"name": "text_only"}}}
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"results": [baseline, result]}))
    return folder


def test_the_card_has_the_numbers_that_belong_to_it(slerp, tmp_path, capsys):
    experiment, target = slerp
    (target / "old").mkdir()
    (tmp_path / "link").symlink_to(target)
    sharing.write(experiment, results_of(experiment, tmp_path / "run"), tmp_path / "link")
    assert not (target / "old").exists()  # all is replaced
    assert {path.name for path in tmp_path.iterdir()} == {"run", "shared", "link"}
    card = ModelCard.load(target / "README.md")
    (found,) = card.data.eval_results
    assert (found.task_type, found.dataset_type) == ("composed-image-retrieval", "shapes/circo")
    assert (found.metric_type, found.metric_value) == ("mAP@10", 12.5)
    assert (found.dataset_name, found.dataset_split) == ("shapes@1.0.0", "test_0")
    assert (found.dataset_config, found.dataset_args["setting"]) == (
        "circo(gallery=all)",
        "12345678",
    )
    assert found.metric_args == {"se": 1.25, "n": 12}
    assert "| 12.50 ± 1.25 |" in card.text and "`12345678`" in card.text
    assert "no stand-in for published ones" in card.text
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"partial": True},
        {"setting": {"trained": "slerp@other"}},
        {"setting": {"weights_id": "clip@other"}},
        {"setting": {"method": {"name": "slerp", "alpha": 0.5}}},
        {"setting": {"beside": {"phrases": "another book"}}},
        {"setting": {"asked": {"negative_text": "a star"}}},
    ],
)
def test_numbers_of_something_else_are_left_out(written, tmp_path, capsys, changes):
    experiment, _ = written
    composer = experiments.for_evaluation(experiment).composer
    folder = results_of(experiment, tmp_path / "run", **changes)
    assert sharing._results(composer, "", folder) == []
    assert "1 of its results are of other weights or settings" in capsys.readouterr().out


def change_config(folder, **changes):
    """Its config.json with other values, and a digest of it."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "digests.json").unlink()
    digests.add(folder, leave_out=("README.md",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "backbone/toy/model.safetensors").unlink(),
         "incomplete or damaged: backbone/toy/model.safetensors is missing. Copy it again"),
        (lambda d: (d / "backbone/toy/config.json").write_text("{}"), "has 2 bytes instead of"),
        (lambda d: (d / "digests.json").unlink(), "no digests.json, so nothing says"),
        (lambda d: (d / "digests.json").write_text("{}"), "digests.json: damaged"),
        (lambda d: change_config(d, format=2), "format 2; this version of cir_jax reads up to 1"),
        (lambda d: change_config(d, trained="slerp@1"), "model.safetensors missing in digests"),
        (lambda d: change_config(d, made=None), "no field 'made' as cir_jax writes it"),
        (lambda d: change_config(d, backbone={"included": ""}), "neither included nor a hub id"),
        (lambda d: change_config(d, experiment={"composer": 3}), "its experiment names no comp"),
        (lambda d: change_config(d, experiment={"backbone": "a/b", "composer": {}}),
         "its experiment: its field 'stage' is no object. Get it again"),
    ],
)  # fmt: skip
def test_what_is_not_whole_says_so(slerp, change, message):
    change(slerp[1])
    with pytest.raises(WeightsError, match=message):
        cir_jax.load(slerp[1])


def test_names_stay_inside(slerp):
    """A stranger's list of files, and a stranger's config, name nothing else of this machine."""
    _, target = slerp
    listed = {"../secret": (1, "0" * 64)}
    (target / "digests.json").write_bytes(digests._text(listed))
    with pytest.raises(WeightsError, match="'../secret' leads out of the directory"):
        cir_jax.load(target)
    about = {"library_name": "cir_jax", "format": 1, "trained": "", "made": {}, "files": {}}
    about |= {"backbone": {"included": ""}}
    values = {"backbone": "/etc", "composer": {"name": "slerp"}, "export_to": "/etc/passwd"}
    (target / "config.json").write_text(json.dumps(about | {"experiment": values}))
    with pytest.raises(WeightsError, match="backbone '/etc' is neither included nor a hub id"):
        shared.read_config(target)
    values["backbone"] = "org/clip"
    (target / "config.json").write_text(json.dumps(about | {"experiment": values}))
    assert shared.read_config(target)["export_to"] == ""


def test_parameters_of_another_method_are_refused(tiny, tmp_path, monkeypatch):
    experiment, _ = made("pic2word", tmp_path, tiny, monkeypatch)
    sharing.write(experiment, None, tmp_path / "shared")
    config = loading.read_experiment("tat:smoke")
    config.backbone, config.init_from = str(tmp_path / "toy"), f"hub:{tmp_path / 'shared'}"
    monkeypatch.undo()
    with pytest.raises(WeightsError, match=r"\(of a pic2word\): not the parameters of this Tat"):
        runner.trained(experiments.setup(config), None)
    file = tmp_path / "shared" / "model.safetensors"
    save_file(load_file(file) | {"more/kernel": np.zeros(2, np.float32)}, file)
    with pytest.raises(WeightsError, match="on one side only are more/kernel"):
        shared.load(experiment.composer, file.parent)
    file.write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="model.safetensors has 10 bytes instead of"):
        cir_jax.load(tmp_path / "shared")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("pretrain", {}, "pretrain trains a backbone: write that"),
        ("searle_oti", {"composer.words": "DIR"}, "composer.words='DIR': words of a benchmark"),
        ("slerp", {"export_to": "hub:"}, "'hub:': write hub:DIR"),
        ("slerp", {"export_to": "hub:experiments"}, "something else than a composer of cir_jax"),
        ("slerp", {"export_to": "hub:gs://bucket/x"}, "must lie on a disk of this machine"),
    ],
)
def test_what_cannot_be_shared_is_said_before_training(name, changes, message):
    config = loading.read_experiment(f"{name}:smoke")
    config.update_from_flattened_dict({"export_to": "hub:nowhere"} | changes)
    with pytest.raises(ConfigError, match=message):
        experiments._check_export_to(config, composer=None)  # it is not asked


def test_what_is_of_a_machine_is_as_a_new_experiment_has_it():
    new = base.experiment("any", {"name": "slerp"}).to_dict()
    assert {name: new[name] for name in shared.HERE} == shared.HERE
    given = ConfigDict(new | {"workers": 3, "threads": 5, "prefetch": 7, "data_dir": "/data"})
    found = shared._experiment(given, True)
    assert {name: found[name] for name in shared.HERE} == shared.HERE


def test_a_backbone_that_is_not_read_back_as_it_was_is_refused(tiny, tmp_path):
    with pytest.raises(WeightsError, match=r"backbone tiny@0: written and read again it is toy@"):
        shared._write_backbone(tmp_path / "toy", *tiny)


def test_half_of_a_pair_that_lies_here_is_refused(tmp_path):
    (tmp_path / "toy").mkdir()
    with pytest.raises(WeightsError, match="two models in one.*toy lies here alone"):
        weights.hub_ids(f"org/clip+{tmp_path / 'toy'}")
    assert weights.hub_ids("org/clip+org/other") == ("org/clip", "org/other")


def test_what_only_training_reads_stays_here():
    config = loading.read_experiment("rtd:searle")
    config.composer.word.phrases = "/home/me/book.pkl"
    config.stage.oti.composer.phrases = "/home/me/book.pkl"
    values = shared._experiment(config, True)
    assert values["composer"]["word"]["phrases"] == ""
    assert values["stage"]["oti"]["composer"]["phrases"] == "book.pkl"  # what is told of it
    isa = loading.read_experiment("isa:efficientnet_b0").composer.to_dict()
    found = shared.composers.for_others(isa | {"phrase_weight": 0.5, "phrases": "/home/book"})
    assert (found["pretrained"], found["phrases"], found["phrase_weight"]) == (False, "", 0.0)
    with pytest.raises(ConfigError, match="/my/encoder"):
        shared.composers.for_others(isa | {"query_encoder": "/my/encoder"})


def test_a_workdir_without_a_checkpoint_is_not_shared(tmp_path):
    config = loading.read_experiment("lincir:smoke")
    with pytest.raises(CheckpointError, match="no checkpoint of smp. Train first"):
        sharing.write(experiments.setup(config), tmp_path / "run", tmp_path / "shared")
    assert not list(tmp_path.iterdir())


def test_a_workdir_is_told_from_a_composer(tmp_path):
    config = loading.read_experiment("lincir:smoke")
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    with pytest.raises(WeightsError, match="of a workdir of launch/main.py, .* given as --workdir"):
        loading.read_shared(tmp_path)


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, FULL), SafetensorError(f"Error while serializing: I/O error: {FULL}")],
)
def test_there_is_no_room(written, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(shared, "write", full)
    with pytest.raises(DataError, match=f"new: cannot be written .{FULL}.. Make room, or"):
        sharing.write(written[0], None, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_results_that_are_none(slerp, tmp_path):
    (tmp_path / "results.json").write_text('{"results": [{}]}')
    with pytest.raises(DataError, match="results.json: not as launch/eval.py writes it"):
        sharing.write(slerp[0], tmp_path, slerp[1])
    assert cir_jax.load(slerp[1]).composer.alpha == 0.8  # what was there is there
