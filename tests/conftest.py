"""What all tests share: folders with a process of their own, memory that shows what was not written."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("tests.numerics", "tests.suite")

# The interpreter is switched on before the first kernel is decorated, and a process that interprets cannot
# compile. test_processes.py runs these folders; naming one on the command line runs it too.
collect_ignore = ["interpreted", "compiled"]

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
    """What takes minutes comes first, each at the head of a worker's first share, as pytest-xdist deals them out."""
    long = [item for item in items if item.path.name == "test_processes.py"]
    items[:] = [item for item in items if item.path.name != "test_processes.py"]
    share = len(items) // (4 * int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    for i, item in enumerate(long):
        items.insert(i * share + i, item)


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
