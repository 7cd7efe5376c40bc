"""The comparison: no run is made twice, and the documents are what the committed file says."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import compare, compare_plot, compare_table, machine
from cir_jax import experiment as experiments
from cir_jax.loading import methods
from cir_jax.training import stages
from tests.launch.binaries import ROOT, environment, run_command

MEASURED = compare.read(ROOT / "benchmarks" / "compare.json")
MACHINE = {"device": "cpu", "cpu": "AMD EPYC", "cores": 2}


def runs(*headlines, **record):
    """A method's runs with these values of all shown metrics."""
    stamp = {"date": "2026-01-02", "commit": "abc1234", "machine": MACHINE}
    return {
        str(seed): stamp | {"metrics": dict.fromkeys(compare_table.COLUMNS, value)} | record
        for seed, value in enumerate(headlines)
    }


def measured(latency=None, **of_methods):
    return {"command": "the command", "runs": of_methods, "latency": latency or {}}


# ---- what is committed


@pytest.mark.parametrize("name", compare_table.DOCUMENTS)
def test_documents_are_the_committed_measurement(name):
    text = (ROOT / name).read_text()
    assert compare_table.filled(text, MEASURED) == text
    blocks = re.findall(r"<!-- ([\w ]+): benchmarks/compare.json -->", text)
    other = {"README.md": ["short table"], "RESULTS.md": ["origin", "table", "expectations"]}
    assert blocks == other[name]
    assert compare_table.PLOT in text


def test_the_plot_is_the_committed_measurement():
    with Image.open(ROOT / compare_table.PLOT) as picture:
        assert json.loads(picture.text["numbers"]) == compare_table.plotted(MEASURED)
        assert picture.size == compare_table.plot(MEASURED).size


def test_the_seeds_of_a_row_are_of_one_commit_which_is_known():
    for method, of_seeds in MEASURED["runs"].items():
        commits = {run["commit"] for run in of_seeds.values()}
        assert len(commits) == 1 and re.fullmatch("[0-9a-f]{7,}", *commits), method
        assert len(of_seeds) == len(compare_table.SEEDS), method


def test_every_experiment_is_compared():
    compared = {method.name.partition(":")[0] for method in compare_table.METHODS}
    baselines = {method.name for method in compare_table.BASELINES}
    # InstructPix2Pix has weights of gigabytes, of photographs
    assert compared | baselines == set(methods()) - {"pretrain", "instruct_pix2pix"}
    expected = {name for pair in compare_table.EXPECTED for name in pair}
    assert expected <= {row.name for row in (*compare_table.BASELINES, *compare_table.METHODS)}


# ---- tables


def test_differences_are_paired():
    # as far apart on every seed, though the seeds differ by 10
    difference = compare_table.difference
    assert difference([11.0, 21.0, 31.0], [9.0, 19.0, 29.0]) == "+2.0 ± 0.0"
    assert difference([3.0, 5.0, 7.0], [4.0, 8.0, 12.0]) == "-3.0 ± 1.2"


def test_a_row_needs_all_seeds_and_a_column_a_value():
    some = measured(
        slerp=runs(20.0, 22.0, 24.0), combiner=runs(21.0, 24.0, 24.0), lincir=runs(5.0, 6.0)
    )
    assert compare_table.short_table(some).splitlines() == [
        "| method | circo mAP@10 | cirr R@1 | fashioniq R@10 | genecis R@1 | mAP@10 − slerp "
        "| mAP@10 − image_text | paper, CIRCO mAP@10 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| slerp" + " | 22.0 ± 2.0" * 4 + " |  |  | 9.84 (Slerp) |",
        "| combiner" + " | 23.0 ± 1.7" * 4 + " | +1.0 ± 0.6 |  | 12.08 (CompoDiff, ResNet-50) |",
    ]
    assert "query, ms" not in compare_table.table(some)
    assert "| combiner > slerp | +1.0 ± 0.6 | 2 of 3 |" in compare_table.expectations(some)
    assert "| lincir > image_text | not measured yet |  |" in compare_table.expectations(some)
    assert "not measured yet: tat, palavra, " in compare_table.origin(some)
    assert "commit abc1234, 2026-01-02, 2 cores of AMD EPYC (cpu): slerp, lincir, combiner\n" in (
        compare_table.origin(some)
    )


