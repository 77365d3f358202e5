"""What GPUs can do, as published, and how fast code of known figures could run on them at best.

Sources:

    GUIDE      NVIDIA, CUDA C++ Programming Guide 12.9: "Technical Specifications per Compute Capability" (limits of a
               multiprocessor), "Throughput of Native Arithmetic Instructions" (lanes per clock)
    A100       NVIDIA A100 Tensor Core GPU data sheet (SXM, 80 GB) and architecture white paper (clock, multiprocessors)
    H100       NVIDIA H100 Tensor Core GPU data sheet (SXM) and architecture white paper; the clock is that of the
               tensor cores' published rate, 989.4 TFLOPS = 132 multiprocessors x 4,096 operations x 1.83 GHz
    H200       NVIDIA H200 Tensor Core GPU data sheet (SXM); the chip is the H100's
    L40S       NVIDIA L40S data sheet and Ada architecture white paper
    B200       NVIDIA HGX B200 data sheet, an eighth of its rates; 148 multiprocessors as CUDA reports them, the clock
               that of the published fp32 rate, 75 TFLOPS = 148 x 256 x 1.98 GHz
    MMA        Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking,
               arXiv:2402.13499: mma.sync reaches 62.9% of the H100's tensor rate
    LAUNCH     Gray, Getting Started with CUDA Graphs, NVIDIA Technical Blog 2019: a short kernel in a stream takes
               3.8 us, launch included (V100)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from .offline import pipe

LANES = 32
SCHEDULERS = 4
# Registers are given to a warp in pieces of so many; shared memory to a program, with a kilobyte of the system's.
REGISTER_PIECE = 256
SHARED_PIECE, SHARED_RESERVED = 128, 1024
# Shared memory, the first-level cache and shuffles have one path, 32 banks of 4 bytes wide.
PATH_BYTES = 128
# [LAUNCH] What the host adds in an eager call is not in it.
LAUNCH_SECONDS = 3.8e-6


class Arch(NamedTuple):
    """One multiprocessor of an architecture [GUIDE].

    shared: bytes for all resident programs. fp32_lanes, half2_lanes: of fp32 and of packed half-precision instructions
    per clock. multiprocessors: of a common chip, where none is named.
    """

    warps: int
    programs: int
    shared: int
    fp32_lanes: int
    half2_lanes: int
    multiprocessors: int
    registers: int = 65_536


ARCHS = MappingProxyType(
    {
        "sm_80": Arch(64, 32, 164 << 10, 64, 128, 108),
        "sm_86": Arch(48, 16, 100 << 10, 128, 64, 84),
        "sm_89": Arch(48, 24, 100 << 10, 128, 64, 142),
        "sm_90": Arch(64, 32, 228 << 10, 128, 128, 132),
        "sm_100": Arch(64, 32, 228 << 10, 128, 128, 148),
    }
)


class Chip(NamedTuple):
    """A GPU as its maker publishes it: bytes and operations per second, all dense.

    mma: the share of the tensor rate that mma.sync, the instruction our kernels use, reaches [MMA].
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    bandwidth: float
    half: float
    tf32: float
    mma: float = 1.0
    source: str = ""


# On the B200, of which no figure for mma.sync is published, it is taken to do as much per multiprocessor and clock as
# on the H100.
_MMA_HOPPER = 0.629
_MMA_BLACKWELL = _MMA_HOPPER * (989.4e12 / (132 * 1.83e9)) / (2250e12 / (148 * 1.98e9))

CHIPS = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            Chip("A100", "sm_80", 108, 1.41e9, 2.039e12, 312e12, 156e12, 1.0, "[A100]"),
            Chip("H100", "sm_90", 132, 1.83e9, 3.35e12, 989.4e12, 494.7e12, _MMA_HOPPER, "[H100] [MMA]"),
            Chip("H200", "sm_90", 132, 1.83e9, 4.8e12, 989.4e12, 494.7e12, _MMA_HOPPER, "[H200] [MMA]"),
            Chip("L40S", "sm_89", 142, 2.52e9, 0.864e12, 362.05e12, 183e12, 1.0, "[L40S]"),
            Chip("B200", "sm_100", 148, 1.98e9, 8e12, 2250e12, 1125e12, _MMA_BLACKWELL, "[B200], mma.sync assumed"),
        )
    }
)


