"""`python -m benchmarks flattened`: the Keras function as PyTorch spells it, against `FlattenedInteractingLayer`."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence

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
from .parity import compare
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


def modules(
    fields: int,
    emb_size: int,
    n_head: int,
    mode: str = FORWARD,
    *,
    backend: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, nn.Module]:
    """By name, the unfused layer, ours on `backend`, and without gradients ours frozen, all with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = FlattenedInteractingLayer(fields, emb_size, n_head, backend=backend).to(device, dtype)
    contestants = {UNFUSED: UnfusedFlattenedLayer(layer), "ours": layer}
    if mode == FORWARD:
        frozen = FlattenedInteractingLayer(fields, emb_size, n_head, backend=backend).to(device, dtype).eval()
        frozen.load_state_dict(layer.state_dict())
        contestants["ours, frozen"] = frozen.freeze()
    return contestants


def step(module: nn.Module, x: Tensor, mode: str) -> Callable[[], object]:
    """One call as it is timed: without gradients, or with those of the input and of all parameters."""
    leaves, grad = [x.requires_grad_(mode != FORWARD), *module.parameters()], torch.randn_like(x).flatten(1)

    def forward() -> object:
        with torch.no_grad():
            return module(x)

    def training() -> object:
        return torch.autograd.grad(module(x), leaves, grad)

    return forward if mode == FORWARD else training


def violations(contestants: Mapping[str, nn.Module], x: Tensor, mode: str) -> dict[str, str]:
    """By name, what breaks the rule of parity.py, in words; truth is the unfused layer in float64."""
    plain = contestants[UNFUSED]
    everyone = {"": copy.deepcopy(plain).double(), **contestants}
    with torch.set_grad_enabled(mode != FORWARD):
        leaves = {name: x.detach().to(next(m.parameters()).dtype).requires_grad_() for name, m in everyone.items()}
        outs = {name: module(leaves[name]) for name, module in everyone.items()}
    results = {name: {"out": out} for name, out in outs.items()}
    if mode != FORWARD:
        # A relu that changes sides near zero changes a gradient by whole units in correct code.
        certain = torch.stack([(out > 0).eq(outs[""] > 0) for out in outs.values()]).all(0)
        grad = torch.randn_like(outs[UNFUSED]).masked_fill(~certain, 0.0)
        for name, module in everyone.items():
            names, parameters = zip(*module.named_parameters(), strict=True)
            grads = torch.autograd.grad(outs[name], [leaves[name], *parameters], grad.to(outs[name].dtype))
            results[name] |= dict(zip(("gradient of x", *names), grads, strict=True))
            # Of the keys' bias it is rounding noise around zero, which has no scale to be judged on.
            results[name].pop("w_ks.bias", None)
    broken = {name: compare(results[name], [results[UNFUSED]], results[""]) for name in contestants}
    return {name: reason for name, reason in broken.items() if reason}


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Measures the cases that the arguments ask for; gives the exit status."""
    parser.add_argument("--shape", type=command.shape, default=SHAPES["criteo"], help="as in 39x16x2 (default: criteo)")
    parser.add_argument("--batch", nargs="+", type=at_least(1, int), default=[DEFAULT_BATCH], metavar="B")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of our layer (default: auto)")
    parser.add_argument("--device", default="cpu", type=command.device, help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=at_least(1, int), metavar="N", help="CPU threads")
    parser.add_argument("--seconds", type=at_least(0.0, float), default=5.0, metavar="S", help="of timing per case")
    options = parser.parse_args(arguments)
    console, errors = command.consoles()
    wrong = False
    table = Table(title="medians of interleaved rounds", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("case", "mode", "layer", "ms", "x"):
        table.add_column(name, justify="right" if name in ("ms", "x") else "left", no_wrap=True)
    for mode in MODES:
        for batch in options.batch:
            shape = options.shape
            with on_threads(threads_for(batch, options.threads)):
                contestants = modules(*shape[1:], mode, backend=options.backend, device=options.device)
                x = torch.randn(batch, shape.fields, shape.emb_size, device=options.device)
                for name, reason in violations(contestants, x, mode).items():
                    wrong = True
                    errors.print(f"{name}, {mode}, B = {batch:,}: WRONG: {reason}", style="red")
                taking_part = {name: step(module, x, mode) for name, module in contestants.items()}
                samples = race(taking_part, clock_for(options.device), seconds=options.seconds)
            medians = {name: quantiles(seconds).p50 for name, seconds in samples.items()}
            for name, median in medians.items():
                faster = None if name == UNFUSED else medians[UNFUSED] / median
                case = f"{batch:,} x {shape.fields}x{shape.emb_size}x{shape.n_head}"
                table.add_row(case, mode, name, number(median * 1e3), ratio(faster))
            table.add_section()
    console.print(table)
    return int(wrong)
