"""Peak extra memory of one call: what it needs beside its inputs, the weights and the libraries.

On a CPU a fresh child process makes the call, and the growth of its high-water mark is read. There, glibc maps every
block of 1 MiB or more on its own and gives it back at once, instead of by thresholds that move with what was freed;
what a warm-up left behind is given back before (`mallopt`, `malloc_trim`). So memory kept for reuse is neither
counted nor mistaken for none.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
STATUS = Path("/proc/self/status")
TIMEOUT_SECONDS = 300
# Imported once, by the process that the children are forked from; what is missing is passed over.
PRELOAD = ["torch", "torch_rechub.basic.layers", "benchmarks.contestants"]


class NotMeasured(Exception):
    """Why there is no figure."""


def peak_extra_cpu(prepare: Callable[..., Callable[[], object]], *args: Any, threads: int = 1) -> float:
    """MiB by which the step that `prepare(*args)` gives raises the high-water mark of a fresh process.

    `prepare` and `args` have to be picklable. Raises NotMeasured where /proc is missing and when the child dies.
    """
    if not STATUS.exists():
        raise NotMeasured("no /proc to read the high-water mark from")
    # The fork server has imported torch already and started no threads, so that a child costs milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, threads, prepare, args), daemon=False)
    child.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT_SECONDS):
            raise NotMeasured(f"took over {TIMEOUT_SECONDS} s")
        answer = receiver.recv()
    except EOFError:
        child.join()
        raise NotMeasured(f"the process ended with status {child.exitcode}, likely out of memory") from None
    finally:
        if child.is_alive():
            child.join(timeout=5)
            child.kill()
        child.join()
        receiver.close()
    if isinstance(answer, str):
        raise NotMeasured(answer)
    return answer


def _child(sender: Connection, threads: int, prepare: Callable[..., Callable[[], object]], args: Any) -> None:
    try:
        torch.set_num_threads(threads)
        libc = ctypes.CDLL(None)
        # Other C libraries have neither call; their figure is an upper bound.
        with contextlib.suppress(AttributeError):
            libc.mallopt(M_MMAP_THRESHOLD, MIB)
            # Or each small block freed at the heap's end would be faulted in again.
            libc.mallopt(M_TRIM_THRESHOLD, 64 * MIB)
        step = prepare(*args)
        # What a library sets up at its first call is not a call's memory.
        step()
        gc.collect()
        with contextlib.suppress(AttributeError):
            libc.malloc_trim(0)
        # Where the mark cannot be reset, the warm-up has raised it and only what goes beyond is seen.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        before = _high_water_mark()
        kept = step()
        answer: float | str = (_high_water_mark() - before) / MIB
        del kept
    except Exception as error:
        answer = f"{type(error).__name__}: {error}".splitlines()[0]
    sender.send(answer)
    sender.close()


def _high_water_mark() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def peak_extra_cuda(step: Callable[[], object], device: str, cuda: Any = torch.cuda) -> float:
    """MiB by which `step` raises the peak of allocated device memory. cuda: `torch.cuda`, or a stand-in."""
    step()
    cuda.synchronize(device)
    before = cuda.memory_allocated(device)
    cuda.reset_peak_memory_stats(device)
    kept = step()
    cuda.synchronize(device)
    peak = cuda.max_memory_allocated(device)
    del kept
    return (peak - before) / MIB


def available(device: str) -> int | None:
    """Bytes that a call on `device` could get now; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("MemAvailable:")), None
    )