# --- occupancy ----------------------------------------------------------------------------------------------


class Occupancy(NamedTuple):
    """warps: resident on a multiprocessor at once; limit: what keeps more of them out."""

    warps: int
    limit: str


def occupancy(arch: str, registers: int, shared: int, num_warps: int, programs: int | None = None) -> Occupancy:
    """How many warps of a kernel are resident.

    registers: per thread; shared: bytes per program; programs: of the whole grid per multiprocessor, if that is known.
    Raises ValueError where not even one program fits.
    """
    limits = ARCHS[arch]
    per_warp = -(-registers * LANES // REGISTER_PIECE) * REGISTER_PIECE
    # Each scheduler has a quarter of the registers, and warps of its own.
    by_registers = limits.registers // SCHEDULERS // per_warp * SCHEDULERS // num_warps
    per_program = -(-shared // SHARED_PIECE) * SHARED_PIECE + SHARED_RESERVED
    most = {
        "registers": by_registers,
        "shared memory": limits.shared // per_program,
        "warps": limits.warps // num_warps,
        "programs": limits.programs,
    }
    if programs is not None:
        most["grid"] = programs
    least = min(most.values())
    limit = ", ".join(name for name, allowed in most.items() if allowed == least)
    if least < 1:
        raise ValueError(f"no program fits a multiprocessor of {arch}: {limit}")
    return Occupancy(least * num_warps, limit)


# --- the model ----------------------------------------------------------------------------------------------

RESOURCES = ("memory", "issue", "tensor", "fma", "alu", "mufu", "shared")


class Work(NamedTuple):
    """What is to be done: warp-instructions by opcode, bytes to and from memory, passes through shared memory
    (bank conflicts included), and 32-byte sectors that global loads and stores touch in the first-level cache."""

    issued: Mapping[str, float]
    bytes: float
    wavefronts: float
    sectors: float


def seconds(work: Work, chip: Chip) -> dict[str, float]:
    """How long each of RESOURCES is busy where it alone is the limit: all multiprocessors at work, nothing waiting.

    The largest is the model's time: what a GPU could do at best.
    """
    arch, rate = ARCHS[chip.arch], chip.multiprocessors * chip.clock
    busy = dict.fromkeys(RESOURCES, 0.0)
    busy["memory"] = work.bytes / chip.bandwidth
    busy["shared"] = (work.wavefronts + work.sectors * 32 / PATH_BYTES) / rate
    for opcode, count in work.issued.items():
        busy["issue"] += count / SCHEDULERS / rate
        kind = pipe(opcode)
        if kind == "tensor":
            operations, peak = mma_operations(opcode), chip.tf32 if ".TF32" in opcode else chip.half
            busy["tensor"] += count * operations / (peak * chip.mma)
        elif kind == "mufu":
            busy["mufu"] += count * LANES / 16 / rate
        elif kind == "fma":
            busy["fma"] += count * LANES / _fma_lanes(opcode, arch) / rate
        elif kind == "alu":
            busy["alu"] += count * LANES / 64 / rate
        elif opcode.startswith("SHFL"):
            busy["shared"] += count / rate
    return busy


def _fma_lanes(opcode: str, arch: Arch) -> int:
    name = opcode.partition(".")[0]
    if name in ("IMAD", "IMUL", "IDP", "FFMA2", "FADD2", "FMUL2"):
        return 64
    return arch.half2_lanes if name.startswith("H") else arch.fp32_lanes


def mma_operations(opcode: str) -> int:
    """Of one matrix instruction of a warp: HMMA.16816 multiplies [16, 16] by [16, 8]."""
    match = re.match(r"[A-Z]*MMA\.(?:SP\.)?(16|8)(8|16|32)(4|8|16|32|64)(?=\.)", opcode)
    if match is None:
        raise ValueError(f"unknown matrix instruction {opcode!r}")
    return 2 * math.prod(map(int, match.groups()))


def limiting(busy: Mapping[str, float]) -> str:
    """The resource that takes longest."""
    return max(busy, key=lambda name: busy[name])
