"""What all processes of a run load. Only those that run tests load the fixtures, and with them PyTorch."""

import os
from pathlib import Path

import pytest

from moka_pl.utils import set_environment

set_environment()  # as commands do; before anything imports PyTorch
# Where there is surely no GPU. Other conftest.py files may import Triton, which reads this then, before the
# fixtures can ask PyTorch.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

#: Files that take ten seconds or more begin first, so that neither of pytest's processes ends with one alone.
LONG = (
    "training/sharding/test_two_ranks.py",
    "training/sharding/test_host_memory.py",
    "training/test_long_run.py",
    "training/accidents/test_requeue.py",
    "training/sharding/test_killed.py",
    "training/sharding/test_nodes.py",
    "training/accidents/test_terminated.py",
    "studies/compare/test_workers.py",
    "test_utils.py",
    "docs/test_readme.py",
    "ops/triton/test_kernels.py",
    "training/test_ddp.py",
    "export/memory/test_peak.py",
    "training/accidents/test_accidents_ddp.py",
    "studies/architectures/test_families.py",
    "cli/test_main.py",
    "test_end_to_end.py",
    "test_wheel.py",
    "adapters/named/test_adapters.py",
    "studies/compare/test_train.py",
    "training/accidents/test_first_rank.py",
    "training/accidents/test_non_finite_ddp.py",
    "cli/test_run_folders.py",
    "evaluation/test_memory.py",
    "training/test_module.py",
    "callbacks/test_interrupt.py",
    "callbacks/test_run_checkpoint.py",
    "cli/parsing/test_parser.py",
    "studies/test_exports.py",
    "training/test_course.py",
    "adapters/test_forward.py",
    "cli/test_evaluate.py",
    "training/test_resume.py",
    "training/accidents/test_non_finite.py",
    "callbacks/test_gates.py",
    "export/test_rounding.py",
    "lm/test_compiled.py",
    "training/test_auto_filters.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of long files first."""
    rank = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    assert all(path.is_file() for path in rank), "a file of LONG has moved"
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    """Loads the fixtures, but not where pytest-xdist only hands out tests: it takes seconds."""
    if config.getoption("dist") == "no" or config.getoption("collectonly"):
        config.pluginmanager.import_plugin("shared.fixtures")
