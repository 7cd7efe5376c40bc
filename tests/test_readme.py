"""README and docs are true: their commands run, their numbers are the committed measurements."""

import functools
import json
import re
import shlex
import shutil
import statistics
import sys
import types

import numpy as np
import pytest
from PIL import Image

from benchmarks import compare_table
from cir_jax import loading, weights
from cir_jax.evaluation import sharing
from cir_jax.library import cli
from cir_jax.library.annotate import command as annotating
from cir_jax.library.serve import command as serving
from tests import hub_server
from tests.data.corpora import sample, write_tar
from tests.launch.binaries import ROOT, environment, run_command

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = "\n".join(path.read_text() for path in PAGES)
COMMANDS = [
    line.strip()
    for line in re.sub(r"\\\n\s*", " ", DOCS).splitlines()
    if line.startswith("    ") and "python " in line
] + re.findall(r"`(python launch/(?:main|eval)[^`]+)`", " ".join(DOCS.split()))
COMMANDS = list(dict.fromkeys(COMMANDS))
NEEDS_HUB = ("--source=hf:", "vit_l14", "vit_b32", "bge_vl", "config.backbone=", "features=")
RAW_FILES = [command for command in COMMANDS if "circo" in command and "cirr" not in command]


def python_part(command):
    """The `python ...` in a line such as `pip install ... && python ...` or `gcloud ... "..."`."""
    return command[command.index("python ") :].rstrip('"')


def shrunk(command, tmp_path):
    """The same command on the tiny world, its files under tmp_path, and on one benchmark where the
    command names none."""
    command = re.sub(r"experiments/(\w+)\.py(?!:)", r"experiments/\1.py:smoke", command)
    command = command.replace("--dataset=shapes", "--dataset=shapes_tiny")
    command = re.sub(r"--workdir=\S+", "", command)  # one for each config: trained once
    if "launch/" in command and "prepare" not in command:
        config = re.search(r"experiments/[\w.:]+|shared/\w+", command)[0].replace("/", "_")
        config += "_backbone" * ("config.backbone" in command)
        command += f" --workdir={tmp_path}/{config}"
        command = re.sub(r"(=|:)shared/", rf"\1{tmp_path}/shared/", command)
    if ":inversion" in command:
        command += " --benchmarks=shapes_tiny/inversion --config.composer.iterations=3"
    if "stages=oti" in command:  # what it stores is not evaluated
        command += " --config.evaluation.benchmarks=\"('shapes_tiny/inversion',)\""
    if "--config=" in command and "benchmarks=" not in command:
        command += " --config.evaluation.benchmarks=\"('shapes_tiny/circo',)\""
    if "--source=laion/" in command:
        (source := tmp_path / "laion").mkdir()
        write_tar(source / "00000.tar", [*sample("0"), *sample("1")])
        command = command.replace("--source=laion/", f"--source={source}")
    if "launch/compile.py" in command:
        command = command.replace(":vit_l14", ":smoke").replace("v5e:4x4", "cpu:4")
    elif "--config.mesh.fsdp=4" in command:
        command += " --dry_run"
    words = shlex.split(command)
    return [sys.executable, *words[1:]]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def run_once(scratch):
    """Runs a command, again only if it is another one on the tiny world."""

    @functools.cache
    def run(*command, devices):
        variables = environment(scratch, devices=devices) | {"HF_HUB_OFFLINE": "1"}
        return run_command(list(command), variables)

    return run


RUNNABLE = [c for c in COMMANDS if "pytest" not in c and c not in RAW_FILES]


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNNABLE, ids=python_part)
def test_command_runs(command, scratch, run_once):
    needs_hub = any(name in command for name in NEEDS_HUB) and "compile.py" not in command
    status, output = run_once(
        *shrunk(python_part(command), scratch), devices=4 if "fsdp=4" in command else 1
    )
    if needs_hub:  # it is not reached: the message says what to download and where to put it
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