def test_costs():
    took = runs(1.0, 2.0, 3.0, parameters=1234567)
    for run, seconds in zip(took.values(), (120.0, 30.0, 66.0), strict=True):
        run["training"] = {"cpu_seconds": seconds}
    one_was_cut = runs(1.0, 2.0, 3.0, parameters=5)
    one_was_cut["1"]["training"] = None
    stamp = {"machine": MACHINE, "date": "2026-01-03", "commit": "def5678"}
    some = measured(
        {
            "combiner": stamp | {"ms": 5.66, "busy_cores": 0.1},
            "slerp": stamp | {"ms": 4.0, "busy_cores": 0.6, "commit": "busy"},
            "searle_oti": stamp | {"ms": 1234.5, "busy_cores": 0.0},
        },
        slerp=runs(1.0, 2.0, 3.0, parameters=0),
        combiner=took,
        searle=one_was_cut,
        image_only=runs(1.0, 2.0, 3.0),  # recorded with another method's run
    )
    cells = {
        method: [cell(some, method) for cell in compare_table.COSTS.values()]
        for method in some["runs"]
    }
    assert cells == {
        "slerp": ["none", "", "0"],  # measured while others kept the machine busy
        "combiner": ["1.1", "5.7", "1,234,567"],
        "searle": ["", "", "5"],
        "image_only": ["none", "", "0"],
    }
    assert compare_table.latency(some, "searle_oti") == "1,234"
    assert "| +0.0 ± 0.0 |  | 1.1 | 5.7 | 1,234,567 | 12.08" in compare_table.table(some)
    timed = [x for x in compare_table.origin(some).splitlines() if "time of a query" in x]
    assert timed == ["* time of a query: commit def5678, 2026-01-03, 2 cores of AMD EPYC (cpu)"]


def test_only_the_blocks_of_a_document_change():
    start = "<!-- expectations: benchmarks/compare.json -->"
    text = f"a\n{start}\n<!-- end -->\nb\n{start}\nold\n<!-- end -->\nc <!-- end -->\n"
    block = compare_table.expectations(measured())
    after = (
        f"a\n{start}\n{block}\n<!-- end -->\nb\n{start}\n{block}\n<!-- end -->\nc <!-- end -->\n"
    )
    assert compare_table.filled(text, measured()) == after
    assert compare_table.filled(after, measured()) == after


def test_the_plot_shows_the_numbers_where_the_axis_says():
    some = measured(slerp=runs(10.0, 14.0, 12.0), combiner=runs(20.0, 20.0, 20.0))
    sheet = np.asarray(compare_table.plot(some)).astype(int)

    def colour(number, row):
        x, y = compare_plot.place(number, 20), compare_plot.height(row)
        return sheet[y, round(x)]

    assert compare_plot.axis_end({"a": [10.0, 14.0, 12.0], "b": [20.0] * 3}) == 20
    assert [compare_plot.place(number, 20) for number in (0, 10, 20)] == [250, 550, 850]
    blue, orange = (compare_plot.KINDS[kind][1] for kind in ("other", "image triplets"))
    assert list(compare_table.plotted(some)) == ["combiner", "slerp"]
    assert (colour(20, 0) == orange).all() and (colour(12, 1) == blue).all()  # the means
    for end in (10.5, 13.5):  # one standard deviation is 2
        np.testing.assert_allclose(colour(end, 1), blue, atol=40)
    for nothing in (colour(18, 0), colour(8, 1), colour(16, 1)):
        assert (nothing == compare_plot.BACKGROUND).all()


# ---- runs


def test_done_runs_are_skipped_and_the_file_is_written_after_each(tmp_path, monkeypatch):
    made, output = [], tmp_path / "compare.json"
    fails = {("combiner", 1)}

    def measure(name, config, directory):
        assert directory == tmp_path / f"{name}-{config.seed}"
        assert config.evaluation.split == f"test_{config.seed}"
        if (name, config.seed) in fails:
            raise KeyboardInterrupt
        made.append((name, config.seed))
        record = {"config": compare.fingerprint(config), "metrics": {"circo mAP@10": 1.0}}
        return {name: record}

    monkeypatch.setattr(compare, "measure", measure)
    output.write_text(json.dumps({"runs": {"slerp": runs(5.0, 6.0, 7.0)}}))
    with pytest.raises(KeyboardInterrupt):
        compare.compare(["combiner"], "smoke", tmp_path, output)
    fails.clear()
    for _ in range(2):
        compare.compare(["combiner"], "smoke", tmp_path, output)
    assert made == [("combiner", seed) for seed in (0, 1, 2)]  # none of them twice
    found = compare.read(output)["runs"]
    assert found["slerp"] == runs(5.0, 6.0, 7.0)  # other rows stay
    assert found["combiner"]["2"]["commit"] == compare.commit()

    # another config is another run; so is one of which the file does not say the config
    monkeypatch.setattr(
        compare, "configured", lambda *_, f=compare.configured: changed(f(*_), temperature=0.5)
    )
    compare.compare(["combiner", "slerp"], "smoke", tmp_path, output)
    assert made[3:] == [(name, seed) for name in ("combiner", "slerp") for seed in (0, 1, 2)]


def changed(config, temperature):
    config.composer.dropout = temperature
    return config


