"""The fused Triton kernels as an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..dispatch import Call


def unsupported(call: Call) -> list[str]:
    return ["not built yet"]
