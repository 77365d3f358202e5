"""Follows a program of a compiled launch through its machine code, lane by lane, and counts what it does.

    trace = follow(binary, launch)                  # program 0, all its warps
    trace.issued                                    # warp-instructions by opcode
    trace.read, trace.written                       # bytes by argument, each byte once
    trace.wavefronts, trace.conflicts               # of shared memory

What hangs on the launch's arguments, the program's number and the lane is computed as a GPU would: trip counts,
predicates, addresses. What is loaded, and all that follows from it, is unknown. A branch that hangs on something
unknown takes the arm it is told to; `ordinary_arms` finds the one that ordinary inputs take. So a count is exact for
the inputs that take these arms, with loops by their trip counts and guards resolved.

Only what addresses and conditions are made of is computed, in NVIDIA's SASS from sm_80 to sm_100; everything else
gives unknown values. An address that is needed but unknown is counted as such, never guessed.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .offline import Binary, Instruction, Launch

LANES = 32
SECTOR = 32  # bytes: what the first-level cache asks the second-level cache for
# What goes on longer than this has no end: instructions of a warp, and its visits to a branch that data decides.
MOST_STEPS = 20_000_000
MOST_CHOICES = 10_000

# A value in each lane, or None where it is unknown.
Value = NDArray[np.uint32] | None
Flag = NDArray[np.bool_] | None

_ALL = np.ones(LANES, bool)
_NONE = np.zeros(LANES, bool)
_ZERO = np.zeros(LANES, np.uint32)
_LANE = np.arange(LANES, dtype=np.uint32)
_LOW = np.uint64(0xFFFFFFFF)


@dataclass
class Trace:
    """What one program did. Arguments are named by their place in the launch.

    issued: warp-instructions by opcode. read, written: different bytes of each argument's memory. sectors: 32-byte
    pieces that loads and stores touch, access by access. wavefronts: passes through shared memory; conflicts: those
    more than the same words would take, spread evenly over the banks; unknown: accesses to shared or global memory
    whose addresses hang on data. branches: those that hang on data, by address, and whether they were taken; loops: the
    branches that end a loop and do, of which each trip was taken to be the last.
    """

    issued: Counter[str] = field(default_factory=Counter)
    read: Counter[int] = field(default_factory=Counter)
    written: Counter[int] = field(default_factory=Counter)
    sectors: int = 0
    wavefronts: int = 0
    conflicts: int = 0
    unknown: int = 0
    branches: dict[int, bool] = field(default_factory=dict)
    loops: set[int] = field(default_factory=set)

    def __sub__(self, other: Trace) -> Trace:
        """What this program did beyond what `other` did, which did a part of the same."""
        return self._combined(other, -1)

    def __add__(self, other: Trace) -> Trace:
        """What both did, each byte of memory counted for each."""
        return self._combined(other, 1)

    def _combined(self, other: Trace, sign: int) -> Trace:
        def both(name: str) -> Counter[Any]:
            mine, theirs = getattr(self, name), getattr(other, name)
            sums = {key: mine[key] + sign * theirs[key] for key in mine.keys() | theirs.keys()}
            return Counter({key: count for key, count in sums.items() if count})

        numbers = ("sectors", "wavefronts", "conflicts", "unknown")
        return Trace(
            *map(both, ("issued", "read", "written")),
            *(getattr(self, name) + sign * getattr(other, name) for name in numbers),
            self.branches,
            self.loops | other.loops,
        )


class Endless(ValueError):
    """Data decides how often something runs, and the arms that branches were told to take lead round and round.

    address: of the branch that was met too often. branches: as in `Trace`.
    """

    def __init__(self, name: str, address: int, branches: dict[int, bool]) -> None:
        super().__init__(f"{name}: how often the code at {address:#x} runs hangs on data")
        self.address, self.branches = address, branches


def follow(binary: Binary, launch: Launch, program: int = 0, arms: Mapping[int, bool] | None = None) -> Trace:
    """What `program` of the launch's grid does, all its warps; `arms`: whether branches that hang on data are taken.

    Those not named fall through. Raises Endless where that never ends, and ValueError for an argument of no kind that
    Triton passes, and for code that cannot be followed.
    """
    memory = _Memory(launch.args)
    bank = _constants(binary, launch, memory)
    trace = Trace()
    for warp in range(binary.num_warps):
        _Warp(binary, bank, program, warp, memory, trace, dict(arms or {})).run()
    memory.settle(trace)
    return trace


def ordinary_arms(binary: Binary, launch: Launch, program: int = 0) -> list[tuple[dict[int, bool], Trace]]:
    """The way through the program that ordinary inputs take, and, where data decides, the way that takes the other arm
    everywhere.

    Ordinary is, branch by branch, the arm with fewer maxima, then with fewer instructions: kernels leave out what
    guards against rare inputs, such as the subtraction of the maximum in softmax, or the long way of a division, where
    it is not needed. Raises Endless where no such way ends.
    """
    endless: dict[int, Endless] = {}

    def attempt(arms: dict[int, bool]) -> _Attempt:
        try:
            trace = follow(binary, launch, program, arms)
        except Endless as error:
            endless[error.address] = error
            return _Attempt((1, 0, 0), error.branches, None)
        return _Attempt((0, maxima(trace), trace.issued.total()), trace.branches, trace)

    best, decided = attempt({}), set[int]()
    while undecided := [address for address in best.branches if address not in decided]:
        address = undecided[0]
        decided.add(address)
        other = attempt({**best.branches, address: not best.branches[address]})
        if other.cost < best.cost:
            best = other
    if best.trace is None:
        raise next(iter(endless.values()))
    ways = [best, attempt({address: not taken for address, taken in best.branches.items()})][: 1 + bool(best.branches)]
    for way in ways:
        if way.trace is not None:
            way.trace.loops |= endless.keys() & way.branches.keys()
    return [(dict(way.branches), way.trace) for way in ways if way.trace is not None]


class _Attempt(NamedTuple):
    """One way through a program, and what speaks against it: that it never ends, maxima, instructions."""

    cost: tuple[int, int, int]
    branches: dict[int, bool]
    trace: Trace | None


def maxima(trace: Trace) -> int:
    """Warp-instructions that take the larger of floating-point numbers."""
    return sum(count for opcode, count in trace.issued.items() if re.match(r"V?[FH]MNMX", opcode))


# --- memory -------------------------------------------------------------------------------------------------


class _Memory:
    """Where the arguments' memory lies, and which of it was touched."""

    def __init__(self, args: Sequence[Any]) -> None:
        self.bases: dict[int, int] = {}  # by storage
        self.owner: dict[int, int] = {}  # the first argument in each region of addresses
        for number, tensor in enumerate(args):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()._cdata
                if storage not in self.bases:
                    self.bases[storage] = (len(self.bases) + 1) << 40
                    self.owner[len(self.bases)] = number
        self._touched: dict[tuple[bool, int], dict[bytes, NDArray[np.uint64]]] = {}

    def address(self, tensor: torch.Tensor) -> int:
        offset = tensor.storage_offset() * tensor.element_size()
        return self.bases[tensor.untyped_storage()._cdata] + offset

    def touch(self, addresses: NDArray[np.uint64], size: int, store: bool) -> None:
        """Lanes read or write `size` bytes each."""
        self._touched.setdefault((store, size), {}).setdefault(addresses.tobytes(), addresses)

    def settle(self, trace: Trace) -> None:
        """Adds the different bytes of each argument to the trace."""
        for store, count in ((False, trace.read), (True, trace.written)):
            accesses = {size: each for (kind, size), each in self._touched.items() if kind == store}
            if not accesses:
                continue
            # In the largest pieces that no access cuts.
            unit = min(accesses)
            while any((addresses % np.uint64(unit)).any() for each in accesses.values() for addresses in each.values()):
                unit //= 2
            pieces = [
                (addresses[:, None] + np.arange(0, size, unit, dtype=np.uint64)).ravel()
                for size, each in accesses.items()
                for addresses in each.values()
            ]
            touched = np.sort(np.concatenate(pieces))
            regions = touched[np.diff(touched, prepend=0) != 0] >> np.uint64(40)
            for region in np.flatnonzero(np.bincount(regions.astype(np.int64))).tolist():
                count[self.owner.get(region, -1)] += unit * int((regions == region).sum())


