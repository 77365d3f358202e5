"""Peak extra memory of one call: what it needs beside its inputs, the weights and the libraries.

On a CPU a fresh child process makes the call, and the growth of its high-water mark is read. There, glibc
maps every block of 1 MiB or more on its own and gives it back at once, instead of by thresholds that move
with what was freed, and what a warm-up left is given back before (`mallopt`, `malloc_trim`). So memory that
is kept for reuse is neither counted nor taken for none.
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
CGROUP = Path("/sys/fs/cgroup")
TIMEOUT_SECONDS = 300
# Imported once, by the process that the children are forked from; what is not there is passed over.
PRELOAD = ["torch", "torch_rechub.basic.layers", "benchmarks.contestants"]


class NotMeasured(Exception):
    """Why there is no figure."""


def peak_extra_cpu(prepare: Callable[..., Callable[[], object]], *args: Any, threads: int = 1) -> float:
    """MiB by which the step that `prepare(*args)` gives raises the high-water mark of a fresh process.

    `prepare` and `args` have to be picklable. Raises NotMeasured where there is no /proc, and when the child
    fails or dies.
    """
    if not STATUS.exists():
        raise NotMeasured("no /proc to read the high-water mark from")
    # The fork server has imported torch already and started no threads: a child costs a fifth of a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, threads, prepare, args))
    child.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT_SECONDS):
            raise NotMeasured(f"took over {TIMEOUT_SECONDS} s")
        answer = receiver.recv()
    except EOFError:
        child.join()
        raise NotMeasured(f"its process ended with status {child.exitcode}, likely out of memory") from None
    finally:
        receiver.close()
        # Time to clean up after itself, for one that is done.
        child.join(timeout=5)
        child.kill()
        child.join()
    if isinstance(answer, str):
        raise NotMeasured(answer)
    return answer


def _child(sender: Connection, threads: int, prepare: Callable[..., Callable[[], object]], args: Any) -> None:
    try:
        torch.set_num_threads(threads)
        answer: float | str = _growth(prepare(*args)) / MIB
    except Exception as error:
        answer = f"{type(error).__name__}: {error}".partition("\n")[0]
    sender.send(answer)


def _growth(step: Callable[[], object]) -> int:
    libc = ctypes.CDLL(None)
    # Other C libraries have none of these calls; their figure is only nearly right.
    with contextlib.suppress(AttributeError):
        libc.mallopt(M_MMAP_THRESHOLD, MIB)
        # Or each small block that is freed at the heap's end would be faulted in again.
        libc.mallopt(M_TRIM_THRESHOLD, 64 * MIB)
    # What a library sets up at its first call is not a call's memory.
    step()
    gc.collect()
    with contextlib.suppress(AttributeError):
        libc.malloc_trim(0)
    # Where the mark cannot be reset, the warm-up has raised it, and only what goes beyond is seen.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_mark()
    kept = step()
    after = _high_water_mark()
    del kept
    return after - before


def _high_water_mark() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def peak_extra_cuda(step: Callable[[], object], device: str, cuda: Any = torch.cuda) -> float:
    """MiB by which `step` raises the peak of allocated device memory. cuda: `torch.cuda`, or a stand-in."""
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
    free = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10)
    # A container may be allowed less than the machine has; the limit reads "max" where it is not.
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(limit - used)
    return min(free, default=None)
