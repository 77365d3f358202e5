"""Compile real Triton launches for GPUs that are not present, and read what the machine code tells.

    binary = compile_launch(launch, "sm_90")     # a kernels' Launch: kernel, grid, args, options
    binary.registers, binary.spilled, binary.shared, binary.mma
    instructions(binary, trips=[2]).total()      # warp-instructions of one trip of the outermost loop

A launch is compiled through `kernel.warmup` under a stand-in driver, so the code has the specialisation the
real launch would get: which pointers are 16-byte aligned, which integers are 1. All figures are static: they
say what a GPU would have to issue, never how long that takes.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")

# Shared memory one program may ask for, in bytes.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}


class Launch(Protocol):
    """What the kernels' launchers describe a launch with."""

    @property
    def kernel(self) -> Any: ...
    @property
    def grid(self) -> Any: ...
    @property
    def args(self) -> Sequence[Any]: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


def target(arch: str) -> GPUTarget:
    """Triton's target for "sm_80", "sm_90", "gfx942" and their like. Raises ValueError for any other form."""
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d+)", arch):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"arch: expected a name such as {', '.join(ARCHS)}, got {arch!r}")


class _StandInDriver:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, arch: str) -> None:
        self._arch, self._target = arch, target(arch)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        # A kernel keeps its compiled versions per device: a name of its own for each architecture keeps them
        # apart from each other and from the devices of the real driver.
        return f"offline:{self._arch}"

    def get_current_stream(self, device: str | None = None) -> int:
        return 0


@contextlib.contextmanager
def offline_driver(arch: str) -> Iterator[None]:
    """Inside, Triton compiles for `arch`; afterwards its driver is what it was. Not safe across threads."""
    from triton.runtime import driver

    # Reading `driver.active` would create the real driver, which fails where there is no GPU.
    previous = driver._active if hasattr(driver, "_active") else driver.active
    driver.set_active(_StandInDriver(arch))
    try:
        yield
    finally:
        driver.set_active(previous)


_binaries: dict[str, Binary] = {}


def compile_launch(launch: Launch, arch: str) -> Binary:
    """`launch` compiled for `arch`, once per process; its tensors may be on the CPU or "meta" (address 0)."""
    with offline_driver(arch):
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    if compiled is None:
        raise RuntimeError("the kernel was not compiled: unset TRITON_INTERPRET before it is decorated")
    if compiled.hash not in _binaries:
        _binaries[compiled.hash] = read_binary(compiled, arch)
    return _binaries[compiled.hash]


