"""`python -m benchmarks flattened`: the Keras function as PyTorch spells it, against `FlattenedInteractingLayer`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as nnf
from rich import box
from rich.table import Table
from torch import Tensor, nn

from autoint_fast import FlattenedInteractingLayer
from autoint_fast.dispatch import BACKENDS

from . import command
from .cases import FORWARD, MODES, SHAPES, threads_for
from .command import at_least
from .report import number, ratio
from .timing import clock_for, on_threads, quantiles, race

UNFUSED, DEFAULT_BATCH = "unfused", 512


class UnfusedFlattenedLayer(nn.Module):
    """The Keras function `interacting_layer(x, head_num)`, call by call, around the projections of `layer`."""

    def __init__(self, layer: FlattenedInteractingLayer) -> None:
        super().__init__()
        self.n_head = layer.n_head
        self.w_qs, self.w_ks, self.w_vs = layer.w_qs, layer.w_ks, layer.w_vs
        self.fc_out, self.fc_res = layer.fc_out, layer.fc_res

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for q, k, v in zip(*(w(x).chunk(self.n_head, dim=2) for w in (self.w_qs, self.w_ks, self.w_vs)), strict=True):
            p = torch.softmax(q @ k.mT / math.sqrt(x.shape[2]), dim=-1)
            heads.append((p @ v).flatten(1))
        return nnf.relu(self.fc_out(torch.cat(heads, dim=1)) + self.fc_res(x.flatten(1)))


def steps(
    batch: int,
    fields: int,
    emb_size: int,
    n_head: int,
    mode: str = FORWARD,
    *,
    backend: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], object]]:
    """By name, one call as it is timed: without gradients, or with those of the input and of all parameters.

    The unfused layer, ours on `backend`, and without gradients ours frozen, all with the same weights and input.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = FlattenedInteractingLayer(fields, emb_size, n_head, backend=backend).to(device, dtype)
        x = torch.randn(batch, fields, emb_size).to(device, dtype)
    contestants = {UNFUSED: UnfusedFlattenedLayer(layer), "ours": layer}
    if mode == FORWARD:
        frozen = FlattenedInteractingLayer(fields, emb_size, n_head, backend=backend).to(device, dtype).eval()
        frozen.load_state_dict(layer.state_dict())
        contestants["ours, frozen"] = frozen.freeze()
    else:
        x.requires_grad_()
    leaves, grad = [x, *layer.parameters()], torch.randn_like(x).flatten(1).detach()

    def step(module: nn.Module) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return module(x)

        def training() -> object:
            return torch.autograd.grad(module(x), leaves, grad)

        return forward if mode == FORWARD else training

    return {name: step(module) for name, module in contestants.items()}


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Measures the cases that the arguments ask for; gives the exit status."""
    parser.add_argument("--shape", type=command.shape, default=SHAPES["criteo"], help="as in 39x16x2 (default: criteo)")
    parser.add_argument("--batch", nargs="+", type=at_least(1, int), default=[DEFAULT_BATCH], metavar="B")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of our layer (default: auto)")
    parser.add_argument("--device", default="cpu", type=command.device, help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=at_least(1, int), metavar="N", help="CPU threads")
    parser.add_argument("--seconds", type=at_least(0.0, float), default=5.0, metavar="S", help="of timing per case")
    options = parser.parse_args(arguments)
    console, _ = command.consoles()
    table = Table(title="medians of interleaved rounds", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("case", "mode", "layer", "ms", "x"):
        table.add_column(name, justify="right" if name in ("ms", "x") else "left", no_wrap=True)
    for mode in MODES:
        for batch in options.batch:
            shape = options.shape
            with on_threads(threads_for(batch, options.threads)):
                taking_part = steps(batch, *shape[1:], mode, backend=options.backend, device=options.device)
                samples = race(taking_part, clock_for(options.device), seconds=options.seconds)
            medians = {name: quantiles(seconds).p50 for name, seconds in samples.items()}
            for name, median in medians.items():
                faster = None if name == UNFUSED else medians[UNFUSED] / median
                case = f"{batch:,} x {shape.fields}x{shape.emb_size}x{shape.n_head}"
                table.add_row(case, mode, name, number(median * 1e3), ratio(faster))
            table.add_section()
    console.print(table)
    return 0