def test_only_a_training_in_one_go_is_timed(tmp_path, monkeypatch):
    experiment = experiments.Experiment(compare.configured("combiner", 0, "smoke"), *[None] * 4)

    def trains(experiment, directory):
        (directory / "fuse").mkdir(exist_ok=True)
        sum(range(12_000_000))
        return {"params": 1}

    monkeypatch.setattr(stages, "train", trains)
    noted = tmp_path / "whole" / compare.TRAINING
    (tmp_path / "whole").mkdir()
    assert compare.train(experiment, tmp_path / "whole") == {"params": 1}
    first = json.loads(noted.read_text())
    assert set(first) == {"cpu_seconds", "wall_seconds", "load_before"}
    assert 0 < first["cpu_seconds"] < 10
    noted.write_text("what the whole training took")
    compare.train(experiment, tmp_path / "whole")  # read back, which takes less
    assert noted.read_text() == "what the whole training took"

    cut = tmp_path / "cut"
    (cut / "fuse").mkdir(parents=True)
    compare.train(experiment, cut)
    assert not (cut / compare.TRAINING).exists()


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("slerp", 0),
        ("searle_oti", 0),
        ("combiner", 10497),
        ("compodiff", 1616256),  # both stages train the same network
        ("pdv", 9408),  # Pic2Word's phi
        ("rtd", 9408 + 632832),  # and the text encoder, which RTD's stage alone trains
    ],
)
def test_trained_parameters(method, count):
    experiment = experiments.setup(compare.configured(method, 0, "smoke"), shapes_only=True)
    assert compare.trained_parameters(experiment) == count


def test_another_preset_is_a_run_of_its_own():
    long = compare.configured("compodiff:shapes_long", 1, "shapes")
    assert long.preset == "shapes_long" and long.evaluation.split == "test_1" and long.seed == 1
    inversion = compare.configured("searle_oti:inversion", 1, "shapes")
    assert inversion.evaluation.split == ""  # the same scenes
    both = compare.configured("compodiff", 1, "shapes")
    assert len({compare.fingerprint(x) for x in (long, inversion, both)}) == 3


@pytest.mark.slow
def test_cores_that_others_keep_busy_are_counted():
    script = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", script]) as other:
        try:
            time.sleep(0.5)
            assert machine.busy_cores(0.5) > 0.5
        finally:
            other.kill()


def test_a_query_takes_its_time_whether_trained_or_not(tmp_path, monkeypatch):
    """A method without a run is timed by what its training begins with."""
    monkeypatch.setattr(compare, "SECONDS", 0.0)
    for name in ("slerp", "pic2word"):
        assert compare.milliseconds(name, "smoke", tmp_path) > 0


def test_the_baselines_are_timed_beside_slerp(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "busy_cores", lambda: 0.1)
    monkeypatch.setattr(compare, "milliseconds", lambda name, *_: {"rtd": None}.get(name, 5.0))
    for chosen, names in (
        (["combiner", "rtd"], ["combiner"]),  # without queries to time, there is no record
        (["slerp"], ["combiner", "image_only", "text_only", "image_text", "slerp"]),
    ):
        compare.measure_latency(chosen, "smoke", tmp_path, tmp_path / "compare.json")
        latency = compare.read(tmp_path / "compare.json")["latency"]
        assert list(latency) == names and latency["combiner"]["ms"] == 5.0


def test_it_runs_and_times_a_query(tmp_path):
    """One seed; the file has the others."""
    output, done = tmp_path / "compare.json", {}
    for name in ("image_only", "text_only", "image_text", "slerp", "combiner"):
        done[name] = runs(1.0, 2.0, 3.0)
        del done[name]["0"]
        for seed, record in done[name].items():
            record["config"] = compare.fingerprint(compare.configured(name, int(seed), "smoke"))
    output.write_text(json.dumps({"runs": done}))
    command = [sys.executable, "benchmarks/compare.py", "--preset=smoke", f"--output={output}"]
    command += ["--methods=slerp,combiner", f"--workdir={tmp_path}/table"]
    status, said = run_command(command, environment(tmp_path))
    assert status == 0, said[-3000:]
    assert "| combiner | " in said and "| image_text | " in said
    found = json.loads(output.read_text())["runs"]
    assert found["combiner"]["0"]["training"]["cpu_seconds"] > 0
    for name, of_seeds in done.items():
        assert found[name] == of_seeds | {"0": found[name]["0"]}
    options = ["--latency", "--methods=combiner"]
    status, said = run_command([*command, *options], environment(tmp_path))
    assert status == 0, said[-3000:]
    (record,) = json.loads(output.read_text())["latency"].values()
    assert 0 < record["ms"] < 60_000

    status, said = run_command([*command, "--methods=rdt"], environment(tmp_path))
    assert status == 2 and "--methods: no rdt; there are slerp, tat, " in said
    assert "compare.json" not in {path.name for path in Path(ROOT).iterdir()}