def read_binary(compiled: Any, arch: str) -> Binary:
    """The figures of a kernel that Triton compiled."""
    meta, asm = compiled.metadata, compiled.asm
    if "cubin" in asm:
        usage = binary_tool("cuobjdump", "--dump-resource-usage", asm["cubin"])
        used = re.search(rf"Function {re.escape(meta.name)}:\s*REG:(\d+) STACK:(\d+)", usage)
        if used is None:
            raise RuntimeError(f"cuobjdump says nothing about {meta.name}: {usage}")
        # Triton has no arrays in memory: a stack holds nothing but spilled registers.
        registers, stack = int(used[1]), int(used[2])
        spilled = stack // 4
    else:
        registers, stack, spilled = (
            int(re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"])[1])
            for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
    return Binary(
        arch=arch,
        name=meta.name,
        num_warps=meta.num_warps,
        registers=registers,
        stack=stack,
        spilled=spilled,
        shared=meta.shared,
        asm={stage: text for stage, text in asm.items() if stage in ("ttgir", "ptx", "cubin", "amdgcn")},
        parameters=tuple(
            (place, kind) for place, kind in enumerate(compiled.src.signature.values()) if kind != "constexpr"
        ),
    )


def binary_tool(name: str, option: str, cubin: bytes) -> str:
    """What a CUDA binary tool of the Triton wheel prints about `cubin`."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([tool, option, file], check=True, capture_output=True, text=True).stdout


# Instructions by the unit that executes them. SHFL stands with shared memory, whose data path it takes.
_PIPES = {
    "tensor": r"[A-Z]*MMA",
    "mufu": "MUFU|F2F|F2I|I2F|FRND|POPC|FLO|BREV",
    "fp64": "DFMA|DADD|DMUL|DSETP|DMNMX",
    "fma": "FFMA2?|FADD2?|FMUL2?|FFMA32I|FADD32I|FMUL32I|HFMA2|HADD2|HMUL2|IMAD|IMUL|IDP",
    "shared": "LDS|STS|LDSM|STSM|MOVM|ATOMS|SHFL",
    "global": "LDG|STG|LD|ST|LDGSTS|ATOMG|ATOM|RED|REDG|UBLK[A-Z]+|UTMA[A-Z]+",
    "local": "LDL|STL",
    "alu": "IADD[23]?|IADD32I|VIADD|IABS|[IV]?IMNMX[23]?|VIADDMNMX|ISETP?|LEA|LOP3?|LOP32I|PLOP3|SHF|SHL|SHR"
    "|SGXT|BMSK|PRMT|MOV|MOV32I|SEL|FSEL|FSETP?|FMNMX[23]?|FCHK|HSETP?2|HMNMX2|VHMNMX|F2FP|F2IP|I2FP|I2IP|P2R|R2P"
    "|CS2R|VOTE|REDUX|CREDUX|MATCH|VABSDIFF4?",
}
_PIPE = re.compile("|".join(f"(?P<{pipe}>{names})" for pipe, names in _PIPES.items()))
PIPES = (*_PIPES, "other")

_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);")
_BITS = re.compile(r"\.(?:[US]?(8|16)|(64|128|256))(?=\.|$)")


def pipe(opcode: str) -> str:
    """The unit that executes an instruction, one of `PIPES`; branches, barriers and uniform registers are "other"."""
    match = _PIPE.fullmatch(opcode.partition(".")[0])
    return match.lastgroup or "" if match else "other"


@dataclass(frozen=True)
class Instruction:
    """One instruction of the machine code."""

    address: int
    guard: str  # the predicate it runs under, "" for none
    opcode: str  # with its modifiers, "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        """The unit that executes it, one of `PIPES`."""
        return pipe(self.opcode)

    @property
    def bits(self) -> int:
        """How much a load or store moves per thread."""
        match = _BITS.search(self.opcode)
        return int(match[1] or match[2]) if match else 32


@dataclass(frozen=True, eq=False)
class Loop:
    """A natural loop, everything inside its inner loops included; or the whole program, with no parent."""

    header: int  # the address of its first instruction
    parent: Loop | None = field(repr=False)
    instructions: tuple[Instruction, ...] = field(repr=False)

    @property
    def depth(self) -> int:
        """0 for the whole program, 1 for an outermost loop."""
        return 0 if self.parent is None else self.parent.depth + 1

    def within(self, outer: Loop) -> bool:
        """Whether this loop is `outer` or lies inside it."""
        return self is outer or (self.parent is not None and self.parent.within(outer))


@dataclass(frozen=True)
class Binary:
    """A compiled launch and its static figures."""

    arch: str
    name: str
    num_warps: int
    registers: int  # per thread
    stack: int  # bytes per thread
    spilled: int  # registers per thread
    shared: int  # bytes per program
    asm: Mapping[str, str | bytes] = field(repr=False)
    # The arguments that the code still takes, by place, and their types: "*bf16", "i32".
    parameters: tuple[tuple[int, str], ...] = ()

    @property
    def ptx(self) -> str:
        """The PTX (NVIDIA)."""
        return self._stage("ptx")

    @property
    def amdgcn(self) -> str:
        """The assembly (AMD)."""
        return self._stage("amdgcn")

    def _stage(self, stage: str) -> Any:
        if stage not in self.asm:
            raise ValueError(f"{self.name}: code for {self.arch} has no {stage}, only {', '.join(self.asm)}")
        return self.asm[stage]

    @cached_property
    def sass(self) -> str:
        """The disassembled machine code (NVIDIA)."""
        return binary_tool("nvdisasm", "-c", self._stage("cubin"))

    @cached_property
    def code(self) -> tuple[tuple[Instruction, ...], Mapping[str, int]]:
        """The instructions in the order of their addresses (NVIDIA), and the addresses of the labels."""
        return _listing(self.sass, self.name)

    @cached_property
    def program(self) -> Loop:
        """All code that converged warps can reach from the entry, as the loop that surrounds every loop."""
        return self._loops[0]

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The natural loops, in the order of their addresses."""
        return self._loops[1:]

    @cached_property
    def _loops(self) -> tuple[Loop, ...]:
        return _find_loops(_blocks(*self.code))

    @cached_property
    def mma(self) -> Counter[tuple[str, str]]:
        """How often each matrix instruction stands in the code: ("mma.sync", "tf32"), ("v_mfma", "bf16")."""
        if "amdgcn" in self.asm:
            found = re.findall(r"^\s*v_mfma_\w+?_\d+x\d+x\d+_?(?:\d+b_)?(\w+)", self.amdgcn, re.M)
            return Counter(("v_mfma", "tf32" if dtype == "xf32" else dtype) for dtype in found)
        found = re.findall(r"\b(mma\.sync|wgmma\.mma_async)[\w.:]*?\.m\d+n\d+k\d+((?:\.\w+)*)", self.ptx)
        kinds = Counter((family.split(".mma_")[0], _operand_dtype(rest)) for family, rest in found)
        blackwell = re.findall(r"\btcgen05\.mma[\w.:]*?\.kind::(\w+)", self.ptx)
        kinds.update(("tcgen05", kind) for kind in blackwell)
        return kinds

    @property
    def families(self) -> frozenset[str]:
        """Which generations of NVIDIA's tensor-core instructions the PTX uses, fences and moves included."""
        return frozenset(name for name in ("mma.sync", "wgmma", "tcgen05") if name in self.ptx)

    @property
    def global_accesses(self) -> Counter[tuple[str, int]]:
        """How often each access to global memory stands in the code: ("LDG", 128), in bits per thread."""
        return Counter((i.name, i.bits) for i in self.program.instructions if i.pipe == "global")


def _operand_dtype(modifiers: str) -> str:
    """The dtype of the left operand, which follows the result's: ".row.col.f32.tf32.tf32.f32"."""
    return re.findall(r"\.(tf32|bf16|[fsue]\d\w*|b1)", modifiers)[1]


def instructions(
    binary: Binary,
    trips: Sequence[int] = (),
    loop: Loop | None = None,
    key: Callable[[Instruction], str] = lambda instruction: instruction.pipe,
) -> Counter[str]:
    """Warp-instructions that all warps of a program issue in one trip of `loop`, by pipe; or by `key`.

    `loop` is the longest outermost one, unless named (`binary.program` counts a whole program). `trips` says
    how often each loop inside it runs per entry, in the order of their addresses. Both sides of a branch and
    predicated instructions count; a subroutine counts as its call.
    """
    if loop is None:
        outermost = [loop for loop in binary.loops if loop.depth == 1]
        if not outermost:
            raise ValueError(f"{binary.name}: there is no loop; pass loop=binary.program to count it all")
        loop = max(outermost, key=lambda loop: len(loop.instructions))
    inner = [candidate for candidate in binary.loops if candidate.within(loop) and candidate is not loop]
    if len(inner) != len(trips):
        found = "; ".join(f"at {i.header:#x}: depth {i.depth}, {len(i.instructions)} long" for i in inner)
        raise ValueError(f"trips: expected one for each inner loop ({found or 'none'}), got {list(trips)}")
    weight = {instruction.address: binary.num_warps for instruction in loop.instructions}
    for nested, count in zip(inner, trips, strict=True):
        for instruction in nested.instructions:
            weight[instruction.address] *= count
    counts: Counter[str] = Counter()
    for instruction in loop.instructions:
        counts[key(instruction)] += weight[instruction.address]
    return counts


@dataclass
class _Block:
    """Instructions that run in a row, and the addresses of the blocks that may follow."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)


def _listing(sass: str, kernel: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    """The instructions of `kernel`, and the addresses of its labels."""
    _, found, section = sass.partition(f"\n.text.{kernel}:\n")
    if not found:
        raise ValueError(f"no code of {kernel} in the disassembly")
    code: list[Instruction] = []
    waiting: list[str] = []  # labels of the instruction to come
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if line.startswith("//-----"):  # the next section
            break
        if match := _INSTRUCTION.match(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            code.append(Instruction(address, match[2] or "", match[3], match[4].strip()))
        elif match := re.match(r"(\S+):\s*$", line):
            waiting.append(match[1])
    return tuple(code), labels


def _blocks(code: Sequence[Instruction], labels: Mapping[str, int]) -> dict[int, _Block]:
    """The basic blocks by address, entry first."""
    starts = set(labels.values())
    blocks: dict[int, _Block] = {}
    for before, instruction in zip([None, *code], code, strict=False):
        if before is None or before.name in _BREAKS or instruction.address in starts:
            block = blocks[instruction.address] = _Block([])
        block.instructions.append(instruction)
    for block, following in zip(blocks.values(), [*list(blocks)[1:], None], strict=True):
        block.successors = _successors(block.instructions[-1], following, labels)
    return blocks


_JUMPS = ("BRA", "JMP", "CALL")
_ENDS = ("EXIT", "RET", "KILL")
_COMPUTED = ("BRX", "BRXU", "JMX", "JMXU")
_BREAKS = (*_JUMPS, *_ENDS, *_COMPUTED)


def _successors(last: Instruction, following: int | None, labels: Mapping[str, int]) -> list[int]:
    """The addresses of the blocks that control may reach after `last`."""
    if last.name in _COMPUTED:
        raise ValueError(f"cannot follow {last.opcode} at {last.address:#x}: its target is computed")
    # A branch may carry its condition as an operand instead of a guard: BRA.U UP0, `(.L_x_1)
    always = not last.guard and (last.name in _ENDS or last.operands.startswith("`"))
    onward = [] if following is None or (always and last.name != "CALL") else [following]
    label = re.search(r"`\((.+)\)", last.operands)
    # BRA.DIV leaves for a copy of the next instructions that only diverged warps run. A subroutine has a name
    # that begins with "$" and returns; a CALL of any other label is a jump to a cold place, often to an EXIT.
    if last.name not in _JUMPS or last.opcode.startswith("BRA.DIV") or label[1].startswith("$"):
        return onward
    return [*onward, labels[label[1]]]


def _find_loops(blocks: Mapping[int, _Block]) -> tuple[Loop, ...]:
    """The whole program, then its natural loops in the order of their addresses, so that parents come first.

    Raises ValueError for a loop that can be entered in two places.
    """
    entry = next(iter(blocks))
    predecessors: dict[int, set[int]] = {entry: set()}
    back: list[tuple[int, int]] = []
    open_, path = {entry}, [(entry, iter(blocks[entry].successors))]
    while path:
        here, rest = path[-1]
        following = next(rest, None)
        if following is None:
            open_.discard(here)
            path.pop()
            continue
        if following in open_:
            back.append((here, following))
        if following not in predecessors:
            predecessors[following] = set()
            open_.add(following)
            path.append((following, iter(blocks[following].successors)))
        predecessors[following].add(here)

    bodies: dict[int, set[int]] = {}
    for latch, header in back:
        body = bodies.setdefault(header, {header})
        todo = [latch]
        while todo:
            if (block := todo.pop()) not in body:
                body.add(block)
                todo.extend(predecessors[block])
        # From inside a loop all ways back lead through its header, unless it has another entry.
        if entry in body and header != entry:
            raise ValueError(f"the loop at {header:#x} has a second entry")

    def gather(addresses: Iterable[int]) -> tuple[Instruction, ...]:
        return tuple(i for address in sorted(addresses) for i in blocks[address].instructions)

    program = Loop(entry, None, gather(predecessors))
    loops: dict[int, Loop] = {}
    # A parent's body is larger than that of any loop inside it.
    for header in sorted(bodies, key=lambda header: -len(bodies[header])):
        around = [outer for outer in loops if header in bodies[outer] and bodies[header] < bodies[outer]]
        parent = loops[min(around, key=lambda outer: len(bodies[outer]))] if around else program
        loops[header] = Loop(header, parent, gather(bodies[header]))
    return (program, *(loops[header] for header in sorted(loops)))
