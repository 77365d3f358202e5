"""What all tests share: which of them run where and when, memory that shows what was not written."""

from __future__ import annotations

import collections
import gc
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("tests.numerics", "tests.suite")

# A process interprets all kernels or compiles them: Triton's interpreter is switched on before the first is decorated.
# test_processes.py runs the folder in a process of its own; naming it on the command line runs it too.
collect_ignore = ["interpreted"]
if sys.platform != "linux" or importlib.util.find_spec("triton") is None:
    collect_ignore.append("compiled")

# Tests are small: beside another process on the same cores, OpenMP threads would mostly spin for one another.
torch.set_num_threads(1)

hypothesis.settings.register_profile("local", deadline=None, max_examples=40)
# A red build must mean the commit, not the draw.
hypothesis.settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is NaN, so that an element nobody writes cannot pass for a right one."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan() and torch.ones(1).new_empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, at the heads of the workers' first shares, as pytest-xdist deals them out."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    share = len(items) // (4 * workers)
    long, short = [], []
    for item in items:
        (long if item.path.name == "test_processes.py" or item.path.parent.name == "compiled" else short).append(item)
    long.sort(key=lambda item: item.path.name != "test_processes.py")
    rest = iter(short)
    items.clear()
    for worker in range(workers):
        head = long[worker::workers]
        items += [*head, *itertools.islice(rest, max(0, share - len(head)))]
    items += rest


def pytest_collection_finish() -> None:
    """What has been imported and collected stays to the end: no search for garbage need go through it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """But extension modules complain of what is left at the end."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says aloud which libraries test_libraries.py did not find, and how many of its tests hang on each."""
    missing = collections.Counter(
        reason.removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple) and (reason := report.longrepr[2]).startswith("Skipped: library ")
    )
    if missing:
        terminalreporter.section("NOT TESTED: libraries that are not here", red=True, bold=True)
        for reason, tests in sorted(missing.items()):
            terminalreporter.line(f"{reason} ({tests} tests skipped)", red=True)
        terminalreporter.line("`python tests/install_libraries.py` installs them")