def wavefronts(addresses: NDArray[Any], bits: int) -> tuple[int, int]:
    """Passes that an access to shared memory takes, and how many of them are conflicts.

    addresses: in bytes, of the active lanes in order. A pass serves 32 banks of 4 bytes, of each one word, to any
    number of lanes; accesses of 8 bytes per lane go by half warps, of 16 by quarters, so that no group of lanes needs
    more than one pass but for conflicts.
    """
    words = max(1, bits // 32)
    passes = conflicts = 0
    places = (addresses >> addresses.dtype.type(2)).tolist()
    for start in range(0, len(places), LANES // words):
        touched = {place + i for place in places[start : start + LANES // words] for i in range(words)}
        needed = max(Counter(word % 32 for word in touched).values())
        passes += needed
        conflicts += needed - 1
    return passes, conflicts


# Where bank 0 of the constants holds the block's and the grid's sizes, the stack's top and the first parameter: by
# the compute capability's major number, as ptxas of CUDA 12 and 13 compiles it.
_BANK = {8: (0x0, 0xC, 0x28, 0x160), 9: (0x0, 0xC, 0x28, 0x210), 10: (0x360, 0x36C + 0x4, 0x37C, 0x380)}
_STACK = 0x10000


class _Bank:
    """The constants a launch gets: 4-byte words by their offset."""

    def __init__(self) -> None:
        self.words: dict[int, int] = {}

    def put(self, offset: int, data: bytes) -> None:
        data += b"\0" * (-len(data) % 4)
        for i, (word,) in enumerate(struct.iter_unpack("<I", data)):
            self.words[offset + 4 * i] = word

    def get(self, offset: int) -> Value:
        word = self.words.get(offset)
        return None if word is None else np.full(LANES, word, np.uint32)


def _constants(binary: Binary, launch: Launch, memory: _Memory) -> _Bank:
    major = int(binary.arch.removeprefix("sm_")) // 10
    if major not in _BANK:
        raise ValueError(f"arch: expected one of sm_80 to sm_100, got {binary.arch!r}")
    block, grid, stack, offset = _BANK[major]
    bank = _Bank()
    sizes = (*launch.grid, 1, 1)[:3]
    bank.put(block, struct.pack("<III", LANES * binary.num_warps, 1, 1))
    bank.put(grid, struct.pack("<III", *sizes))
    bank.put(stack, struct.pack("<I", _STACK))
    for number, kind in binary.parameters:
        value = launch.args[number]
        if kind.startswith("*"):
            form, size, value = "<Q", 8, memory.address(value)
        elif match := re.fullmatch(r"[iu](8|16|32|64)", kind):
            size = int(match[1]) // 8
            form, value = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}[size], int(value) & ((1 << 8 * size) - 1)
        elif kind in ("fp32", "fp64"):
            form, size = ("<f", 4) if kind == "fp32" else ("<d", 8)
        else:
            raise ValueError(f"{binary.name}: cannot pass argument {number}, a {kind}")
        offset += -offset % size
        bank.put(offset, struct.pack(form, value))
        offset += size
    return bank


# --- operands -----------------------------------------------------------------------------------------------

# Registers: R0 to R254, then the uniform UR0 to UR254. RZ and URZ read zero.
_UNIFORM = 256
_PREDICATE = re.compile(r"(!?)(U?P)(T|\d)")
_REGISTER = re.compile(r"(-|~)?\|?(U?R)(Z|\d+)\|?")
_CONSTANT = re.compile(r"(-|~)?c\[0x0\]\[(0x[0-9a-f]+)\]")
_IMMEDIATE = re.compile(r"-?(?:0x[0-9a-f]+|\d+)")
_BRACKET = re.compile(r"\[([^\[\]]+)\]")

# Reads what an operand stands for.
Reader = Callable[["_Warp"], Value]
FlagReader = Callable[["_Warp"], Flag]


def _register(text: str) -> int | None:
    """The number of the register that is written, None for RZ. Raises ValueError for anything else."""
    match = re.fullmatch(r"(U?R)(Z|\d+)", text)
    if match is None:
        raise ValueError(f"expected a register, got {text!r}")
    return None if match[2] == "Z" else int(match[2]) + (_UNIFORM if match[1] == "UR" else 0)


def _flag_number(text: str) -> int | None:
    match = _PREDICATE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a predicate, got {text!r}")
    return None if match[3] == "T" else int(match[3]) + (8 if match[2] == "UP" else 0)


def _is_flag(text: str) -> bool:
    return _PREDICATE.fullmatch(text) is not None


def _flag(text: str) -> FlagReader:
    number, negated = _flag_number(text), text.startswith("!")
    if number is None:
        constant = _NONE if negated else _ALL
        return lambda warp: constant

    def read(warp: _Warp) -> Flag:
        value = warp.flag(number)
        return value if value is None or not negated else ~value

    return read


def _signed(sign: str | None, value: Value) -> Value:
    if value is None or not sign:
        return value
    return ~value if sign == "~" else (~value + np.uint32(1))


def _source(text: str) -> Reader:
    """Of an integer operand; floating-point immediates, packed halves and the like are unknown."""
    if match := _REGISTER.fullmatch(text):
        sign, number = match[1], _register(match[2] + match[3])
        if number is None:
            constant = _signed(sign, _ZERO)
            return lambda warp: constant
        if "|" in text:
            return lambda warp: None
        if not sign:
            return lambda warp: warp.value(number)
        return lambda warp: _signed(sign, warp.value(number))
    if match := _CONSTANT.fullmatch(text):
        sign, offset = match[1], int(match[2], 16)
        return lambda warp: _signed(sign, warp.bank.get(offset))
    if _IMMEDIATE.fullmatch(text):
        immediate = np.full(LANES, int(text, 0) & 0xFFFFFFFF, np.uint32)
        return lambda warp: immediate
    return lambda warp: None


def _upper(text: str) -> Reader:
    """The register or constant after the one `text` names: the upper half of 64 bits."""
    if match := _REGISTER.fullmatch(text):
        return _source(text if match[3] == "Z" else f"{match[1] or ''}{match[2]}{int(match[3]) + 1}")
    if match := _CONSTANT.fullmatch(text):
        return _source(f"{match[1] or ''}c[0x0][{int(match[2], 16) + 4:#x}]")
    if _IMMEDIATE.fullmatch(text):
        return _source("0x0" if int(text, 0) >= 0 else "-0x1")
    return lambda warp: None


def _address(text: str) -> Callable[[_Warp], NDArray[np.uint64] | None]:
    """Of a bracket's content, such as R2.64+UR4+0x10: the sum of its terms."""
    terms: list[tuple[Reader, Reader | None, int]] = []
    for term in text.replace("+-", "+~").split("+"):
        if term.startswith("~"):
            constant = np.full(LANES, -int(term[1:], 0) & 0xFFFFFFFF, np.uint32)
            ones = np.full(LANES, 0xFFFFFFFF, np.uint32)
            terms.append((lambda warp, c=constant: c, lambda warp, o=ones: o, 1))
            continue
        name, *modifiers = term.split(".")
        scale = next((int(m[1:]) for m in modifiers if re.fullmatch(r"X\d+", m)), 1)
        terms.append((_source(name), _upper(name) if "64" in modifiers else None, scale))

    def read(warp: _Warp) -> NDArray[np.uint64] | None:
        total = np.zeros(LANES, np.uint64)
        for low, high, scale in terms:
            value = low(warp)
            if value is None:
                return None
            wide = value.astype(np.uint64) * np.uint64(scale)
            if high is not None:
                top = high(warp)
                if top is None:
                    return None
                wide += top.astype(np.uint64) << np.uint64(32)
            total += wide
        return total

    return read


# --- what instructions compute ------------------------------------------------------------------------------
# Each takes the modifiers, the sources and the predicates that follow them, and gives the registers and the
# predicates (carries) it writes. None stands for unknown; sources are known.

_Result = tuple[Sequence[Value], Sequence[Flag]]


def _u64(low: Any, high: Any = None) -> NDArray[np.uint64]:
    wide: NDArray[np.uint64] = low.astype(np.uint64)
    return wide if high is None else wide | (high.astype(np.uint64) << np.uint64(32))


def _halves(wide: NDArray[np.uint64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    return wide.astype(np.uint32), (wide >> np.uint64(32)).astype(np.uint32)


def _product(a: Any, b: Any, unsigned: bool) -> NDArray[np.uint64]:
    if unsigned:
        return _u64(a) * _u64(b)
    product: NDArray[np.int64] = a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64)
    return product.view(np.uint64)


def _shift(value: Any, amount: Any, left: bool, arithmetic: bool, bits: int) -> Any:
    """Shifts by the width or more leave zero, or the sign."""
    kind: Any = {(32, False): np.uint32, (32, True): np.int32, (64, False): np.uint64, (64, True): np.int64}[
        bits, arithmetic
    ]
    inside = np.minimum(amount, bits - 1).astype(kind)
    shifted = value.view(kind) << inside if left else value.view(kind) >> inside
    if left or not arithmetic:
        shifted = np.where(amount >= bits, kind(0), shifted)
    return shifted.view(np.uint32 if bits == 32 else np.uint64)


def _compare(a: Any, b: Any, how: str, below: Any = None) -> Any:
    """a how b; `below`: the same comparison of the lower halves, where these are the upper ones."""
    equal = {"EQ": True, "GE": True, "LE": True}.get(how, False) if below is None else below
    if how in ("EQ", "NE"):
        return (a == b) & equal if how == "EQ" else (a != b) | (equal if below is not None else False)
    strict = a > b if how in ("GT", "GE") else a < b
    return strict | ((a == b) & equal)


def _lookup(table: int, a: Any, b: Any, c: Any) -> Any:
    """The function of three bits that `table` lists, of every bit."""
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _known_lookup(table: int, inputs: Sequence[Any], zero: Any, one: Any) -> Any:
    """`_lookup` with inputs of which some are None; None unless they make no difference."""
    choices = [(zero, one) if value is None else (value,) for value in inputs]
    results = [_lookup(table, *combination) for combination in itertools.product(*choices)]
    same = all(np.array_equal(results[0], other) for other in results[1:])
    return results[0] if same else None


def _permute(a: Any, selector: Any, b: Any) -> Any:
    wide = _u64(a, b)
    result = np.zeros(LANES, np.uint32)
    for byte in range(4):
        nibble = (selector >> np.uint32(4 * byte)) & np.uint32(0xF)
        picked = (wide >> (_u64(nibble & np.uint32(7)) * np.uint64(8))).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(picked & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), sign, picked) << np.uint32(8 * byte)
    return result


def _bytes_of_half(text: str) -> int:
    return int(np.array(float(text), np.float16).view(np.uint16))


# --- the machine --------------------------------------------------------------------------------------------

# Does an instruction in the lanes where it is active, and gives where they go: None for the next instruction.
_Action = Callable[["_Warp", NDArray[np.bool_]], "dict[int, NDArray[np.bool_]] | None"]


class _Partly(NamedTuple):
    """What a register or a predicate holds where it is known in some lanes only."""

    numbers: NDArray[Any]
    known: NDArray[np.bool_]


def _merged(before: Any, value: Any, lanes: NDArray[np.bool_] | None) -> Any:
    """What is there after `value` was written in these lanes: as a `Value`, or `_Partly`."""
    if lanes is None:
        return None
    if lanes is _ALL or lanes.all():
        return value
    numbers, known = before if isinstance(before, _Partly) else (before, _NONE if before is None else _ALL)
    if value is None:
        known = known & ~lanes
    else:
        known = known | lanes
        numbers = value if numbers is None else np.where(lanes, value, numbers)
    if known.all():
        return numbers
    return _Partly(numbers, known) if known.any() else None


class _Warp:
    """One warp: its registers, and the lanes at each place in the code."""

    def __init__(
        self, binary: Binary, bank: _Bank, program: int, warp: int, memory: _Memory, trace: Trace, arms: dict[int, bool]
    ) -> None:
        self.binary, self.bank, self.memory, self.trace, self.arms = binary, bank, memory, trace, arms
        self.program, self.thread = program, _LANE + np.uint32(LANES * warp)
        # What nobody has written may be anything: programs set single bits of such registers, and read only those.
        self.values: list[Value | _Partly] = [_ZERO] * (2 * _UNIFORM)
        self.flags: list[Flag | _Partly] = [_NONE] * 16
        # The lanes that do the instruction at hand.
        self.active = _ALL
        self.local: dict[int, Value] = {}
        self.calls: list[int] = []
        self.choices: Counter[int] = Counter()
        self.seen: dict[tuple[bytes, int], tuple[int, int]] = {}

    def run(self) -> None:
        """Until every lane has left."""
        code = _code(self.binary)
        issued, trace = Counter[int](), self.trace
        groups = {0: _ALL}
        for _ in range(MOST_STEPS):
            if not groups:
                break
            # Lanes that went apart meet again where the foremost have waited.
            place = min(groups)
            lanes = groups.pop(place)
            issued[place] += 1
            self.active = lanes
            onward = code[place].action(self, lanes)
            if onward is None:
                onward = {place + 1: lanes}
            for target, those in onward.items():
                groups[target] = groups[target] | those if target in groups else those
        else:
            place = max(issued, key=lambda place: issued[place])
            address = code[place].instruction.address
            raise Endless(self.binary.name, address, trace.branches)
        for place, count in issued.items():
            trace.issued[code[place].instruction.opcode] += count

    def value(self, number: int) -> Value:
        """What the active lanes read in a register."""
        return self._known(self.values[number])

    def flag(self, number: int) -> Flag:
        """Likewise of a predicate."""
        return self._known(self.flags[number])

    def _known(self, held: Any) -> Any:
        if isinstance(held, _Partly):
            return None if (self.active & ~held.known).any() else held.numbers
        return held

    def write(self, number: int | None, value: Value, lanes: NDArray[np.bool_] | None) -> None:
        """In these lanes; None: unknown which."""
        if number is not None:
            self.values[number] = _merged(self.values[number], value, lanes)

    def write_flag(self, number: int | None, value: Flag, lanes: NDArray[np.bool_] | None) -> None:
        """Likewise."""
        if number is not None:
            self.flags[number] = _merged(self.flags[number], value, lanes)

    def arm(self, instruction: Instruction) -> bool:
        """Whether a branch that hangs on data is taken."""
        self.choices[instruction.address] += 1
        if self.choices[instruction.address] > MOST_CHOICES:
            raise Endless(self.binary.name, instruction.address, self.trace.branches)
        return self.trace.branches.setdefault(instruction.address, self.arms.get(instruction.address, False))

    def shared_access(self, addresses: NDArray[np.uint64] | None, lanes: NDArray[np.bool_], bits: int) -> None:
        if addresses is None:
            self.trace.unknown += 1
            self.trace.wavefronts += max(1, bits // 32)
            return
        active = addresses[lanes]
        if not len(active):
            return
        key = (active.tobytes(), bits)
        if key not in self.seen:
            self.seen[key] = wavefronts(active & _LOW, bits)
        passes, conflicts = self.seen[key]
        self.trace.wavefronts += passes
        self.trace.conflicts += conflicts

    def global_access(
        self, addresses: NDArray[np.uint64] | None, lanes: NDArray[np.bool_], bits: int, store: bool
    ) -> None:
        size = bits // 8
        if addresses is None:
            self.trace.unknown += 1
            self.trace.sectors += int(lanes.sum()) * -(-size // SECTOR)
            return
        active = addresses[lanes]
        if len(active):
            self.trace.sectors += len({address >> 5 for address in active.tolist()})
            self.memory.touch(active, size, store)


@dataclass(frozen=True)
class _Step:
    instruction: Instruction
    action: _Action


def _code(binary: Binary) -> list[_Step]:
    """The instructions in the order of their addresses, made ready to run, once per binary."""
    cached = vars(binary).get("_steps")
    if cached is None:
        code, labels = binary.code
        places = {instruction.address: place for place, instruction in enumerate(code)}
        cached = [_Step(i, _action(i, place, code, labels, places)) for place, i in enumerate(code)]
        vars(binary)["_steps"] = cached
    return cached  # type: ignore[no-any-return]


_NOTHING = re.compile(
    r"NOP|BAR|BSSY|BSYNC|BREAK|WARPSYNC|YIELD|MEMBAR|ERRBAR|CCTL|CCTLL|DEPBAR|LDGDEPBAR|FENCE|NANOSLEEP|ACQBULK|UCGABAR\w*|"
    r"PREEXIT|ELECT|SYNCS|WARPGROUP|BMOV|DEPBAR|ARRIVES|R2B|B2R"
)


def _action(
    instruction: Instruction,
    place: int,
    code: Sequence[Instruction],
    labels: Mapping[str, int],
    places: Mapping[int, int],
) -> _Action:
    """What the instruction does, its guard applied."""
    name, operands = instruction.name, _operands(instruction.operands)
    if name in ("BRA", "EXIT", "CALL", "RET", "KILL", "JMP", "BRX", "BRXU"):
        return _jump(instruction, operands, place, code, labels, places)
    if _NOTHING.fullmatch(name):
        return lambda warp, lanes: None
    body = _body(instruction, operands)
    if not instruction.guard:

        def plain(warp: _Warp, lanes: NDArray[np.bool_]) -> None:
            body(warp, lanes, lanes)

        return plain
    guard = _flag(instruction.guard)

    def guarded(warp: _Warp, lanes: NDArray[np.bool_]) -> None:
        condition = guard(warp)
        if condition is None:
            # Registers become unknown; memory is taken to be accessed by all.
            body(warp, None, lanes)
            return
        active = condition & lanes
        if active.any():
            warp.active = active
            body(warp, _ALL if active.all() else active, active)

    return guarded


_LABEL = re.compile(r"`\((.+)\)")

# (warp, lanes that write registers or None where that hangs on data, lanes that access memory)
_Body = Callable[["_Warp", "NDArray[np.bool_] | None", NDArray[np.bool_]], None]


def _operands(text: str) -> list[str]:
    cleaned = text.replace(".reuse", "")
    return [part.strip() for part in re.split(r",(?![^\[]*\])", cleaned) if part.strip()]


def _jump(
    instruction: Instruction,
    operands: list[str],
    place: int,
    code: Sequence[Instruction],
    labels: Mapping[str, int],
    places: Mapping[int, int],
) -> _Action:
    name, opcode = instruction.name, instruction.opcode
    label = _LABEL.search(instruction.operands)
    target = places.get(labels.get(label[1], -1)) if label else None
    if opcode.startswith("BRA.DIV"):
        return lambda warp, lanes: None
    if name in ("BRX", "BRXU", "JMP"):
        raise ValueError(f"cannot follow {opcode} at {instruction.address:#x}: its target is computed")
    texts = [instruction.guard] if instruction.guard else []
    texts += [operand for operand in operands if _is_flag(operand)]
    conditions = [_flag(text) for text in texts]
    subroutine = name == "CALL" and label is not None and label[1].startswith("$")
    # A loop ends with a jump back, or with one out of it past a jump back.
    repeats = target is not None and target <= place
    after = code[place + 1] if place + 1 < len(code) else instruction
    back = _LABEL.fullmatch(after.operands.strip()) if (after.opcode, after.guard) == ("BRA", "") else None
    leaves = not (repeats or subroutine or back is None or places.get(labels.get(back[1], -1), place + 1) > place)

    def go(warp: _Warp, lanes: NDArray[np.bool_]) -> dict[int, NDArray[np.bool_]]:
        taken: Flag = lanes
        for condition in conditions:
            value = condition(warp)
            taken = None if taken is None or value is None else taken & value
        if taken is None:
            if repeats or leaves:
                warp.trace.loops.add(instruction.address)
                taken = lanes if leaves else _NONE
            else:
                # Leaving early is for what does not exist, never for what was loaded.
                taken = lanes if name != "EXIT" and warp.arm(instruction) else _NONE
        onward: dict[int, NDArray[np.bool_]] = {}
        staying = lanes & ~taken
        if staying.any():
            onward[place + 1] = staying
        if name in ("EXIT", "KILL") or not taken.any():
            return onward
        goal = target
        if name == "RET":
            goal = warp.calls.pop()
        elif subroutine:
            warp.calls.append(place + 1)
        if goal is None:
            raise ValueError(f"cannot follow {opcode} at {instruction.address:#x}: no label {instruction.operands!r}")
        taken = _ALL if taken.all() else taken
        onward[goal] = onward[goal] | taken if goal in onward else taken
        return onward

    return go


def _registers_written(instruction: Instruction) -> int:
    """How many registers in a row an instruction of any kind writes."""
    name, opcode = instruction.name, instruction.opcode
    if name in ("HMMA", "IMMA", "DMMA", "BMMA", "QMMA", "OMMA"):
        return 2 if opcode.endswith(".F16") else 4
    if name in ("LDSM", "LDMATRIX"):
        return int(match[1]) if (match := re.search(r"\.M\w+\.(\d)$", opcode)) else 1
    if name in ("FADD2", "FMUL2", "FFMA2", "DADD", "DMUL", "DFMA") or opcode == "CS2R":
        return 2
    wide = re.search(r"\.(64|128|256)(?=\.|$)", opcode)
    return int(wide[1]) // 32 if wide else 2 if ".WIDE" in opcode else 1


def _body(instruction: Instruction, operands: list[str]) -> _Body:
    name, modifiers = instruction.name, instruction.opcode.split(".")[1:]
    if instruction.pipe in ("shared", "global", "local") and name not in ("SHFL", "MOVM"):
        return _memory_access(instruction, operands)
    plain = name[1:] if re.fullmatch(r"U[A-Z]\w*", name) and name not in ("UBLKCP",) else name
    if plain in ("LDC", "LDCU") or name in ("ULDC", "LDCU"):
        return _load_constant(instruction, operands)
    if plain in ("ISETP", "PLOP3"):
        return _set_flags(plain, modifiers, operands)
    if plain == "P2R" and operands[1] == "PR":
        return _flags_to_register(modifiers, operands)
    if plain == "R2P":
        return _register_to_flags(modifiers, operands)
    before = list(itertools.takewhile(_is_flag, operands))
    if len(before) == len(operands) or not re.fullmatch(r"U?R(Z|\d+)", operands[len(before)]):
        flags = [_flag_number(text) for text in before]
        return _forget([], flags)
    destination, *rest = operands[len(before) :]
    after = list(itertools.takewhile(_is_flag, rest))
    sources = [text for text in rest[len(after) :] if not _is_flag(text)]
    last = [text for text in rest[len(after) :] if _is_flag(text)]
    number = _register(destination)
    count = _registers_written(instruction)
    registers = [None if number is None else number + i for i in range(count)]
    flags = [_flag_number(text) for text in (*before, *after)]
    compute = _compute(plain, modifiers, sources)
    if compute is None:
        return _forget(registers, flags)
    readers = [_flag(text) for text in last]

    def body(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
        values, carries = compute(warp, [reader(warp) for reader in readers])
        for register, value in itertools.zip_longest(registers, values):
            warp.write(register, value, lanes)
        for flag, value in itertools.zip_longest(flags, carries[: len(flags)]):
            warp.write_flag(flag, value, lanes)

    return body


def _forget(registers: Sequence[int | None], flags: Sequence[int | None]) -> _Body:
    def body(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
        for register in registers:
            warp.write(register, None, lanes)
        for flag in flags:
            warp.write_flag(flag, None, lanes)

    return body


_Compute = Callable[[_Warp, Sequence[Flag]], _Result]


def _compute(name: str, modifiers: Sequence[str], texts: Sequence[str]) -> _Compute | None:
    """How the result of an integer instruction is found; None for one that is not followed."""
    if name in ("S2R", "S2UR", "CS2R"):
        return _special(texts[0])
    if name == "HFMA2" and len(texts) == 4 and set(texts[:2]) <= {"RZ", "-RZ"}:
        # A constant on the way through another unit.
        try:
            high, low = (_bytes_of_half(text) for text in texts[2:])
        except ValueError:
            return None
        constant = np.full(LANES, high << 16 | low, np.uint32)
        return lambda warp, last: ((constant,), ())
    rule, understood = _RULES.get(name, (None, frozenset[str]()))
    hints = frozenset(modifiers)
    if rule is None or not hints <= understood:
        return None
    reads = [_source(text) for text in texts]
    uppers = [_upper(text) for text in texts]
    negative = [text.startswith("-") for text in texts]

    def compute(warp: _Warp, last: Sequence[Flag]) -> _Result:
        return rule(_Sources(warp, hints, reads, uppers, negative, last))

    return compute


def _special(name: str) -> _Compute | None:
    if name == "SRZ":
        return lambda warp, last: ((_ZERO, _ZERO), ())
    if name == "SR_TID.X":
        return lambda warp, last: ((warp.thread,), ())
    if name == "SR_LANEID":
        return lambda warp, last: ((_LANE,), ())
    if name == "SR_CTAID.X":
        return lambda warp, last: ((np.full(LANES, warp.program, np.uint32),), ())
    if name in ("SR_CTAID.Y", "SR_CTAID.Z", "SR_TID.Y", "SR_TID.Z", "SR_CgaCtaId"):
        return lambda warp, last: ((_ZERO,), ())
    return None


class _Sources:
    """The sources of one instruction as it runs."""

    def __init__(
        self,
        warp: _Warp,
        modifiers: frozenset[str],
        reads: Sequence[Reader],
        uppers: Sequence[Reader],
        negative: Sequence[bool],
        last: Sequence[Flag],
    ) -> None:
        self.warp, self.modifiers, self.last = warp, modifiers, last
        self.values = [read(warp) for read in reads]
        self.uppers, self.negative = uppers, negative

    @property
    def known(self) -> bool:
        return all(value is not None for value in self.values) and all(flag is not None for flag in self.last)

    def upper(self, i: int) -> Value:
        return self.uppers[i](self.warp)


_UNKNOWN: _Result = ((None,), ())


def _add(s: _Sources) -> _Result:
    if not s.known:
        return _UNKNOWN
    total = np.zeros(LANES, np.uint64)
    for value, negative in zip(s.values, s.negative, strict=True):
        total += _u64(value)
        # -0 is all ones and one more: it carries.
        if negative:
            total += np.where(value == 0, np.uint64(1 << 32), np.uint64(0))
    for carry in s.last:
        total += carry.astype(np.uint64)  # type: ignore[union-attr]
    carries = (total >> np.uint64(32)).astype(np.uint32)
    return (total.astype(np.uint32),), (carries >= 1, carries >= 2)


def _multiply_add(s: _Sources) -> _Result:
    if not s.known:
        return _UNKNOWN
    a, b, c = s.values
    unsigned = "U32" in s.modifiers
    if "WIDE" in s.modifiers or "HI" in s.modifiers:
        high = s.upper(2)
        if high is None:
            return (None, None), ()
        product, added = _product(a, b, unsigned), _u64(c, high)
        for carry in s.last:
            added = added + carry.astype(np.uint64)  # type: ignore[union-attr]
        total = product + added
        low, high = _halves(total)
        if "HI" in s.modifiers:
            return (high,), ()
        return (low, high), (total < product,)
    total32 = a * b + c
    if s.last:
        total32 = total32 + s.last[0].astype(np.uint32)  # type: ignore[union-attr]
    return (total32,), ()


def _shifted_add(s: _Sources) -> _Result:
    """LEA: (a << shift) + b; LEA.HI: the upper half of ({c, a} << shift), plus b."""
    if not s.known:
        return _UNKNOWN
    a, b, *rest = s.values
    shift = rest[-1].astype(np.uint64) if rest else np.zeros(LANES, np.uint64)
    if "HI" in s.modifiers:
        top = np.where(a.view(np.int32) < 0, np.uint32(0xFFFFFFFF), np.uint32(0)) if "SX32" in s.modifiers else rest[0]
        shifted = ((_u64(a, top) << shift) >> np.uint64(32)) & _LOW
    else:
        shifted = (_u64(a) << shift) & _LOW
    total = shifted + _u64(b)
    if s.last:
        total += s.last[0].astype(np.uint64)  # type: ignore[union-attr]
    return (total.astype(np.uint32),), (total > _LOW,)


def _funnel(s: _Sources) -> _Result:
    """SHF: of {high, low}, shifted, one half."""
    if not s.known:
        return _UNKNOWN
    low, amount, high = s.values
    amount = amount & np.uint32(0x1F if "W" in s.modifiers and not {"U64", "S64"} & s.modifiers else 0xFF)
    signed = bool({"S32", "S64"} & s.modifiers)
    left = "L" in s.modifiers
    if {"U64", "S64"} & s.modifiers:
        shifted = _shift(_u64(low, high), amount, left, signed, 64)
        return (_halves(shifted)[1 if "HI" in s.modifiers else 0],), ()
    if left:
        # The upper half, filled up from the lower one.
        if "HI" in s.modifiers:
            return (_halves(_shift(_u64(low, high), amount, True, False, 64))[1],), ()
        return (_shift(low, amount, True, False, 32),), ()
    if "HI" in s.modifiers:
        return (_shift(high, amount, False, signed, 32),), ()
    return (_halves(_shift(_u64(low, high), amount, False, signed, 64))[0],), ()


def _logic(s: _Sources) -> _Result:
    *inputs, table = s.values
    if table is None or len(inputs) != 3:
        return _UNKNOWN
    result = _known_lookup(int(table[0]), inputs, _ZERO, ~_ZERO)
    if result is None:
        return _UNKNOWN
    flag = s.last[0] if s.last else _NONE
    return (result,), (None if flag is None else (result != 0) | flag,)


def _select(s: _Sources) -> _Result:
    (a, b), flag = s.values[:2], s.last[0]
    if flag is None:
        return _UNKNOWN
    if flag.all() or not flag.any():
        return (a if flag.all() else b,), ()
    return (None if a is None or b is None else np.where(flag, a, b),), ()


def _extreme(s: _Sources) -> _Result:
    if not s.known or len(s.values) != 2:
        return _UNKNOWN
    a, b = s.values
    kind = np.uint32 if "U32" in s.modifiers else np.int32
    smaller = a.view(kind) < b.view(kind)
    return (np.where(smaller == s.last[0], a, b),), ()


def _move(s: _Sources) -> _Result:
    return (s.values[0],), ()


def _bits_move(s: _Sources) -> _Result:
    if not s.known:
        return _UNKNOWN
    return (_permute(*s.values),), ()


def _extend(s: _Sources) -> _Result:
    """SGXT: the lowest bits, with their sign unless U32."""
    if not s.known:
        return _UNKNOWN
    a, width = s.values
    space = np.minimum(np.uint32(32) - np.minimum(width, 32), 31).astype(np.uint32)
    raised = a << space
    return (
        (raised >> space) if "U32" in s.modifiers else (raised.view(np.int32) >> space.view(np.int32)).view(np.uint32),
    ), ()


def _mask(s: _Sources) -> _Result:
    """BMSK: so many ones from a bit on."""
    if not s.known:
        return _UNKNOWN
    first, count = (np.minimum(value, 32).astype(np.uint64) for value in s.values)
    ones = (np.uint64(1) << count) - np.uint64(1)
    return ((ones << first).astype(np.uint32),), ()


def _absolute(s: _Sources) -> _Result:
    return ((None if s.values[0] is None else np.abs(s.values[0].view(np.int32)).view(np.uint32)),), ()


def _shuffle(s: _Sources) -> _Result:
    a, b = s.values[:2]
    if a is None or b is None or s.values[2] is None or not (s.values[2] == 0x1F).all():
        return _UNKNOWN
    if "IDX" in s.modifiers:
        return (a[b & np.uint32(31)],), (_ALL,)
    if "BFLY" in s.modifiers:
        return (a[(_LANE ^ b) & np.uint32(31)],), (_ALL,)
    return _UNKNOWN


def _to_uniform(s: _Sources) -> _Result:
    a, first = s.values[0], int(s.warp.active.argmax())
    return ((None if a is None else np.full(LANES, a[first], np.uint32)),), ()


# Each with the modifiers it knows; with any other, the result is unknown.
_RULES: Mapping[str, tuple[Callable[[_Sources], _Result], frozenset[str]]] = {
    name: (rule, frozenset(modifiers.split()))
    for names, rule, modifiers in (
        ("IADD3 VIADD IADD IADD32I", _add, "X"),
        ("IMAD", _multiply_add, "MOV IADD SHL U32 X WIDE HI"),
        ("LEA", _shifted_add, "HI X SX32"),
        ("SHF", _funnel, "L R U32 S32 U64 S64 HI W"),
        ("LOP3", _logic, "LUT"),
        ("SEL", _select, ""),
        ("IMNMX VIMNMX", _extreme, "U32 S32"),
        ("MOV MOV32I", _move, ""),
        ("PRMT", _bits_move, ""),
        ("SGXT", _extend, "U32"),
        ("BMSK", _mask, ""),
        ("IABS", _absolute, ""),
        ("SHFL", _shuffle, "IDX BFLY"),
        ("R2UR", _to_uniform, ""),
    )
    for name in names.split()
}


def _set_flags(name: str, modifiers: Sequence[str], operands: Sequence[str]) -> _Body:
    first, second = (_flag_number(text) for text in operands[:2])
    if name == "PLOP3":
        inputs = [_flag(text) for text in operands[2:5]]
        tables = [int(text, 16) for text in operands[5:7]]

        def logic(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
            values = [read(warp) for read in inputs]
            for number, table in zip((first, second), tables, strict=False):
                warp.write_flag(number, _known_lookup(table, values, _NONE, _ALL), lanes)

        return logic
    how = modifiers[0]
    a, b = (_source(text) for text in operands[2:4])
    others = [_flag(text) for text in operands[4:]]
    kind = np.uint32 if "U32" in modifiers else np.int32
    combine = next((m for m in modifiers[1:] if m in ("AND", "OR", "XOR")), "AND")

    def compare(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
        left, right, flags = a(warp), b(warp), [read(warp) for read in others]
        below = flags[1] if "EX" in modifiers and len(flags) > 1 else _NONE
        if left is None or right is None or below is None:
            results: tuple[Flag, Flag] = (None, None)
            # Whatever was compared, nothing comes of it.
            if flags[0] is not None and combine == "AND" and not flags[0].any():
                results = (_NONE, _NONE)
        elif flags[0] is None:
            results = (None, None)
        else:
            lower = below if "EX" in modifiers else None
            found = _compare(left.view(kind), right.view(kind), how, lower)
            join = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[combine]
            results = (join(found, flags[0]), join(~found, flags[0]))
        warp.write_flag(first, results[0], lanes)
        warp.write_flag(second, results[1], lanes)

    return compare


def _byte_shift(modifiers: Sequence[str]) -> int:
    return 8 * next((int(m[1]) for m in modifiers if re.fullmatch(r"B\d", m)), 0)


def _flags_to_register(modifiers: Sequence[str], operands: Sequence[str]) -> _Body:
    number, source, mask = _register(operands[0]), _source(operands[2]), int(operands[3], 16)
    shift = _byte_shift(modifiers)

    def body(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
        value = source(warp)
        for bit in range(7):
            flag = warp.flag(bit)
            if not mask >> bit & 1 or value is None:
                continue
            place = np.uint32(1 << (bit + shift))
            value = None if flag is None else np.where(flag, value | place, value & ~place)
        warp.write(number, value, lanes)

    return body


def _register_to_flags(modifiers: Sequence[str], operands: Sequence[str]) -> _Body:
    source, mask, shift = _source(operands[1]), int(operands[2], 16), _byte_shift(modifiers)

    def body(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
        value = source(warp)
        for bit in range(7):
            if mask >> bit & 1:
                found = None if value is None else (value >> np.uint32(bit + shift) & np.uint32(1)).astype(bool)
                warp.write_flag(bit, found, lanes)

    return body


def _load_constant(instruction: Instruction, operands: Sequence[str]) -> _Body:
    number, count = _register(operands[0]), _registers_written(instruction)
    registers = [None if number is None else number + i for i in range(count)]
    match = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operands[1])
    if match is None or {"U8", "U16", "S8", "S16"} & set(instruction.opcode.split(".")):
        return _forget(registers, [])
    offset = int(match[1], 16)

    def body(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
        for i, register in enumerate(registers):
            warp.write(register, warp.bank.get(offset + 4 * i), lanes)

    return body


def _memory_access(instruction: Instruction, operands: Sequence[str]) -> _Body:
    name, bits, pipe = instruction.name, instruction.bits, instruction.pipe
    places = [_address(bracket) for text in operands for bracket in _BRACKET.findall(_without_descriptor(text))]
    written = [text for text in operands[:1] if re.fullmatch(r"U?R(Z|\d+)", text)]
    number = _register(written[0]) if written else None
    registers = [None if number is None else number + i for i in range(_registers_written(instruction))]
    if name in ("LDSM", "STSM"):
        # Each lane in a group of eight gives the address of a row of 16 bytes.
        groups = int(match[1]) if (match := re.search(r"\.M\w+\.(\d)$", instruction.opcode)) else 1
        rows = np.arange(LANES) // 8 < groups

        def matrices(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
            warp.shared_access(places[0](warp), active & rows, 128)
            for register in registers if name == "LDSM" else ():
                warp.write(register, None, lanes)

        return matrices
    if pipe == "local":
        data = re.fullmatch(r"U?R(Z|\d+)", operands[-1])
        first = _register(operands[-1]) if data and name == "STL" else None

        def stack(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
            address = places[0](warp)
            certain = address is not None and bool((address == address[0]).all()) and lanes is not None
            certain = certain and bool(lanes.all())  # type: ignore[union-attr]
            for i in range(max(1, bits // 32)):
                place = int(address[0]) + 4 * i if certain else -1  # type: ignore[index]
                if name == "LDL":
                    warp.write(registers[i], warp.local.get(place) if certain else None, lanes)
                elif certain:
                    warp.local[place] = _ZERO if first is None else warp.value(first + i)
                else:
                    warp.local.clear()

        return stack
    if name == "LDGSTS":

        def copy(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
            warp.shared_access(places[0](warp), active, bits)
            warp.global_access(places[1](warp), active, bits, False)

        return copy
    loads = name.startswith("LD") or name.startswith("ATOM")
    stores = name.startswith(("ST", "RED", "ATOM"))
    if not places or not (loads or stores):
        raise ValueError(
            f"cannot follow {instruction.opcode} at {instruction.address:#x}: an access of an unknown kind"
        )

    def access(warp: _Warp, lanes: NDArray[np.bool_] | None, active: NDArray[np.bool_]) -> None:
        address = places[0](warp)
        if pipe == "shared":
            warp.shared_access(address, active, bits)
        else:
            for store in (False, True):
                if stores if store else loads:
                    warp.global_access(address, active, bits, store)
        for register in registers if loads else ():
            warp.write(register, None, lanes)

    return access


def _without_descriptor(text: str) -> str:
    return re.sub(r"desc\[[^\]]*\]", "", text)
