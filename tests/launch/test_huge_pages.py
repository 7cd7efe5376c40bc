"""Binaries start again with huge pages, once, and only where they are theirs to start."""

import os
import subprocess
import sys

import pytest

from launch import huge_pages
from tests.launch.binaries import ROOT

SCRIPT = """
import os, pathlib, sys
sys.path.insert(0, {root!r})
print("started", flush=True)
from launch import huge_pages
os.confstr = lambda _: {library!r}
huge_pages.KERNEL = pathlib.Path({kernel!r})
huge_pages.apply()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.dont_write_bytecode)
"""


@pytest.fixture
def started(tmp_path):
    """What a program prints that asks for huge pages."""

    def run(kernel="always [madvise] never", library="glibc 2.36", **variables):
        file, script = tmp_path / "kernel", tmp_path / "script.py"
        file.write_text(kernel)
        script.write_text(SCRIPT.format(root=str(ROOT), library=library, kernel=str(file)))
        command = [sys.executable, "-B", str(script), "--flag=a b"]
        env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables
        return subprocess.check_output(command, env=env, text=True, timeout=60).splitlines()

    return run


def test_a_program_starts_again_with_its_arguments(started):
    assert started() == ["started"] * 2 + ["glibc.malloc.hugetlb=1 ['--flag=a b'] 1"]
    with_others = started(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert with_others[2] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1 ['--flag=a b'] 1"


def test_what_the_user_or_the_system_has_decided_stays(started):
    chosen = started(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert chosen == ["started", "glibc.malloc.hugetlb=0 ['--flag=a b'] 1"]
    once = ["started", "None ['--flag=a b'] 1"]
    for kernel in ("[always] madvise never", "always madvise [never]"):
        assert started(kernel) == once
    for library in ("glibc 2.31", "", "musl"):
        assert started(library=library) == once


@pytest.mark.parametrize(
    ("argument", "trace"),
    [("launch/main.py", None), (sys.orig_argv[-1], object())],
    ids=["%run in a notebook", "a debugger"],
)
def test_another_program_is_not_started_again(argument, trace, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(huge_pages, "_on_request", lambda: True)
    monkeypatch.setattr(sys, "argv", [argument])
    monkeypatch.setattr(sys, "gettrace", lambda: trace)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    huge_pages.apply()
    assert "GLIBC_TUNABLES" not in os.environ
