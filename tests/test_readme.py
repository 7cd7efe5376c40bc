"""The README is true: its commands run, its table is the committed measurement."""

import functools
import importlib.util
import json
import re
import shlex
import statistics
import sys

import numpy as np
import pytest
from PIL import Image

from tests.launch.binaries import ROOT, environment, run_command

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for line in re.sub(r"\\\n\s*", " ", README).splitlines()
    if line.startswith("    ") and "python " in line
] + re.findall(r"`(python launch/(?:main|eval)[^`]+)`", " ".join(README.split()))
NEEDS_WEIGHTS = ("vit_l14", "vit_b32", "bge_vl", "config.backbone=")
RAW_FILES = [command for command in COMMANDS if "circo" in command and "cirr" not in command]


def python_part(command):
    """The `python ...` in a line such as `pip install ... && python ...` or `gcloud ... "..."`."""
    return command[command.index("python ") :].rstrip('"')


def shrunk(command, tmp_path):
    """The same command on the tiny world, its files under tmp_path; but for the main job, on one
    benchmark where the command names none."""
    all_benchmarks = command == "python launch/main.py --config=experiments/compodiff.py"
    command = re.sub(r"experiments/(\w+)\.py(?!:)", r"experiments/\1.py:smoke", command)
    command = command.replace("--dataset=shapes", "--dataset=shapes_tiny")
    command = re.sub(r"--workdir=\S+", "", command)  # one for each config: trained once
    if "launch/" in command and "prepare" not in command:
        config = re.search(r"experiments/[\w.:]+", command)[0].replace("/", "_")
        config += "_backbone" * ("config.backbone" in command)
        command += f" --workdir={tmp_path}/{config}"
    if ":inversion" in command:
        command += " --benchmarks=shapes_tiny/inversion --config.composer.iterations=3"
    if "stages=oti" in command:  # what it stores is not evaluated
        command += " --config.evaluation.benchmarks=\"('shapes_tiny/inversion',)\""
    if "launch/" in command and "benchmarks=" not in command and not all_benchmarks:
        command += " --config.evaluation.benchmarks=\"('shapes_tiny/circo',)\""
    if "--config.mesh.fsdp=4" in command:
        command += " --dry_run"
    words = shlex.split(command)
    return [sys.executable, *words[1:]]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


RUNNABLE = [c for c in COMMANDS if "pytest" not in c and c not in RAW_FILES]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNNABLE, ids=python_part)
def test_command_runs(command, scratch):
    needs_weights = any(name in command for name in NEEDS_WEIGHTS)
    status, output = run_command(
        shrunk(python_part(command), scratch),
        environment(scratch, devices=4 if "fsdp=4" in command else 1) | {"HF_HUB_OFFLINE": "1"},
    )
    if needs_weights:  # they are not here: the message says what to download and where to put it
        assert status == 2 and "hf download" in output, output
    else:
        assert status == 0, output[-3000:]


@pytest.mark.slow
def test_from_raw_files_to_a_submission(scratch):
    """The four commands, on the dummy files: too few, which each of the commands says."""
    assert [c.partition("--")[0].split("/")[-1].strip() for c in RAW_FILES] == [
        "prepare.py",
        "prepare.py",
        "eval.py",
        "eval.py",
    ]
    output = []
    for command in RAW_FILES:
        command = command.replace("path/to/CIRCO", "data/circo/dummy").replace(":vit_l14", ":smoke")
        # incomplete data say so in the name of the file
        command = command.replace("circo_test.json", "circo_partial_test.json")
        command = command.replace("=circo_test", f"={scratch}/circo_test")
        words = shlex.split(python_part(command))[1:]
        if "--check" not in words and "validate" not in command:
            words.append("--allow_partial")
        output.append(run_command([sys.executable, *words], environment(scratch)))
    status = [code for code, _ in output]
    assert status[:3] == [1, 0, 0], output
    assert "partial" in output[2][1]
    assert status[3] == 2 and "as a CIRCO file of val it is wrong" in output[3][1], output[3]


