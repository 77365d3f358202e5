"""`python -m benchmarks families`: the layers of other libraries against themselves, accelerated."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.func import functional_call

from autoint_fast import ReferenceInteractingLayer, accelerate
from autoint_fast.dispatch import BACKENDS
from autoint_fast.libraries import CALLERS, Accelerated

from . import command, contestants, installed, report
from .cases import DTYPES, MODES, SHAPES, Case, threads_for
from .command import at_least
from .compare import Plan
from .contestants import Contestant
from .model_zoo import MultiHeadSelfAttention
from .report import FAILED, Row, number, ratio
from .timing import LEAST_ROUNDS

CSV_NAME = "families.csv"
DEFAULT_BATCHES = MappingProxyType({"criteo": 4096, "criteo-e64": 1024})
OTHER_BATCH = 1024

ACCELERATED = " accelerated"

# A library's layer for an embedding size and a number of heads. Raises Unable.
Make = Callable[[int, int], nn.Module]


# --- the layers ---------------------------------------------------------------------------------------------


def deepctr(emb_size: int, n_head: int, **options: Any) -> nn.Module:
    layer: nn.Module = installed.load("deepctr_torch.layers.interaction").InteractingLayer(emb_size, n_head, **options)
    return layer


def rechub(emb_size: int, n_head: int, **options: Any) -> nn.Module:
    layer: nn.Module = installed.load("torch_rechub.basic.layers").InteractingLayer(emb_size, n_head, **options)
    return layer


def fuxictr(emb_size: int, n_head: int, **options: Any) -> nn.Module:
    return MultiHeadSelfAttention(emb_size, num_heads=n_head, **options)


class InModel(nn.Module):
    """One `nn.MultiheadAttention` in a library's model, called as the model does.

    caller: the qualified name of the model's class, whose other parts are not built.
    """

    def __init__(self, emb_size: int, n_head: int, caller: str, **options: Any) -> None:
        super().__init__()
        module, _, name = caller.rpartition(".")
        cls = getattr(installed.load(module), name)
        self.model = cls.__new__(cls)
        nn.Module.__init__(self.model)
        self.batch_first = caller.startswith("pytorch_widedeep")
        attention = nn.MultiheadAttention(emb_size, n_head, batch_first=self.batch_first, **options)
        setattr(self.model, CALLERS[caller].stack, nn.ModuleList([attention]))

    @property
    def attention(self) -> nn.Module:
        (stack,) = self.model.children()
        (attention,) = stack
        return attention  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        out, _ = self.attention(x, x, x)
        return out if self.batch_first else out.transpose(0, 1)  # type: ignore[no-any-return]


LAYERS: MappingProxyType[str, tuple[str, Make]] = MappingProxyType(
    {
        "deepctr": ("DeepCTR-Torch's InteractingLayer", deepctr),
        "rechub": ("torch-rechub's InteractingLayer", rechub),
        "fuxictr": ("FuxiCTR's MultiHeadSelfAttention, restated", fuxictr),
        "fuxictr-norm": ("the same with a LayerNorm", functools.partial(fuxictr, layer_norm=True)),
        **{
            name: (f"nn.MultiheadAttention in {about}'s AutoInt", functools.partial(InModel, caller=caller))
            for caller, (name, about) in {
                "torchfm.model.afi.AutomaticFeatureInteractionModel": ("torchfm", "torchfm"),
                "recbole.model.context_aware_recommender.autoint.AutoInt": ("recbole", "RecBole"),
                "pytorch_tabular.models.autoint.autoint.AutoIntBackbone": ("tabular", "pytorch_tabular"),
                "pytorch_widedeep.models.rec.autoint.AutoInt": ("widedeep", "pytorch-widedeep"),
            }.items()
        },
    }
)


# --- the contestants ----------------------------------------------------------------------------------------


def field(backend: str) -> dict[str, Contestant]:
    """Every layer as it is and accelerated, by name."""
    pairs: list[Contestant] = []
    for name, (about, make) in LAYERS.items():
        plain = functools.partial(_plain, make=make)
        ours = functools.partial(_accelerated, make=make, backend=backend)
        definition = functools.partial(_as_its_own_definition, make=make)
        pairs.append(Contestant(name, about, plain, None, contestants.whole))
        name, about = name + ACCELERATED, about + ", accelerated"
        pairs.append(Contestant(name, about, ours, definition, contestants.fused, ready=_ready, ours=True))
    return {contestant.name: contestant for contestant in pairs}


def _plain(reference: ReferenceInteractingLayer, make: Make) -> nn.Module:
    layer = contestants.foreign(reference, make)
    layer.note = ""  # type: ignore[assignment]
    return layer


def _accelerated(reference: ReferenceInteractingLayer, make: Make, backend: str) -> nn.Module:
    layer = _plain(reference, make)
    found = accelerate(layer, backend=backend)
    if not found.replaced:
        raise installed.Unable(f"not accelerated: {found.left[0].reason if found.left else 'not recognised'}")
    return layer


def _ready(layer: nn.Module, case: Case) -> str:
    (ours,) = (module for module in layer.modules() if isinstance(module, Accelerated))
    layout = ours.layout(case.shape.fields)
    form = f"{'factored' if layout.factored else 'folded'}, rank {layout.rank}"
    return ", ".join(filter(None, (contestants.ready(ours, case), form)))


def _as_its_own_definition(x: Tensor, parameters: Sequence[Tensor], n_head: int, make: Make) -> Tensor:
    layer = make(x.shape[-1], n_head)
    names = [name for name, _ in layer.named_parameters()]
    return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))  # type: ignore[no-any-return]


# --- the command --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Measures the cases that the arguments ask for; gives the exit status."""
    _add_arguments(parser)
    options = parser.parse_args(arguments)
    console, errors = command.consoles()
    path = options.out / CSV_NAME
    if options.device != "cpu":
        # Events and the cache flush belong to the current device.
        torch.cuda.set_device(options.device)
    every = field(options.backend)
    chosen = [c for c in every.values() if c.name.removesuffix(ACCELERATED) in (options.layers or LAYERS)]

    def entry(case: Case) -> tuple[list[Contestant], Plan]:
        return chosen, Plan(options.rounds, options.seconds, memory=False)

    try:
        command.make_way(path)
        rows, interrupted = command.measure(_cases(options), entry, path, errors)
    except (OSError, report.ResultsError) as error:
        parser.error(str(error))
    if not rows:
        parser.error("nothing was measured")
    console.print(_table(rows))
    return command.finish(rows, [path], interrupted, console, every)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(f"{name} at {batch:,}" for name, batch in DEFAULT_BATCHES.items())
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=command.shape,
        metavar="SHAPE",
        help=f"fields x embedding size x heads, as in 39x16x2, or a name (default: {known})",
    )
    parser.add_argument("--batch", nargs="+", type=at_least(1, int), metavar="B", help="batch sizes")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="default: both")
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), metavar="NAME", help="default: all of the list")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the accelerated layers (default: auto)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="default: fp32")
    parser.add_argument("--device", default="cpu", type=command.device, help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--threads",
        type=at_least(1, int),
        metavar="N",
        help="CPU threads (default: as many as torch takes, but one for batches of up to 512)",
    )
    parser.add_argument("--rounds", type=at_least(1, int), metavar="N", help="rounds per case")
    parser.add_argument(
        "--seconds",
        type=at_least(0.0, float),
        default=10.0,
        metavar="S",
        help=f"without --rounds: seconds of timing per case, and {LEAST_ROUNDS} rounds at least (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: ./results")
    names = [f"  {name:<14}{about}" for name, (about, _) in LAYERS.items()]
    parser.epilog = "\n".join(["layers:", *names])


