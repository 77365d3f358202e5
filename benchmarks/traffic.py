"""What PyTorch really calls: launches, bytes and operations of a layer, counted op by op.

    with Traffic() as traffic:
        step()
    traffic.launches, traffic.read, traffic.written, traffic.operations

A mode sees every op that reaches a backend. One that only gives another view of memory, or memory without content,
costs nothing. Every other is counted as one launch that reads each element of its inputs once and writes each of its
outputs once: what eager PyTorch has to move through memory, as long as tensors exceed the second-level cache. An input
that is expanded counts with the elements it has in memory. A library may split one product into more launches, never
fewer.

The fused attention is what a CPU calls in place of a GPU's and is counted as FlashAttention-2 documents itself (Dao,
2023; arXiv:2307.08691): forward one launch that reads q, k and v and writes the output and its log-sum-exp; backward
three (delta, the gradients, dq converted), which together read q, k, v, the output, its gradient and the log-sum-exp
once and write dq, dk and dv once. Scores and probabilities stay on chip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .cases import Case
from .contestants import Contestant, set_up

# Outputs without content.
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# What they are given to write into they do not read.
_OVERWRITE = ("copy_", "zero_", "fill_")
# Of a tensor they take the shape.
_FILLED = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
_FUSED = "_scaled_dot_product_flash_attention_for_cpu"
_FUSED_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
_LAUNCHES = {_FUSED: 1, _FUSED_BACKWARD: 3}

# Two batches, so that what hangs on the batch can be told from what does not.
BATCHES = 16, 32


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements in memory: a dimension that is only expanded has one."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Inside, counts every op; `calls`: how often each, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.read = self.written = self.operations = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        name = str(packet.__name__)
        inputs, outputs = list(_distinct((args, kwargs))), list(_distinct(out))
        memory = {tensor.untyped_storage()._cdata for tensor in inputs}
        if not func._schema.is_mutable:
            outputs = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in memory]
        if name in _EMPTY or not outputs:
            return
        self.calls[name] += 1
        self.launches += _LAUNCHES.get(name, 1)
        if name in _OVERWRITE:
            inputs = list(_distinct(args[1:]))
        elif name in _FILLED:
            inputs = []
        self.read += sum(map(stored_bytes, inputs))
        self.written += sum(map(stored_bytes, outputs))
        if name in _LAUNCHES:
            self.operations += _attention_operations(name, args)
        elif packet in flop_registry:
            self.operations += flop_registry[packet](*args, **kwargs, out_val=out)


def _attention_operations(name: str, args: Any) -> int:
    if name == _FUSED:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))


def _distinct(values: Any) -> Iterator[Tensor]:
    seen = set()
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield value


class Counted(NamedTuple):
    """A call: launches, and per sample bytes and operations of matrix products; bytes_fixed: whatever the batch."""

    launches: int
    bytes: float
    operations: float
    bytes_fixed: float


def count(contestant: Contestant, case: Case) -> Counted:
    """What a contestant's call makes PyTorch do, forward or with the backward as the case says.

    Raises `installed.Unable` where it cannot take part.
    """
    small, large = (_of_step(set_up(contestant, case._replace(batch=batch, device="cpu")).step) for batch in BATCHES)
    more = BATCHES[1] - BATCHES[0]
    per_sample = (large.read + large.written - small.read - small.written) / more
    operations = (large.operations - small.operations) / more
    return Counted(large.launches, per_sample, operations, large.read + large.written - BATCHES[1] * per_sample)


def _of_step(step: Callable[[], object]) -> Traffic:
    with torch.random.fork_rng(devices=[]), Traffic() as traffic:
        step()
    return traffic
