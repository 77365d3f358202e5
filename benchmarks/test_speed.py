"""The contestants of `python -m benchmarks` as pytest-benchmark cases: `pytest benchmarks`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import contestants, parity
from benchmarks.cases import MODES, SHAPES, Case, threads_for
from benchmarks.contestants import CONTESTANTS, Contestant, Unable

BATCHES = (32, 4096)


def _cases() -> Iterator[object]:
    for batch in BATCHES:
        for mode in MODES:
            case = Case(SHAPES["criteo"], batch, mode, threads_for(batch, None))
            for name, contestant in CONTESTANTS.items():
                # What is only at some shapes compiles, and is worth that once.
                if mode in contestant.modes and (contestant.only_at is None or batch == max(BATCHES)):
                    yield pytest.param(contestant, case, id=f"{batch}-{mode}-{name}")


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("contestant", "case"), list(_cases()))
def test_speed(contestant: Contestant, case: Case, benchmark: BenchmarkFixture) -> None:
    torch.set_num_threads(case.threads)
    try:
        bout = contestants.set_up(contestant, case)
    except Unable as error:
        pytest.skip(f"{contestant.name}: {error}")
    wrong = parity.violation(contestant, case, bout)
    assert not wrong, f"{contestant.name}: {wrong}"
    benchmark.group = str(case)
    benchmark.extra_info["note"] = bout.note
    benchmark(bout.step)
