"""What several files of tests of training need."""

import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A file system with 256 KiB of room: the embedded line saves there once."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)
