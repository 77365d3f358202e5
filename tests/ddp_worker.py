"""One of the processes of test_parallel.py: two steps under DistributedDataParallel, and what came out."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from autoint_fast import InteractingLayer


def main(rank: int, world: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(
        InteractingLayer(2, 8, backend="torch", dtype=torch.float64),
        InteractingLayer(1, 8, backend="torch", dtype=torch.float64),
    )
    x = torch.randn(world * 4, 5, 8, dtype=torch.float64)[rank * 4 : (rank + 1) * 4]
    # Without find_unused_parameters, a parameter that gets no gradient, such as a key bias, would raise.
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(x).square().mean().backward()
        optimizer.step()
    torch.save({name: (p.detach(), p.grad) for name, p in model.named_parameters()}, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
