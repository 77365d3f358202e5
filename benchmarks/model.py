"""`python -m benchmarks model`: whole AutoInt models, from ids and numbers to the click."""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from autoint_fast import AutoInt, InteractingLayer, ReferenceInteractingLayer
from autoint_fast.dispatch import BACKENDS

from . import command, installed, machine, memory, timing
from .cases import FORWARD, threads_for
from .command import at_least
from .installed import Unable
from .report import number, ratio

CSV_NAME, PICTURE_NAME = "model.csv", "model.png"
TRAINING, SERVING = "training step", "serving"
EINSUM, OURS = "einsum", "ours"
# What a number is cut into for DeepCTR-Torch, where only ids interact.
BUCKETS = 10
# Of a serving turn: calls of one contestant in a row, so that its own caches are warm, as in a server.
CALLS_PER_TURN = 20
LEAST_TURNS = 10


class Sizes(NamedTuple):
    """Of a model and of its input."""

    categorical: int = 26
    ids: int = 10_000
    numeric: int = 13
    emb_size: int = 16
    n_layers: int = 3
    n_head: int = 2

    def __str__(self) -> str:
        fields = f"{self.categorical} x {self.ids:,} ids + {self.numeric} numbers"
        return f"{fields}, E={self.emb_size}, {self.n_layers} layers, {self.n_head} heads"


class Contestant(NamedTuple):
    """A model. prepare gives a module and what it is called with, of (Sizes, ids, numbers, backend). Raises Unable."""

    about: str
    prepare: Callable[[Sizes, Tensor, Tensor, str], tuple[nn.Module, tuple[Any, ...]]]
    logits: bool  # or probabilities


class Result(NamedTuple):
    """One contestant in one mode at one batch size. Times of a call, in seconds; rows per second at the median."""

    contestant: str
    mode: str
    batch: int
    threads: int
    p50: float
    p99: float
    rows_per_second: float
    x_einsum: float
    peak_mib: float | None
    notes: str


# --- the contestants --------------------------------------------------------------------------------------------------


def _ours(sizes: Sizes, ids: Tensor, numbers: Tensor, backend: str) -> tuple[AutoInt, tuple[Tensor, ...]]:
    model = AutoInt(
        *([sizes.ids] * sizes.categorical, sizes.numeric, sizes.emb_size, sizes.n_layers, sizes.n_head), backend=backend
    )
    return model.to(ids.device), (ids, numbers)


def einsum_of(model: AutoInt) -> AutoInt:
    """The same model, weight by weight, with the interacting layer as it is defined."""
    other = copy.deepcopy(model)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, InteractingLayer)
        plain = ReferenceInteractingLayer(layer.n_head, layer.emb_size).to(layer.w_qs.weight)
        plain.load_state_dict(layer.state_dict())
        other.layers[i] = plain
    return other


def _einsum(sizes: Sizes, ids: Tensor, numbers: Tensor, backend: str) -> tuple[AutoInt, tuple[Tensor, ...]]:
    model, arguments = _ours(sizes, ids, numbers, backend)
    return einsum_of(model), arguments


