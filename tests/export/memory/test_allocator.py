"""Freed memory goes back to the system."""

import ctypes
import platform
import subprocess
import sys

import pytest

from moka_pl.export.memory import allocator

#: Blocks of 16 MiB, every other of which is freed; a larger one before has glibc take them from its heap.
HOLES = """
from pathlib import Path
import torch
from moka_pl.export.memory.allocator import return_freed_memory

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

if {returned}:
    return_freed_memory()
del [torch.ones(30 * 2**18)][0]
before = anonymous()
blocks = [torch.ones(4 * 2**20) for _ in range(16)]
del blocks[::2]
print(anonymous() - before)
"""

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")


def kept(returned: bool) -> float:
    command = [sys.executable, "-c", HOLES.format(returned=returned)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@on_glibc
def test_holes_are_given_back() -> None:
    assert kept(returned=True) < 140 < kept(returned=False)


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("glibc was asked for"))
    allocator.return_freed_memory()
