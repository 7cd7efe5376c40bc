"""The papers' tables, recomputed on small weights under the published names and dummy data."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

from benchmarks import reproduce
from benchmarks import reproduce_recipes as recipes
from cir_jax import composers, weights
from cir_jax.composers import official
from cir_jax.evaluation import benchmarks, published
from cir_jax.loading import read_experiment
from data import build
from tests.data.dummies import ROOT, dummy

CLIP = "openai/clip-vit-base-patch32"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Data of CIRCO, a small CLIP and a random phi, as if they were those of SEARLE's paper."""
    folder = tmp_path_factory.mktemp("reproduce")
    build.prepare("circo", None, folder / "data", source=dummy("circo"), allow_partial=True)
    shutil.copytree(ROOT / "data" / "shapes" / "clip", folder / "weights" / CLIP)
    return folder


def arguments(here: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        "--paper=searle", f"--weights={here / 'weights'}", f"--data_dir={here / 'data'}",
        f"--workdir={tmp_path / 'runs'}", f"--output={tmp_path / 'REPRODUCTION.md'}", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("paper", reproduce.PAPERS)
def test_every_row_has_a_recipe_whose_config_exists(paper):
    rows, configs = published.of_paper(paper), {}
    assert len(rows) >= 60
    for row in rows:
        recipe = recipes.recipe(row)
        if recipe not in configs:
            configs[recipe] = reproduce._config(recipe)
        config = configs[recipe]
        # the method of the row is what is evaluated; RTD is around it
        names = (config.composer.name, recipe.config.partition(":")[2].partition("_")[0])
        assert row.method in names, (row, recipe)
        backbone, _, _ = row.backbone.partition(",")
        base, _, tuned = backbone.partition(" ")[0].partition("+")
        if not recipe.made and base in recipes.BACKBONES and "COCO" not in row.backbone:
            first = config.backbone.split("+")[0]
            assert first == recipes.BACKBONES[base], (row, recipe)
        assert bool(tuned) == (bool(recipe.made) or recipe.config.startswith("rtd:"))
        if recipe.trained:
            assert recipe.config.partition(":")[0] in recipes.CORPORA
        plain = recipes.recipe(dataclasses.replace(row, variant=""))
        if row.variant and row.variant != "noise 0.5":  # an ablation is another run
            runs = [(reproduce._config(one).to_json_best_effort(), one.corpus, one.made_with)
                    for one in (plain, recipe)]  # fmt: skip
            assert runs[0] != runs[1], row
        if recipe.made:
            assert reproduce._config(recipe.maker).composer.name == recipe.made.partition(":")[0]
        if recipe.begins and recipe.begins not in recipes.ORIGINS:
            assert reproduce._config(recipes.Recipe(recipe.begins)).stages
        for name in (*recipe.official, *(name for _, name in recipe.beside)):
            assert name in (*recipes.ORIGINS, recipes.EDITOR)
    # no two ways to a number share a folder
    assert len({recipe.slug for recipe in configs}) == len(configs)
    with pytest.raises(KeyError):
        recipes.recipe(published.rows("circo:magiclens", "test", ["magiclens"])[0])
    with pytest.raises(KeyError, match="otherwise"):
        recipes.recipe(dataclasses.replace(rows[0], method="isa", backbone="blip_b, symmetric",
                                           variant="otherwise"))  # fmt: skip


def found(paper, method, backbone, **said):
    """The recipes of a paper's rows, and their configs."""
    rows = [
        row
        for row in published.of_paper(paper)
        if (row.method, row.backbone) == (method, backbone)
        and all(getattr(row, name) == value for name, value in said.items())
    ]
    made = {recipes.recipe(row) for row in rows}
    assert made
    return [(recipe, reproduce._config(recipe)) for recipe in made]


def only(paper, method, backbone, **said):
    ((recipe, config),) = found(paper, method, backbone, **said)
    return recipe, config


def test_alpha_preprocessing_and_stages_are_the_papers():
    assert only("slerp", "slerp", "clip_l14", benchmark="cirr")[1].composer.alpha == 0.9
    assert only("slerp", "slerp", "clip_l14", benchmark="circo")[1].composer.alpha == 0.8
    assert only("searle", "text_only", "clip_b32")[1].preprocessing == "targetpad"
    slerps = found("slerp", "text_only", "clip_b32")
    assert all(config.preprocessing == "" for _, config in slerps)
    one, both = (
        only("compodiff", "compodiff", "clip_l14", variant="",
             source=f"compodiff, {stages}, sampling unstated")
        for stages in ("stage 1", "stage 1+2")
    )  # fmt: skip
    assert one[1].stages == ("stage1",) and both[1].stages == ("stage1", "stage2")
    assert one[0].training == both[0]  # one run is asked for both
    assert only("rtd", "lincir", "clip_bigg+rtd")[1].name == "rtd"
    _, ablated = only("searle", "searle_oti", "clip_b32", variant="no regulariser", table="7")
    assert ablated.composer.regulariser == "none"
    images = only("searle", "searle", "clip_l14", variant="on FashionIQ", table="9")[1].stage
    for stage in ("oti", "distil"):
        data = images[stage].data
        assert (data.dataset, data.split, data.tables.gallery) == ("fashioniq", "train", 1.0)


def test_ablations_of_rtd_isa_and_compodiff():
    tuned = "clip_l14+rtd"
    recipe, config = only("rtd", "lincir", tuned, variant="uniform noise", benchmark="circo")
    assert (config.composer.noise_type, config.composer.noise) == ("uniform", 1.0)
    assert recipe.begins == "lincir_large.pt"
    assert only("rtd", "lincir", tuned, variant="last")[1].composer.tuned == "last"
    assert "templates" in only("rtd", "lincir", tuned, variant="templates")[0].corpus
    same = only("rtd", "searle", tuned, variant="noise 0.5")[0]
    assert same == only("rtd", "searle", tuned, variant="", benchmark="circo")[0]
    _, config = only("isa", "isa", "blip_b, EfficientNet-B2", variant="no self-attention")
    assert (config.composer.self_attention, config.composer.cross_attention) == (False, True)
    recipe, config = only("isa", "isa", "blip_b, EfficientViT-M2", variant="GCD + LLM TR")
    assert config.composer.local_weight == 0 and config.composer.phrase_weight == 1
    assert dict(recipe.beside) == {"composer.phrases": recipes.PHRASES}
    steps, config = only("compodiff", "compodiff", "clip_l14", variant="5 steps")
    plain, _ = only("compodiff", "compodiff", "clip_l14", variant="", benchmark="genecis")
    assert config.composer.steps == 5 and steps.training == plain and steps.slug != plain.slug
    recipe, config = only("compodiff", "compodiff", "clip_bigg", variant="fine-tuned")
    assert (recipe.begins, config.stages) == ("compodiff:vit_g14", ("finetune",))
    assert recipe.corpus == "the train split of CIRR"
    assert config.backbone == read_experiment("compodiff:vit_g14").backbone
    recipe, config = only("compodiff", "combiner", "clip_rn50", variant="fine-tuned",
                          benchmark="cirr")  # fmt: skip
    assert config.stage.fuse.data.dataset == "cirr_train" and recipe.begins == "combiner:rn50"
    recipe, config = only("compodiff", "combiner", "clip_rn50x4+clip4cir supervised",
                          benchmark="cirr")  # fmt: skip
    assert recipe.made == "clip4cir:rn50x4" and config.backbone == "clip4cir-rn50x4-cirr_train"
    assert reproduce._config(recipe.maker).stage.tune.data.dataset == "cirr_train"
    recipe, config = only("slerp", "combiner", "clip_b32+tat supervised", benchmark="cirr")
    assert (recipe.made, config.backbone) == ("tat:vit_b32", "tat-vit_b32")


def test_with_nothing_here_it_says_what_to_get(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "_cached", lambda name: False)
    status = reproduce.main(arguments(tmp_path, tmp_path))
    said = capsys.readouterr()
    assert status == 1 and "nothing of it can be run yet" in said.err
    assert "381 cells in 77 rows; 0 can be run" in said.out
    assert "Table 10: circo val, protocol circo(gallery=all" in said.out
    for line in (
        "benchmark circo val: data/circo/README.md; python launch/prepare.py --dataset=circo",
        f"{CLIP}: hf download {CLIP} --local-dir {tmp_path / 'weights' / CLIP}",
        "SEARLE_ViT-B32.pt: github.com/miccunifi/SEARLE, release `weights`",
        "training palavra:vit_b32: no weights are released; train on captioned images (COCO): "
        "python launch/main.py --config=experiments/palavra.py:vit_b32 "
        "--config.stage.invert.data.dataset=NAME",
    ):
        assert line in said.out
    assert not (tmp_path / "REPRODUCTION.md").exists() and not (tmp_path / "runs").exists()


def test_what_is_here_is_run_once_and_written(here, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(reproduce, "_cached", lambda name: False)
    backbone, params = weights.load(str(here / "weights" / CLIP))
    composer = composers.build("searle", backbone, image_weight=0.0)
    init = jax.jit(composer.init)
    official.save(composer, here / "weights" / "SEARLE_ViT-B32.pt",
                  init(jax.random.key(1)), {"backbone": params})  # fmt: skip
    # only what is asked for: three methods on the split with labels and the one without
    wanted = {("searle", "val"), ("searle", "test"), ("image_text", "val"), ("palavra", "val")}
    rows = [
        row
        for row in published.of_paper("searle")
        if (row.benchmark, row.backbone) == ("circo", "clip_b32")
        and row.table != "11"
        and (row.method, row.split) in wanted
    ]
    monkeypatch.setattr(published, "of_paper", lambda paper: rows)
    listed = reproduce.main(arguments(here, tmp_path, "--list", "--allow_partial"))
    said = capsys.readouterr().out
    assert listed == 0 and said.count("\n      here") == 3 and "needs training palavra" in said

    assert reproduce.main(arguments(here, tmp_path, "--allow_partial")) == 0
    document = (tmp_path / "REPRODUCTION.md").read_text()
    assert "8 of 16 cells" in document and "PARTIAL DATA" in document
    stored = tmp_path / "runs" / "runs" / "searle_vit_b32-0" / "circo-val" / "results.json"
    (result,) = json.loads(stored.read_text())["results"]
    assert result["method"] == "searle" and result["weights_id"].startswith(
        "clip-vit-base-patch32@"
    )
    value = result["metrics"]["mAP@10"]["value"]
    line = f"| searle | clip_b32 | mAP@10 | 7.22 | {value:.2f} | {value - 7.22:+.2f} | 0 | "
    assert line + f"`{result['weights_id']}` | `{result['setting_id']}` |" in document
    assert benchmarks.find("circo").protocol.id in document
    assert (
        f"mAP@10 {value - 7.22:+.2f}, " in document.partition("* circo val, searle, clip_b32: ")[2]
    )
    assert document.count("not explained: compare the setting") == 2
    waiting = tmp_path / "runs" / "runs" / "searle_vit_b32-0" / "circo-test"
    assert "## Waiting for the test server" in document and f"`{waiting}`" in document
    assert list(waiting.glob("circo_partial_test.json")) and "* training palavra" in document

    # again: nothing is made, and the server's numbers are taken
    numbers = {"mAP@5": 8.86, "mAP@10": 9.40, "mAP@25": 10.0, "mAP@50": 11.23}
    (waiting / "server.json").write_text(json.dumps(numbers))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("results.json")}
    capsys.readouterr()
    assert reproduce.main(arguments(here, tmp_path, "--allow_partial")) == 0
    assert capsys.readouterr().out.count("done before") == len(before) == 3
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    document = (tmp_path / "REPRODUCTION.md").read_text()
    assert "12 of 16 cells" in document and "Waiting" not in document
    assert "| searle | clip_b32 | mAP@5 | 8.86 | 8.86 (server) | +0.00 | 0 |" in document
    # of mAP@10, 0.03 is rounding
    assert "* circo test, searle, clip_b32: mAP@25 -0.55; not explained" in document

    (waiting / "server.json").write_text("[1]")
    assert reproduce.main(arguments(here, tmp_path, "--allow_partial")) == 2
    assert "server.json: not readable" in capsys.readouterr().err

    # other weights: what they change is made again, what the server said is forgotten
    official.save(composer, here / "weights" / "SEARLE_ViT-B32.pt",
                  init(jax.random.key(2)), {"backbone": params})  # fmt: skip
    assert reproduce.main(arguments(here, tmp_path, "--allow_partial")) == 0
    assert capsys.readouterr().out.count("done before") == 1
    again = {file: file.stat().st_mtime_ns for file in before}
    assert sum(again[file] != time for file, time in before.items()) == 2
    assert not (waiting / "server.json").exists()

    # weights that do not fit: the others are run, and the document says why
    (here / "weights" / "SEARLE_ViT-B32.pt").write_bytes(b"no weights")
    assert reproduce.main(arguments(here, tmp_path, "--allow_partial")) == 1
    document = (tmp_path / "REPRODUCTION.md").read_text()
    assert "## Failed" in document and "circo val, searle, clip_b32, seed 0: " in document
    assert "4 of 16 cells" in document and "image_text" in document


def line_of(method, backbone, *, trained, seeds):
    row = published.Row("circo", "val", "isa, unstated", method, backbone, {"mAP@5": 10.0})
    recipe = reproduce.Recipe(f"{method}:paper", trained=trained)
    return reproduce.Line(row, recipe, "circo()", (), seeds)


def test_seeds_are_averaged_and_their_spread_counts(tmp_path):
    places = reproduce.Places(tmp_path, tmp_path, tmp_path)
    line = line_of("isa", "blip_b, symmetric", trained=True, seeds=(0, 1, 2))
    for seed, value in enumerate((9.0, 10.0, 12.5)):
        folder = places.run(line.recipe, line.row, seed)
        folder.mkdir(parents=True)
        result = {"metrics": {"mAP@5": {"value": value}}, "weights_id": "b@1", "partial": False,
                  "setting_id": f"s{seed}"}  # fmt: skip
        (folder / "results.json").write_text(json.dumps({"results": [result]}))
        (folder / reproduce.STAMP).write_text('{"differs": []}')
    text = reproduce.document("isa", [line], places, {})
    assert "| 10.00 | 10.50 ± 1.80 | +0.50 | 0, 1, 2 | `b@1` | `s0, s1, s2` |" in text
    assert "## Differences" not in text and "PARTIAL" not in text  # within the spread
    lower = reproduce.dataclasses.replace(line, seeds=(0,))
    text = reproduce.document("isa", [lower], places, {})
    assert "mAP@5 -1.00; the paper does not say how it joins captions" in text


def test_a_training_run_is_found_by_its_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "_cached", lambda name: False)
    monkeypatch.setattr(reproduce, "_lacks_data", lambda row, places: "")
    monkeypatch.setattr(reproduce.Places, "located", lambda self, name: f"{name}/here")
    places = reproduce.Places(tmp_path, tmp_path, tmp_path)
    lines = [one for one in reproduce.lines("isa", places, [0, 1]) if one.row.method == "isa"]
    assert not any(one.seeds for one in lines)
    first = next(one for one in lines if one.recipe.slug == "isa_paper")
    assert "--workdir=" in first.missing[0] and "model_base.pth/here" in first.missing[0]
    workdir = places.train(first.recipe, 1)
    (workdir / "distil" / "checkpoints" / "300").mkdir(parents=True)
    lines = [one for one in reproduce.lines("isa", places, [0, 1]) if one.row.method == "isa"]
    assert {one.seeds for one in lines if one.recipe == first.recipe} == {(1,)}
    assert not any(one.seeds for one in lines if one.recipe != first.recipe)
    (phrases,) = {one.missing[0] for one in lines if one.row.variant == "GCD + LLM TR"
                  and one.recipe.config == "isa:paper"}  # fmt: skip
    assert "--config.composer.phrases=concept_to_phrases.pkl/here" in phrases
    rtd = [one for one in reproduce.lines("rtd", places, [0]) if one.missing]
    wanted = {one.recipe.config: one.missing[0] for one in rtd}
    assert "init_from=official:SEARLE_ViT-B32.pt/here" in wanted["rtd:searle_vit_b32"]
    inside = places.train(reproduce.Recipe("pic2word:vit_b32"), 0) / "contrastive"
    assert f"init_from={inside}" in wanted["rtd:pic2word_vit_b32"]