def _deepctr(
    sizes: Sizes, ids: Tensor, numbers: Tensor, backend: str, all_interact: bool
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    inputs, models = installed.load("deepctr_torch.inputs"), installed.load("deepctr_torch.models.autoint")
    columns = [inputs.SparseFeat(f"C{i}", sizes.ids, sizes.emb_size) for i in range(sizes.categorical)]
    if all_interact:
        columns += [inputs.SparseFeat(f"I{i}", BUCKETS, sizes.emb_size) for i in range(sizes.numeric)]
        numbers = (numbers.nan_to_num().sigmoid() * BUCKETS).floor().clamp(max=BUCKETS - 1)
    else:
        columns += [inputs.DenseFeat(f"I{i}", 1) for i in range(sizes.numeric)]
        numbers = numbers.nan_to_num()
    model = models.AutoInt(
        columns,
        columns,
        att_layer_num=sizes.n_layers,
        att_head_num=sizes.n_head,
        dnn_hidden_units=(),
        l2_reg_embedding=0,
        device=str(ids.device),
    )
    return model, (torch.cat([ids.float(), numbers], dim=1),)


def _rechub(
    sizes: Sizes, ids: Tensor, numbers: Tensor, backend: str
) -> tuple[nn.Module, tuple[dict[str, Tensor], ...]]:
    features = installed.load("torch_rechub.basic.features")
    models = installed.load("torch_rechub.models.ranking.autoint")
    sparse = [features.SparseFeature(f"C{i}", sizes.ids, sizes.emb_size) for i in range(sizes.categorical)]
    dense = [features.DenseFeature(f"I{i}") for i in range(sizes.numeric)]
    model = models.AutoInt(sparse, dense, sizes.n_layers, sizes.n_head).to(ids.device)
    columns = {f"C{i}": ids[:, i].contiguous() for i in range(sizes.categorical)}
    columns |= {f"I{i}": numbers[:, i].nan_to_num().contiguous() for i in range(sizes.numeric)}
    return model, (columns,)


CONTESTANTS = MappingProxyType(
    {
        EINSUM: Contestant("our model with the interacting layer as it is defined", _einsum, True),
        "deepctr": Contestant(
            "DeepCTR-Torch's AutoInt; the numbers do not interact",
            functools.partial(_deepctr, all_interact=False),
            False,
        ),
        "deepctr-all": Contestant(
            "the same with the numbers as ids, so that all fields interact",
            functools.partial(_deepctr, all_interact=True),
            False,
        ),
        "rechub": Contestant("torch-rechub's AutoInt", _rechub, False),
        OURS: Contestant("our model", _ours, True),
    }
)


def rows_of(sizes: Sizes, batch: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, C), numbers (B, N) with some missing, clicks (B,): the same at every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, sizes.ids, (batch, sizes.categorical), generator=generator)
    numbers = torch.randn(batch, sizes.numeric, generator=generator)
    numbers[torch.rand(numbers.shape, generator=generator) < 0.2] = torch.nan
    clicks = (torch.rand(batch, generator=generator) < 0.25).float()
    return ids.to(device), numbers.to(device), clicks.to(device)


def step_of(
    name: str, mode: str, sizes: Sizes, batch: int, backend: str = "auto", device: str = "cpu"
) -> Callable[[], object]:
    """A call as it is timed: a forward without gradients, or a whole step of training with Adam. Raises Unable.

    Serving is a forward in eval mode, ours frozen, that waits for the device.
    """
    ids, numbers, clicks = rows_of(sizes, batch, device)
    contestant = CONTESTANTS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, arguments = contestant.prepare(sizes, ids, numbers, backend)
    if mode != TRAINING:
        model.eval()
        if name == OURS and mode == SERVING:
            model.freeze()  # type: ignore[operator]

        def forward() -> object:
            with torch.no_grad():
                out = model(*arguments)
            if mode == SERVING and device != "cpu":
                torch.cuda.synchronize()
            return out

        return forward
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    loss = nnf.binary_cross_entropy_with_logits if contestant.logits else nnf.binary_cross_entropy

    def train() -> None:
        optimizer.zero_grad()
        loss(model(*arguments).view(-1), clicks).backward()
        optimizer.step()

    return train


# --- measuring --------------------------------------------------------------------------------------------------------


def violation(sizes: Sizes, batch: int, backend: str, device: str) -> str:
    """How far our logits are off, if they err more than twice as much as the einsum model's, plus a rounding unit."""
    ids, numbers, _ = rows_of(sizes, batch, device)
    torch.manual_seed(0)
    ours, _ = _ours(sizes, ids, numbers, backend)
    # As large as trained embeddings, so that logits differ and attention is not even.
    nn.init.normal_(ours.embedding.weight, std=0.3)
    plain = einsum_of(ours)
    with torch.no_grad():
        truth = copy.deepcopy(plain).double()(ids, numbers)
        errors = [(model(ids, numbers) - truth).abs().max().item() for model in (ours, plain)]
    allowed = 2 * errors[1] + torch.finfo(torch.float32).eps * truth.abs().max().item()
    return "" if errors[0] <= allowed else f"logits are off by {errors[0]:.2e}, allowed are {allowed:.2e}"


