"""Binaries start again with huge pages, once, and only where they are theirs to start."""

import os
import subprocess
import sys

import pytest

from launch import huge_pages
from tests.launch.binaries import ROOT

SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
print("started", flush=True)
from launch import huge_pages
huge_pages.KERNEL = __import__("pathlib").Path({kernel!r})
huge_pages.apply()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.dont_write_bytecode)
"""


@pytest.fixture
def started(tmp_path):
    def run(kernel="always [madvise] never", **variables):
        (tmp_path / "kernel").write_text(kernel)
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(root=str(ROOT), kernel=str(tmp_path / "kernel")))
        command = [sys.executable, "-B", str(script), "--flag=a b"]
        env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables
        return subprocess.check_output(command, env=env, text=True).splitlines()

    return run


def test_a_program_starts_again_with_its_arguments(started):
    if not huge_pages.os.confstr("CS_GNU_LIBC_VERSION"):
        pytest.skip("another C library")
    assert started() == ["started"] * 2 + ["glibc.malloc.hugetlb=1 ['--flag=a b'] 1"]
    with_others = started(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert with_others[2] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1 ['--flag=a b'] 1"


def test_what_the_user_or_the_kernel_has_decided_stays(started):
    chosen = started(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert chosen == ["started", "glibc.malloc.hugetlb=0 ['--flag=a b'] 1"]
    for kernel in ("[always] madvise never", "always madvise [never]"):
        assert started(kernel) == ["started", "None ['--flag=a b'] 1"]


def test_another_program_that_imports_it_is_not_started_again(monkeypatch, tmp_path):
    (tmp_path / "kernel").write_text("always [madvise] never")
    monkeypatch.setattr(huge_pages, "KERNEL", tmp_path / "kernel")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(sys, "argv", ["launch/main.py"])  # as %run in a notebook
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    huge_pages.apply()
    assert "GLIBC_TUNABLES" not in os.environ