@pytest.mark.slow
def test_benchmark_command_runs(scratch):
    output = scratch / "shapes.json"
    command = [sys.executable, "benchmarks/shapes.py", "--preset=smoke", f"--output={output}"]
    command += ["--methods=combiner"]
    command += [f"--workdir={scratch}/table"]
    status, said = run_command(command, environment(scratch))
    assert status == 0, said[-3000:]
    measured = json.loads(output.read_text())
    assert len(measured["values"]["circo mAP@10"]["combiner"]) == 3
    assert "| combiner | " in said


def test_python_example_runs(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.png", "photos/b.png", "reference.jpg"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / name)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    code = code.replace('cir_jax.load("runs/compodiff/shapes")', "load")
    assert '# or: cir_jax.load("slerp")' in code
    code = code.replace("load  ", 'cir_jax.load("slerp")')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith(".png") for line in lines)


@functools.cache  # it defines flags
def benchmark():
    spec = importlib.util.spec_from_file_location("shapes_table", ROOT / "benchmarks" / "shapes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_is_the_committed_measurement():
    measured = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())
    table = re.search(r"<!-- table: .*? -->\n(.*?)\n<!-- end", README, re.S)[1]
    assert table == benchmark().table(measured)


def test_differences_are_paired():
    # as far apart on every seed, though the seeds differ by 10
    difference = benchmark().difference
    assert difference([11.0, 21.0, 31.0], [9.0, 19.0, 29.0]) == "+2.0 ± 0.0"
    assert difference([3.0, 5.0, 7.0], [4.0, 8.0, 12.0]) == "-3.0 ± 1.2"


def test_rows_of_the_table_are_of_one_commit():
    measured = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())["measured"]
    commits = {said.partition(" ")[2] for said in measured.values()}
    assert len(commits) == 1 and all(commits) and "dirty" not in "".join(commits)


def test_combiner_is_the_committed_measurement():
    measured = json.loads((ROOT / "benchmarks" / "combiner.json").read_text())
    rows = measured["values"]["circo mAP@10"]
    said = f"{statistics.mean(rows['combiner']):.1f} ± {statistics.stdev(rows['combiner']):.1f}"
    assert f"mAP@10 {said} on the same seeds, " in README
    assert f"{benchmark().difference(rows['combiner'], rows['slerp'])}\nbeside Slerp" in README
    main = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())
    assert rows["slerp"] == main["values"]["circo mAP@10"]["slerp"]  # the same queries
    commit = {said.partition(" ")[2] for said in measured["measured"].values()}
    assert len(commit) == 1 and "dirty" not in "".join(commit)


def test_composers_beat_the_baselines_on_every_seed():
    measured = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())
    rows = measured["values"]["circo mAP@10"]
    assert measured["seeds"] == [0, 1, 2]
    for method in ("slerp", "pic2word", "searle_oti", "searle", "lincir", "compodiff"):
        for baseline in ("image_only", "text_only", "image_text"):
            assert np.all(np.asarray(rows[method]) > rows[baseline]), (method, baseline)


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("palavra", ("text_only", "image_text")),
        ("pic2word", ("image_text", "text_only")),
        ("searle_oti", ("image_text",)),
        ("searle", ("image_text", "text_only")),
        ("lincir", ("image_text", "text_only")),
        ("compodiff", ("image_text", "slerp", "compodiff:shapes_long")),
        ("slerp", ()),
        ("combiner", ("slerp", "image_text")),
    ],
)
def test_numbers_of_an_experiment_are_the_committed_measurement(name, beside):
    file = "combiner" if name == "combiner" else "shapes"
    measured = json.loads((ROOT / "benchmarks" / f"{file}.json").read_text())["values"]
    text = " ".join((ROOT / "experiments" / f"{name}.py").read_text().split())
    number = r"(\d+\.\d \+- \d+\.\d)"
    found = re.search(r"CIRCO-like mAP@10 " + rf".*?{number}" * (1 + len(beside)), text)
    values = [measured["circo mAP@10"][row] for row in (name, *beside)]
    expected = [f"{statistics.mean(v):.1f} +- {statistics.stdev(v):.1f}" for v in values]
    assert list(found.groups()) == expected