def test_a_training_run_of_other_settings_is_told(tmp_path):
    row = next(r for r in published.of_paper("rtd") if (r.method, r.backbone) == (
        "lincir", "clip_b32"))  # fmt: skip
    line = reproduce.Line(row, recipes.recipe(row), "", (), (0,))
    config = read_experiment("lincir:vit_b32")
    config.seed, config.backbone, config.stage.smp.data.dataset = 3, "elsewhere", "cc3m"
    assert reproduce.differing(line, config) == []
    config.composer.dropout, config.stage.smp.duration = 0.1, "8 steps"
    fields = reproduce.differing(line, config)
    dropout = read_experiment("lincir:vit_b32").composer.dropout
    assert fields[0] == f"composer.dropout (was {dropout}, is 0.1)"
    assert [said.partition(" ")[0] for said in fields] == ["composer.dropout", "stage.smp.duration"]
    places = reproduce.Places(tmp_path, tmp_path, tmp_path)
    folder = places.run(line.recipe, row, 0)
    folder.mkdir(parents=True)
    metrics = {name: {"value": value + 1} for name, value in row.metrics.items()}
    result = {"metrics": metrics, "weights_id": "b@1", "partial": False, "setting_id": "s"}
    (folder / "results.json").write_text(json.dumps({"results": [result]}))
    (folder / reproduce.STAMP).write_text(json.dumps({"differs": fields}))
    text = reproduce.document("rtd", [line], places, {})
    assert f"the training run differs from the preset in {', '.join(fields)}" in text


def test_the_config_of_an_evaluation_names_what_lies_where(here, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "_cached", lambda name: False)
    (here / "weights" / "concept_to_phrases.pkl").write_bytes(b"x")
    places = reproduce.Places(here / "weights", tmp_path, here / "data")
    row = published.rows("circo", "val", ["searle_oti"])[0]
    line = reproduce.Line(row, recipes.recipe(row), "", (), (0,))
    config = reproduce.configured(line, places, 0)
    assert config.backbone == str(here / "weights" / CLIP)
    assert config.composer.phrases == str(here / "weights" / "concept_to_phrases.pkl")
    assert config.evaluation.benchmarks == ("circo",) and config.evaluation.split == "val"
    assert config.init_from == "" and read_experiment(line.recipe.config).backbone == CLIP
    joined = f"{CLIP}+{CLIP}"
    assert places.located(joined) == f"{config.backbone}+{config.backbone}"
    assert places.located(f"{CLIP}+google/flan-t5-xl") == ""