def test_python_example_runs(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.png", "photos/b.png", "reference.jpg"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / name)
    code = re.search(r"```python\n(import cir_jax\n\n.*?)```", DOCS, re.S)[1]
    code = code.replace('cir_jax.load("runs/compodiff/shapes")', "load")
    assert '# or: cir_jax.load("slerp")' in code
    code = code.replace("load  ", 'cir_jax.load("slerp")')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIR_JAX_CACHE", str(tmp_path / "cache"))
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.endswith(".png") for line in lines)


def test_searching_ones_own_photos_runs(tmp_path, monkeypatch, capsys):
    """On the embedded world's CLIP: the commands and the Python of that section."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIR_JAX_LIBRARY", str(tmp_path / "stores"))
    shutil.copytree(ROOT / "data/shapes/photos/navy", tmp_path / "photos" / "2024")
    for source, name in zip(
        (tmp_path / "photos" / "2024").iterdir(), ("dog", "beach"), strict=False
    ):
        Image.open(source).save(tmp_path / f"{name}.jpg")
    load = functools.cache(loading.load)
    monkeypatch.setattr(loading, "load", lambda method, *_, **__: load(method))
    served = []

    def server(of, host, token):
        libraries = getattr(of, "methods", of)  # of annotators' tasks
        started = types.SimpleNamespace()
        started.run = lambda sockets: served.append([len(lib) for lib in libraries.values()])
        return started

    monkeypatch.setattr(serving, "check_installed", lambda command: None)
    monkeypatch.setattr(serving, "server", server)
    monkeypatch.setattr(annotating, "server", server)
    lines = dict.fromkeys(re.findall(r"^    (cir (?!push).*)$", DOCS, re.M))  # each once, in order
    asked = [line for line in lines if "annotate" not in line]
    assert (len(lines), len(asked)) == (10, 8)
    for line in [*asked, *(line for line in lines if line not in asked)]:
        demo = [] if "--demo" in line else ["--demo"]
        port = [] if re.match("cir (index|search)", line) else ["--port=0"]
        nothing_is_finished = "--export" in line
        assert cli.main(shlex.split(line)[1:] + demo + port) == 2 * nothing_is_finished, line
    photos = len(list((tmp_path / "photos").rglob("*.png")))
    assert served == [[photos, photos], [200, 200], [photos, photos]]  # two methods each
    assert (tmp_path / "found.html").is_file()
    code = re.search(r"```python\n(import cir_jax\nfrom cir_jax.library.*?)```", DOCS, re.S)[1]
    capsys.readouterr()
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_sharing_a_composer_runs(tiny, tmp_path, monkeypatch, capsys):
    """The lines of that section after the training, on a small one and a hub of this machine."""
    section = DOCS.partition("## Share a composer")[2]
    train, line, evaluate = re.findall(r"^    (\S.*)$", section, re.M)[:3]
    assert train.endswith("--config.export_to=hub:shared/mine")
    assert evaluate.endswith("--config=shared/mine")
    monkeypatch.chdir(tmp_path)
    weights.save(tmp_path / "toy", *tiny)
    experiment, _ = loading.experiment_of("slerp", backbone=tmp_path / "toy")
    sharing.write(experiment, None, tmp_path / "shared" / "mine")
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    with hub_server.running() as hub:
        hub_server.use(monkeypatch, hub, tmp_path / "cache")
        words = shlex.split(line.replace("ORG/NAME", "me/mine"))
        assert cli.main(words[1:]) == 0
        capsys.readouterr()
        found = {}
        exec(code.replace("ORG/NAME", "me/mine"), found)
    assert found["search"].composer.alpha == 0.8


MEASURED = json.loads((ROOT / "benchmarks" / "compare.json").read_text())


def test_composers_beat_the_baselines_on_every_seed():
    for method in ("slerp", "pic2word", "searle_oti", "searle", "lincir", "compodiff", "combiner"):
        for baseline in ("image_only", "text_only", "image_text"):
            pair = (compare_table.values(MEASURED, name) for name in (method, baseline))
            assert all(a > b for a, b in zip(*pair, strict=True)), (method, baseline)


BESIDE = {
    "palavra": ("text_only", "image_text"),
    "pic2word": ("image_text", "text_only"),
    "searle_oti": ("image_text",),
    "searle": ("image_text", "text_only"),
    "lincir": ("image_text", "text_only"),
    "compodiff": ("image_text", "slerp", "compodiff:shapes_long"),
    "combiner": ("slerp", "image_text"),
    "rtd": ("pic2word",),
    "pdv": ("pic2word",),
    "tat": ("slerp",),
    "clip4cir": ("image_text", "slerp"),
    "artemis": ("image_text",),
    "magiclens": ("slerp", "combiner"),
    "isa": ("isa:symmetric", "pic2word:blip", "image_text:blip", "slerp:blip"),
}
"""Experiment -> the rows whose numbers its docstring names after its own."""


@pytest.mark.parametrize(
    "name",
    [
        method.name
        for method in compare_table.METHODS
        if ":" not in method.name and compare_table.values(MEASURED, method.name)
    ],
)
def test_numbers_of_an_experiment_are_the_committed_measurement(name):
    beside = BESIDE.get(name, ())
    text = " ".join((ROOT / "experiments" / f"{name}.py").read_text().split())
    number = r"(\d+\.\d \+- \d+\.\d)"
    found = re.search(r"CIRCO-like mAP@10 " + rf".*?{number}" * (1 + len(beside)), text)
    assert found, f"{name}: its docstring does not say its row, and {beside}"
    rows = [compare_table.values(MEASURED, row) for row in (name, *beside)]
    assert list(found.groups()) == [compare_table.spread(v).replace("±", "+-") for v in rows]


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
    first = compare_table.values(MEASURED, "searle_oti:inversion", "inversion R@1")
    assert min(first) > 95
    said = compare_table.spread(first)
    assert said.replace("±", "+-") in (ROOT / "experiments" / "searle_oti.py").read_text()
    assert said in README


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
    rows = recorded("compodiff")["sampler"]["measured"]["rows"]
    ten = {row["batch"]: row["wall_speedup"] for row in rows if row["steps"] == 10}
    assert (
        "1 / 16 / 64 queries | {:.1f} / {:.1f} / {:.1f} |".format(*map(ten.get, (1, 16, 64)))
        in README
    )
    table = (ROOT / "benchmarks" / "README.md").read_text()
    for batch in ten:
        mine = [row for row in rows if row["batch"] == batch]
        assert " / ".join(f"{row['wall_speedup']:.1f}" for row in mine) + " |" in table
    alone = recorded("compodiff")["alone"]["measured"]

    def gains(rows):
        return " / ".join(f"{row['wall_speedup']:.1f}" for row in rows)

    words = " ".join(table.split())
    assert f"takes {gains(alone['queries'])} times as long at 2 / 5 / 10 steps" in words
    assert f"go {gains(alone['products'])} times as fast" in words
    rows = recorded("compodiff")["steps"]["measured"]
    for name in ("mAP@10", "ms_per_query"):
        row = " | ".join(f"{row[name]:.1f}" for row in rows)
        assert f"| {name.replace('_', ' ')} | {row} |" in table
    assert max(rows, key=lambda row: row["mAP@10"])["steps"] == 2  # "two steps are the best"
    one, data, fsdp = (
        recorded("compodiff")["training"]["measured"][name]
        for name in ("one device", "two, data", "two, fsdp")
    )
    assert f"takes {one['seconds_per_step']:.1f} s on one device" in words
    share = f"{100 * one['share_of_matrix_rate']:.0f} %"
    assert f"{one['samples_per_second']:.0f} samples/s, {share} of the rate" in words
    split = f"{fsdp['samples_per_second']:.0f} with the parameters split"
    assert f"do {data['samples_per_second']:.0f}, and {split}" in words
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


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks" / "README.md"], ids=lambda p: p.name)
def test_what_a_page_names_and_links_to_exists(page):
    text = page.read_text()
    for name in re.findall(
        r"(?:experiments|benchmarks|data/shapes|launch|tests)/[\w/]+\.(?:py|md|png|json)", text
    ):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