def latencies(steps: Mapping[str, timing.Step], seconds: float) -> dict[str, list[float]]:
    """Per name the seconds of every single call, in turns of some calls, in an order drawn anew each round."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names, order = list(steps), random.Random(0)
    for step in steps.values():
        for _ in range(CALLS_PER_TURN):
            step()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begun, turns = time.perf_counter(), 0
        while turns < LEAST_TURNS or time.perf_counter() - begun < seconds:
            order.shuffle(names)
            for name in names:
                step, mine = steps[name], samples[name]
                # What the one before has left in the caches is not this one's doing.
                step()
                for _ in range(CALLS_PER_TURN):
                    start = time.perf_counter()
                    step()
                    mine.append(time.perf_counter() - start)
            turns += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def measure(
    sizes: Sizes,
    mode: str,
    batch: int,
    names: Sequence[str],
    *,
    seconds: float,
    threads: int,
    backend: str = "auto",
    device: str = "cpu",
    weigh: bool = True,
) -> tuple[list[Result], dict[str, str]]:
    """A result for each contestant that can take part, and per name of the others the reason."""
    steps, left_out = {}, {}
    with timing.on_threads(threads):
        for name in names:
            try:
                steps[name] = step_of(name, mode, sizes, batch, backend, device)
            except Unable as error:
                left_out[name] = str(error)
        if mode == SERVING:
            samples = latencies(steps, seconds)
        else:
            samples = timing.race(steps, timing.clock_for(device), seconds=seconds)
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    unsteady = machine.unsteady(timing.quantiles(taken).spread for taken in samples.values())
    results = []
    for name, taken in samples.items():
        peak, notes = None, [unsteady] if unsteady else []
        if weigh and mode != SERVING:
            try:
                peak = _peak(steps[name], name, mode, sizes, batch, backend, device, threads)
            except memory.NotMeasured as error:
                notes.append(f"memory not measured: {error}")
        p99 = statistics.quantiles([*taken, *taken] if len(taken) == 1 else taken, n=100, method="inclusive")[98]
        faster = medians[EINSUM] / medians[name] if EINSUM in medians else float("nan")
        line = (medians[name], p99, batch / medians[name], faster, peak, "; ".join(notes))
        results.append(Result(name, mode, batch, threads, *line))
    return results, left_out


def _peak(
    step: timing.Step, name: str, mode: str, sizes: Sizes, batch: int, backend: str, device: str, threads: int
) -> float:
    if device != "cpu":
        return memory.peak_extra_cuda(step, device)
    return memory.peak_extra_cpu(step_of, name, mode, sizes, batch, backend, threads=threads)


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Measures what the arguments ask for; gives the exit status."""
    _add_arguments(parser)
    options = parser.parse_args(arguments)
    console, errors = command.consoles()
    sizes = Sizes(options.categorical, options.ids, options.numeric, options.emb_size, options.layers, options.heads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    load = machine.load_average() if options.device == "cpu" else None
    if busy := machine.busy(load):
        errors.print(f"This machine is busy ({busy}): do not trust the timings.", style="yellow")
    wrong = violation(sizes, options.batch[0], options.backend, options.device)
    if wrong:
        console.print(f"WRONG: {wrong}", style="red")
        return 1
    cases = [(mode, batch) for mode in (FORWARD, TRAINING) for batch in options.batch]
    cases += [(SERVING, batch) for batch in options.serving]
    results: list[Result] = []
    left_out: dict[str, str] = {}
    for mode, batch in cases:
        errors.print(f"{mode}, B={batch:,}", style="dim")
        found, missing = measure(
            *(sizes, mode, batch, options.contestants or tuple(CONTESTANTS)),
            seconds=options.seconds,
            threads=threads_for(batch, options.threads),
            backend=options.backend,
            device=options.device,
            weigh=not options.no_memory,
        )
        results += found
        left_out |= missing
    if not results:
        parser.error("nothing was measured")
    console.print(f"{sizes}, fp32, dense gradients, Adam", highlight=False)
    _show(results, console)
    for name, why in left_out.items():
        console.print(f"not measured: {name}: {why}", highlight=False, markup=False)
    about = machine.describe(options.device)
    console.print(f"{about.processor}, torch {about.torch}, autoint_fast {about.autoint_fast} {about.commit}")
    paths = [options.out / CSV_NAME, options.out / PICTURE_NAME]
    _write(results, {**sizes._asdict(), **about._asdict(), "device": options.device, "load_average": load}, paths[0])
    _draw(results, f"{sizes}\n{about.processor}", paths[1])
    for path in paths:
        console.print(str(path), style="dim", highlight=False, soft_wrap=True)
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    count, usual = at_least(1, int), Sizes()
    parser.add_argument("--categorical", type=at_least(0, int), default=usual.categorical, metavar="C", help="fields")
    parser.add_argument("--ids", type=count, default=usual.ids, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--numeric", type=count, default=usual.numeric, metavar="N", help="fields")
    parser.add_argument("--emb-size", type=count, default=usual.emb_size, metavar="E")
    parser.add_argument("--layers", type=count, default=usual.n_layers, metavar="L")
    parser.add_argument("--heads", type=count, default=usual.n_head, metavar="H")
    parser.add_argument("--batch", nargs="+", type=count, default=[4096], metavar="B", help="of forward and training")
    parser.add_argument("--serving", nargs="*", type=count, default=[1, 32, 512], metavar="B", help="of single calls")
    parser.add_argument("--contestants", nargs="+", choices=tuple(CONTESTANTS), metavar="NAME", help="default: all")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of our model (default: auto)")
    parser.add_argument("--device", default="cpu", type=command.device, help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads (default: one for batches up to 512)")
    parser.add_argument(
        "--seconds", type=at_least(0.0, float), default=20.0, metavar="S", help="of timing per case (%(default)s)"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: ./results")
    names = [f"  {name:<14}{contestant.about}" for name, contestant in CONTESTANTS.items()]
    parser.epilog = "\n".join(["contestants:", *names])


def _show(results: Sequence[Result], console: Console) -> None:
    table = Table(title="medians of interleaved rounds", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("mode", "model"):
        table.add_column(name, no_wrap=True)
    for name in ("batch", "ms", "p99, ms", "rows/s", "x einsum", "peak, MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("notes", overflow="fold")
    before = results[0]
    for result in results:
        if (result.mode, result.batch) != (before.mode, before.batch):
            table.add_section()
        before = result
        table.add_row(
            result.mode,
            result.contestant,
            f"{result.batch:,}",
            number(result.p50 * 1e3),
            number(result.p99 * 1e3) if result.mode == SERVING else "",
            f"{result.rows_per_second:,.0f}",
            ratio(result.x_einsum),
            number(result.peak_mib),
            result.notes,
        )
    console.print(table)


def _write(results: Sequence[Result], about: Mapping[str, object], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*Result._fields, *about])
        table.writeheader()
        table.writerows({**result._asdict(), **about} for result in results)


def _draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Rows per second of the large batches, and the time of single calls."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((result.mode, result.batch) for result in results))
    figure = Figure(figsize=(2.6 * len(cases), 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        here = [result for result in results if (result.mode, result.batch) == case]
        serving = case[0] == SERVING
        values = [result.p50 * 1e3 if serving else result.rows_per_second / 1e3 for result in here]
        colours = ["tab:red" if result.contestant == OURS else "tab:gray" for result in here]
        bars = panel.bar([result.contestant for result in here], values, color=colours)
        panel.bar_label(bars, [number(value) for value in values], fontsize=7)
        panel.set_title(f"{case[0]}, B={case[1]:,}", fontsize=9)
        panel.set_ylabel("ms, less is better" if serving else "1,000 rows / s", fontsize=8)
        panel.tick_params(axis="x", rotation=60, labelsize=8)
        panel.margins(y=0.15)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
