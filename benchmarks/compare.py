"""The comparison: every contestant is checked, timed in interleaved rounds, and its memory measured."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from . import contestants, machine, memory, operations, parity, timing
from .cases import Case
from .contestants import SDPA, Bout, Contestant, Unable
from .report import FAILED, OK, Row

# Of the memory that is free now, what a contestant may be expected to need.
USABLE_MEMORY = 0.8

# What the yardstick is called among the contestants.
SGEMM = "sgemm"

# Told what is going on, and the share of the case that is done.
Progress = Callable[[str, float], None]


class Plan(NamedTuple):
    """How a case is measured.

    rounds: None for as many as fit into `seconds`. memory: whether peak memory is measured too. sgemm: whether
    torch's rate of multiplying matrices is measured in the same rounds, to hold the contestants against.
    """

    rounds: int | None = None
    seconds: float = 1.0
    memory: bool = True
    sgemm: bool = False


def compare(
    case: Case,
    field: Iterable[Contestant],
    plan: Plan,
    progress: Progress = lambda what, share: None,
    *,
    load: float | None = None,
) -> list[Row]:
    """A row for every contestant of the field: its figures, or in the notes why there are none.

    load: the load average before the run, for the record and its warning.
    """
    try:
        with timing.on_threads(case.threads):
            # First, because on a GPU it takes memory that must not be missing later.
            clock = timing.clock_for(case.device)
            rows, bouts = _check(case, list(field), progress)
            if bouts:
                rows |= _time(case, rows, bouts, clock, plan, progress)
            if plan.memory:
                rows |= _weigh(case, rows, bouts, progress)
    finally:
        contestants.inputs.cache_clear()
    about = {**machine.describe(case.device)._asdict(), "load_average": load}
    about["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return [
        replace(row, **about, warning="; ".join(filter(None, (machine.busy(load), row.warning))))
        for row in rows.values()
    ]


def _check(case: Case, field: list[Contestant], progress: Progress) -> tuple[dict[str, Row], dict[str, Bout]]:
    """Everybody's row, with the verdict, and those who may be timed."""
    rows, bouts = {}, {}
    for i, contestant in enumerate(field):
        progress(f"checking {contestant.name}", 0.2 * i / len(field))
        status, notes = "", _too_large(contestant, case)
        if not notes:
            try:
                bout = contestants.set_up(contestant, case)
                notes = parity.violation(contestant, case, bout) if contestant.definition else ""
                status = FAILED if notes else OK
                if not notes:
                    bouts[contestant.name], notes = bout, bout.note
            except Unable as error:
                notes = str(error)
            except Exception as error:
                notes = _failure(error)
        if case.device_type == "cuda":
            torch.cuda.empty_cache()
        rows[contestant.name] = Row(
            data="random" if case.criteo is None else Path(case.criteo).name,
            shape=case.shape.name,
            fields=case.shape.fields,
            emb_size=case.shape.emb_size,
            n_head=case.shape.n_head,
            batch=case.batch,
            mode=case.mode,
            contestant=contestant.name,
            dtype=case.dtype,
            device=case.device,
            threads=case.threads,
            parity=status,
            notes=notes,
        )
    return rows, bouts


def _too_large(contestant: Contestant, case: Case) -> str:
    """Why the contestant is left out, if it is, before it takes the machine down."""
    need, free = contestants.bytes_needed(contestant, case), memory.available(case.device)
    if free is None or need <= USABLE_MEMORY * free:
        return ""
    return f"left out: needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _failure(error: Exception) -> str:
    # A CPU's allocator raises a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _time(
    case: Case,
    rows: dict[str, Row],
    bouts: dict[str, Bout],
    clock: timing.Clock,
    plan: Plan,
    progress: Progress,
) -> dict[str, Row]:
    sgemm = {SGEMM: operations.sgemm()} if plan.sgemm else {}
    samples = timing.race(
        {name: bout.step for name, bout in bouts.items()} | sgemm,
        clock,
        rounds=plan.rounds,
        seconds=plan.seconds,
        progress=lambda share: progress("timing", 0.2 + 0.5 * share),
    )
    figures = {name: timing.quantiles(seconds) for name, seconds in samples.items()}
    sgemm_gflops = operations.sgemm_count() / figures.pop(SGEMM).p50 / 1e9 if plan.sgemm else None
    reference = figures["reference"].p50 if "reference" in figures else None
    sdpa = min((figures[name].p50 for name in SDPA if name in figures), default=None)
    warning = machine.unsteady(q.spread for q in figures.values())
    return {
        name: replace(
            rows[name],
            rounds=len(samples[name]),
            p20_ms=q.p20 * 1e3,
            p50_ms=q.p50 * 1e3,
            p80_ms=q.p80 * 1e3,
            samples_per_s=case.batch / q.p50,
            gflops=operations.count(case) / q.p50 / 1e9,
            sgemm_gflops=sgemm_gflops,
            x_reference=reference / q.p50 if reference else None,
            x_sdpa=sdpa / q.p50 if sdpa else None,
            warning=warning,
        )
        for name, q in figures.items()
    }


def _weigh(case: Case, rows: dict[str, Row], bouts: dict[str, Bout], progress: Progress) -> dict[str, Row]:
    weighed = {}
    for i, (name, bout) in enumerate(bouts.items()):
        progress(f"memory of {name}", 0.7 + 0.3 * i / len(bouts))
        try:
            if case.device_type == "cuda":
                peak = memory.peak_extra_cuda(bout.step, case.device)
            else:
                peak = memory.peak_extra_cpu(contestants.step_of, name, case, threads=case.threads)
        except (memory.NotMeasured, torch.OutOfMemoryError) as error:
            notes = "; ".join(filter(None, (rows[name].notes, f"memory not measured: {error}")))
            weighed[name] = replace(rows[name], notes=notes)
        else:
            weighed[name] = replace(rows[name], peak_extra_mib=peak)
    return weighed
