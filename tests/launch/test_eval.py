"""launch/eval.py as a user runs it: flags, files, and the same numbers on any machine."""

import json
import re
import signal
import socket
import time

import pytest

from tests.launch.binaries import ROOT, run, start

pytestmark = pytest.mark.slow

SLERP = "--config=experiments/slerp.py:smoke"
TWO = "--benchmarks=shapes_tiny/circo,shapes_tiny/fashioniq"


def results(folder):
    return json.loads((folder / "results.json").read_text())


def metrics(folder):
    return {(r["benchmark"], r["method"]): r["metrics"] for r in results(folder)["results"]}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def one(scratch, tmp_path_factory):
    """One process with one device."""
    output = tmp_path_factory.mktemp("one")
    status, text = run("eval", SLERP, TWO, f"--output={output}", scratch=scratch)
    assert status == 0, text
    return output, text


def test_all_that_is_promised_is_there(one):
    output, text = one
    assert {path.name for path in output.iterdir()} == {
        "results.json", "queries.jsonl", "report.html", "shapes_tiny_circo.png",
        "shapes_tiny_fashioniq.png",
    }  # fmt: skip
    assert "protocol circo(gallery=all" in text and "published" not in text
    for method in ("image_only", "text_only", "image_text", "slerp"):
        assert ("shapes_tiny/fashioniq", method) in metrics(output)
    whole = results(output)
    assert whole["composer"] == {"name": "slerp", "alpha": 0.8} and TWO in whole["command"]
    first = whole["results"][0]
    assert first["data"] == "shapes_tiny@1.0.0" and first["partial"] is False
    assert {"protocol", "weights_id", "seed", "counts"} <= set(first)


def test_stopped_between_benchmarks_it_leaves_no_half_results(scratch, one, tmp_path):
    log, output = tmp_path / "log", tmp_path / "output"
    process = start("eval", SLERP, TWO, f"--output={output}", scratch=scratch, log=log)
    while process.poll() is None and "protocol circo" not in log.read_text():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, log.read_text()[-3000:]
    said = log.read_text()
    assert re.search(
        "^stopped by Ctrl-C while evaluating: .*The same command continues", said, re.M
    )
    assert "Traceback" not in said
    left = {path.name for path in output.iterdir()}
    assert left <= {"shapes_tiny_circo.png", "shapes_tiny_fashioniq.png"}


def test_two_processes_of_three_devices_give_the_same_metrics(one, scratch, tmp_path):
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    logs = [tmp_path / "log0", tmp_path / "log1"]
    flags = (SLERP, TWO, f"--output={tmp_path}", f"--coordinator=localhost:{port}",
             "--num_processes=2")  # fmt: skip
    # without the features that are stored
    where = dict(scratch=tmp_path, CIR_JAX_DATA=str(scratch / "data"))
    processes = [
        start("eval", *flags, f"--process_id={i}", devices=3, log=log, **where)
        for i, log in enumerate(logs)
    ]
    assert [p.wait() for p in processes] == [0, 0], logs[0].read_text()[-3000:]
    assert metrics(tmp_path) == metrics(one[0])
    assert results(tmp_path)["devices"]["processes"] == 2
    assert "protocol" not in logs[1].read_text()  # reports come from process 0


def test_runs_are_compared(one, scratch, tmp_path):
    """Slerp and its neighbour: a table and a sheet per benchmark; a run with itself is no run."""
    other, output = tmp_path / "near", tmp_path / "compare"
    changed = "--config.composer.alpha=0.5"
    status, text = run("eval", SLERP, TWO, changed, f"--output={other}", scratch=scratch)
    assert status == 0, text
    status, text = run("compare", str(one[0]), str(other), f"--output={output}", scratch=scratch)
    assert status == 0, text
    assert "shapes_tiny/circo test_0: near (slerp) minus" in text and "interval" in text
    compared = json.loads((output / "compare.json").read_text())
    assert [one["benchmark"] for one in compared] == ["shapes_tiny/circo", "shapes_tiny/fashioniq"]
    ours, theirs = metrics(one[0]), metrics(other)
    for pair in compared:
        for row in pair["differences"]:
            key = (pair["benchmark"], "slerp")
            values = [found[key][row["metric"]]["value"] for found in (ours, theirs)]
            assert [row["first"], row["second"]] == pytest.approx(values, abs=1e-9)
    assert (output / "shapes_tiny_circo_test_0_near.png").exists()
    status, text = run("compare", str(one[0]), scratch=scratch)
    assert status == 2 and "give two folders" in text and "Traceback" not in text
    status, text = run("compare", str(one[0]), str(one[0]), scratch=scratch)
    assert status == 2 and "a folder is given twice" in text


def test_variants_override_and_submissions_from_dummy_data(scratch, tmp_path):
    source = ROOT / "data" / "cirr" / "dummy"
    status, text = run(
        "prepare", "--dataset=cirr", f"--source={source}", "--allow_partial", scratch=scratch
    )
    assert status == 0, text
    flags = (SLERP, "--benchmarks=cirr", "--split=test", f"--output={tmp_path}")
    status, text = run("eval", *flags, scratch=scratch)
    assert status == 2 and "--allow_partial" in text.splitlines()[-1]
    assert not (tmp_path / "results.json").exists()
    status, text = run("eval", *flags, "--allow_partial", scratch=scratch)
    assert status == 0, text
    assert "PARTIAL DATA" in text and "cirr (partial) test1" in text
    names = {path.name for path in tmp_path.glob("*.json")}
    assert names == {
        "results.json",
        "cirr_partial_test1_recall.json",
        "cirr_partial_test1_recall_subset.json",
    }
    file = tmp_path / "cirr_partial_test1_recall.json"
    status, text = run("eval", f"--validate_submission={file}", scratch=scratch)
    assert status == 2 and "as a CIRR recall file of test1 it is wrong" in text
    image, names = "test1-0-0-img0", [f"test1-{i}-0-img1" for i in range(50)]
    content = {"version": "rc2", "metric": "recall"} | {str(i): names for i in range(4148)}
    file.write_text(json.dumps(content))
    status, text = run("eval", f"--validate_submission={file}", scratch=scratch)
    assert status == 3 and "form only" in text
    file.write_text(json.dumps(content | {"0": [image, *names[1:], "x"]}))
    source = ROOT / "data" / "cirr" / "dummy"
    flags = [f"--validate_submission={file}", f"--source={source}"]
    status, text = run("eval", *flags, scratch=scratch)
    assert status == 2 and "is no query of the split" in text
    status, text = run("eval", SLERP, f"--source={source}", scratch=scratch)
    assert status == 2 and "--source goes with --validate_submission only" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmarks=circ"], "unknown benchmark 'circ'. Did you mean 'circo'"),
        (["--benchmarks=circo:shared"], "unknown variant of protocol circo: 'shared'"),
        (["--benchmarks=shapes_tiny/circo", "--split=tst_0"], "unknown split .*'tst_0'. Did you"),
        (["--benchmarks=shapes_tiny/inversion"], "finds an image by its pseudo-word"),
    ],
    ids=str,
)
def test_mistakes_are_one_message(flags, message, one, scratch, tmp_path):
    output = tmp_path / "results"
    status, text = run("eval", SLERP, f"--output={output}", *flags, scratch=scratch)
    assert status == 2 and re.search(message, text.splitlines()[-1]), text
    assert not (output / "results.json").exists() and "Traceback" not in text
