"""What the backward costs on the path that ordinary inputs take, and that no cut of it that is chosen spills."""

from __future__ import annotations

import functools

import pytest

from autoint_fast.weights import BARE, CONCATENATED, IDENTITY, MERGED, NO_RESIDUAL, PROJECTION, Layout
from benchmarks.offline import Binary, Loop, _blocks, compile_launch
from tests.compiled.test_launches import CRITEO, Shape, backward
from tests.layouts import describe

CONCATENATED_HEADS = Layout(2, 16, 16, 32, 0, CONCATENATED, PROJECTION)
BARE_HEADS = Layout(2, 16, 16, 32, 0, BARE, NO_RESIDUAL)
BARE_IDENTITY = Layout(1, 16, 16, 16, 0, BARE, IDENTITY)
MERGED_IDENTITY = Layout(2, 16, 16, 16, 0, MERGED, IDENTITY, 0)


def ordinary_path(binary: Binary, trips: int) -> int:
    """Warp-instructions of the shortest way through the main loop; loops inside it take `trips`.

    Branches only ever skip work that rare inputs need: so the shortest way is the ordinary one.
    """
    blocks = _blocks(binary.sass, binary.name)
    main = max((loop for loop in binary.loops if loop.depth == 1), key=lambda loop: len(loop.instructions))

    def cost(loop: Loop) -> int:
        within = {instruction.address for instruction in loop.instructions}
        inner = {candidate.header: candidate for candidate in binary.loops if candidate.parent is loop}

        @functools.cache
        def onward(address: int) -> float:
            following, own = blocks[address].successors, len(blocks[address].instructions)
            if address in inner:
                inside = {instruction.address for instruction in inner[address].instructions}
                ways = (after for block in inside & blocks.keys() for after in blocks[block].successors)
                following, own = [after for after in ways if after not in inside], trips * cost(inner[address])
            rest = (0 if after == loop.header else onward(after) for after in following if after in within)
            return own + min(rest, default=float("inf"))

        return int(onward(loop.header))

    return binary.num_warps * cost(main)


@pytest.mark.parametrize(
    ("shape", "precision", "mask", "most"),
    [
        (CRITEO, "bf16", "none", 2550),
        (CRITEO, "fp16", "none", 2550),
        (CRITEO, "bf16", "keys", 3250),
        ((24, 16, 2), "bf16", "none", 1650),
    ],
    ids=str,
)
def test_warp_instructions_per_sample(shape: Shape, precision: str, mask: str, most: int) -> None:
    binary = compile_launch(backward(shape, precision, "sm_90", mask), "sm_90")
    assert binary.stack == 0
    assert 500 < ordinary_path(binary, trips=2) <= most


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((39, CONCATENATED_HEADS), "none"),
        ((39, BARE_HEADS), "none"),
        ((39, BARE_IDENTITY), "keys"),
        ((33, MERGED_IDENTITY), "none"),
        ((32, 10, 2), "none"),
        ((32, 16, 4), "pairs"),
        ((16, 10, 3), "pairs"),
    ],
    ids=lambda value: f"{value[0]}-{describe(value[1])}" if len(value) == 2 else str(value),
)
def test_resident_layouts_do_not_spill(shape: Shape, mask: str) -> None:
    launch = backward(shape, "bf16", "sm_90", mask)
    assert launch.kernel.fn.__name__ == "backward_resident"
    assert compile_launch(launch, "sm_90").stack == 0