def _cases(options: argparse.Namespace) -> list[Case]:
    shapes = dict.fromkeys(options.shapes or [SHAPES[name] for name in DEFAULT_BATCHES])
    return [
        Case(shape, batch, mode, threads_for(batch, options.threads), options.dtype, options.device)
        for mode in (MODES if options.mode == "both" else (options.mode,))
        for shape in shapes
        for batch in dict.fromkeys(options.batch or [DEFAULT_BATCHES.get(shape.name, OTHER_BATCH)])
    ]


def _table(rows: Sequence[Row]) -> Table:
    """A line per case and layer that was there: its time as it is and accelerated."""
    result = Table(title="medians of interleaved rounds", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("case", "mode", "layer"):
        result.add_column(name, no_wrap=True)
    for name in ("as it is, ms", "accelerated, ms", "x"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("notes", overflow="fold")
    present = report.present(rows)
    for _, group in groupby(
        rows, key=lambda row: (row.shape, row.fields, row.emb_size, row.n_head, row.batch, row.mode)
    ):
        case = {row.contestant: row for row in group if row.contestant in present}
        for name in LAYERS:
            plain, ours = case.get(name), case.get(name + ACCELERATED)
            if plain is None or ours is None:
                continue
            faster = plain.p50_ms / ours.p50_ms if plain.p50_ms and ours.p50_ms else None
            wrong = ours.parity == FAILED
            notes = [plain.notes, f"WRONG: {ours.notes}" if wrong else ours.notes]
            result.add_row(
                f"{plain.batch:,} x {plain.fields}x{plain.emb_size}x{plain.n_head}",
                plain.mode,
                name,
                number(plain.p50_ms),
                number(ours.p50_ms),
                ratio(faster),
                Text("; ".join(filter(None, (*notes, ours.warning))), style="red" if wrong else ""),
            )
        result.add_section()
    return result