def test_the_objectives_are_the_committed_measurement():
    measured = json.loads((ROOT / "benchmarks" / "objectives.json").read_text())
    text = (ROOT / "benchmarks" / "README.md").read_text()
    best = {}
    for objective in ("squared error", "InfoNCE"):
        steps, row = max(measured["mAP@10"].items(), key=lambda item: sum(item[1][objective]))
        values = row[objective]
        best[objective] = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        assert best[objective] in text
        assert objective == "InfoNCE" or f"after {steps} steps" in text
    assert f"without any training {measured['slerp']:.1f}" in text
    # what the paragraph concludes
    assert float(best["squared error"][:4]) < measured["slerp"] < float(best["InfoNCE"][:4])


def test_the_inversion_number_is_the_committed_measurement():
    measured = json.loads((ROOT / "benchmarks" / "shapes.json").read_text())["values"]
    first = measured["inversion R@1"]["searle_oti:inversion"]
    assert min(first) > 95
    said = f"{statistics.mean(first):.1f} {{}} {statistics.stdev(first):.1f}"
    assert said.format("+-") in (ROOT / "experiments" / "searle_oti.py").read_text()
    assert said.format("±") in README


def test_speeds_are_the_committed_measurements():
    def recorded(name):
        return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())

    cells = [cell for cell in recorded("encoders")["cells"] if cell.get("ratio")]
    sides = {"torch": "|", "compile": "`torch.compile`", "onnxruntime": "onnxruntime"}
    for dtype, row in (("float32", "float32 ("), ("bfloat16", "bfloat16 on CPU")):
        line = next(line for line in README.splitlines() if row in line and line.startswith("|"))
        for side, name in sides.items():
            ratios = [c["ratio"][side] for c in cells if c["dtype"] == dtype and side in c["ratio"]]
            assert f"{name} {min(ratios):.1f} to {max(ratios):.1f}" in line
        sides = {"torch": "|"}  # the others are measured in float32
    over = "cir_jax over pytorch, {}".format
    cached = "cir_jax, cached phrases over pytorch, {}".format
    for name in ("oti", "phi"):
        ratio = recorded(name)["speedup"]
        frozen, released = ([ratio[f(x)] for f in (over, cached)] for x in ("frozen", "released"))
        said = "| {:.1f} / {:.1f} ({:.0f} / {:.0f} over".format(*frozen, *released)
        assert said in README
    joint = [recorded("joint")["methods"][name]["speedup"] for name in ("rtd", "tat", "combiner")]
    assert (
        "RTD / TAT / Combiner, captions of 8 to 18 words | {:.1f} / {:.1f} / {:.1f} |".format(
            *joint
        )
        in README
    )


def test_the_figures_of_ranking_are_the_committed_measurement():
    found = json.loads((ROOT / "benchmarks" / "ranking.json").read_text())["contenders"]

    def said(name):
        return f"{found[name]['cpu_seconds']:.1f} and {found[name]['added_mib']:.0f}"

    ours = said("cir_jax").replace(" and ", " seconds of CPU time\nand ")
    assert f"takes {ours} MiB beside the features" in README
    others = f"PyTorch {said('torch')}, faiss {said('faiss')}, numpy {said('numpy')})."
    assert others in README


def test_files_that_the_readme_names_exist():
    for name in re.findall(
        r"(?:experiments|benchmarks|data/shapes|tests)/[\w/]+\.(?:py|md|png|json)", README
    ):
        assert (ROOT / name).is_file(), name
