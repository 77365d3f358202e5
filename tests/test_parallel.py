"""Several threads on one layer, several processes on one model."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn

from autoint_fast import InteractingLayer
from tests.cases import BACKENDS, draw_mask
from tests.numerics import expected_output

ROOT = Path(__file__).parents[1]
THREADS = 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_train_on_one_layer(backend: str) -> None:
    """Forward and backward at once from several threads, each as if it were alone."""
    layer = InteractingLayer(2, 8, backend=backend, dtype=torch.float64)
    leaves = list(layer.parameters())
    barrier = Barrier(THREADS)
    inputs = [torch.randn(3 + i % 2, 5, 8, dtype=torch.float64) for i in range(THREADS)]
    masks = [draw_mask("(B,1,F)", 4, 5) if i % 2 else None for i in range(THREADS)]

    def gradients(i: int) -> list[Tensor]:
        x = inputs[i].clone().requires_grad_()
        return list(torch.autograd.grad(layer(x, masks[i]).square().sum(), [x, *leaves]))

    def work(i: int) -> list[list[Tensor]]:
        barrier.wait()
        return [gradients(i) for _ in range(20)]

    alone = [gradients(i) for i in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(work, range(THREADS)))
    for expected, runs in zip(alone, results, strict=True):
        for run in runs:
            for one, two in zip(run, expected, strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_threads_under_autocast_and_without() -> None:
    """Autocast is a thread's own affair."""
    layer = InteractingLayer(2, 8)
    x = torch.randn(3, 5, 8)
    barrier = Barrier(THREADS)

    def work(i: int) -> bool:
        barrier.wait()
        for _ in range(20):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 0):
                if layer(x).dtype != (torch.bfloat16 if i % 2 == 0 else torch.float32):
                    return False
        return True

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))


def test_threads_serve_while_one_freezes_and_unfreezes() -> None:
    layer = InteractingLayer(2, 8, dtype=torch.float64).eval()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    expected = expected_output(layer, x)

    def work(i: int) -> float:
        worst = 0.0
        for _ in range(100):
            if i == 0:
                layer.freeze()
                layer.unfreeze()
            with torch.no_grad():
                worst = max(worst, (layer(x) - expected).abs().max().item())
        return worst

    with ThreadPoolExecutor(THREADS) as pool:
        assert max(pool.map(work, range(THREADS))) <= 1e-12


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes with half of the batch each end where one with all of it ends, w_ks.bias included."""
    world = 2
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    results = [tmp_path / f"{rank}.pt" for rank in range(world)]
    command = [sys.executable, str(ROOT / "tests" / "ddp_worker.py")]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store"), str(results[rank])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output

    torch.manual_seed(0)
    model = nn.Sequential(*(InteractingLayer(h, 8, backend="torch", dtype=torch.float64) for h in (2, 1)))
    x = torch.randn(world * 4, 5, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    for result in results:
        saved = torch.load(result)
        for name, p in model.named_parameters():
            value, grad = saved[name]
            torch.testing.assert_close(value, p.detach(), rtol=0, atol=1e-12, msg=name)
            torch.testing.assert_close(grad, p.grad, rtol=0, atol=1e-12, msg=name)
        assert torch.equal(saved["0.w_ks.bias"][1], torch.zeros(16, dtype=torch.float64))
