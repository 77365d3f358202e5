"""The commands of `python -m autoint_fast` from a log to a model: their arguments, and what they print."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dispatch import BACKENDS
from .model import LAYERS

if TYPE_CHECKING:
    from .training import Progress

SPLITS = ("train", "validation", "test")
# As a shell has it for a process that ended by SIGINT.
INTERRUPTED = 130
DRAW_SECONDS = 0.1


def add_commands(commands: Any) -> None:
    """Adds the parsers; each sets `run`, a function from its arguments to the exit status."""
    _add_prepare(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_explain(commands)
    _add_export(commands)


# --- prepare ----------------------------------------------------------------------------------------------------------


def _add_prepare(commands: Any) -> None:
    summary = "encodes a click log: vocabularies, numbers, training, validation and test rows"
    parser = commands.add_parser("prepare", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parse = parser.parse_known_args

    def parse_known_args(*arguments: Any, **named: Any) -> Any:
        # Its arguments come with what reads logs, which the other commands shall not wait for, nor need.
        try:
            from .clicklog.prepare import add_arguments, run
        except ModuleNotFoundError as error:
            parser.error(f"{error}; the command needs autoint_fast[train]")
        add_arguments(parser)
        parser.set_defaults(run=_telling_errors(run), prog=parser.prog)
        return parse(*arguments, **named)

    parser.parse_known_args = parse_known_args


# --- train ------------------------------------------------------------------------------------------------------------


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        "trains AutoInt on prepared data",
        "Under `torchrun --nproc-per-node N -m autoint_fast train ...` each of N processes takes its share of every "
        "batch. `tensorboard --logdir RUN` shows the curves.",
        _train,
    )
    parser.add_argument("data", type=Path, metavar="DIR", help="what prepare has written")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in RUN, if there is one")
    parser.add_argument("--force", action="store_true", help="replace a run in RUN")
    parser.add_argument("--device", metavar="DEVICE", help="default: cuda if torch finds one, else cpu")
    model = parser.add_argument_group("the model")
    model.add_argument("--emb-size", type=int, metavar="E", help="width of a field's vector")
    model.add_argument("--n-layers", type=int, metavar="L", help="interacting layers")
    model.add_argument("--n-head", type=int, metavar="H", help="heads of each")
    model.add_argument("--layer", choices=LAYERS, help="as wide as the embedding, or as the paper defines it")
    model.add_argument("--att-size", type=int, metavar="A", help="width of the paper's layer over all heads")
    model.add_argument("--mlp", type=int, nargs="+", metavar="WIDTH", help="hidden layers of AutoInt+")
    model.add_argument("--dropout", type=float, metavar="P", help="in the MLP")
    model.add_argument("--backend", choices=BACKENDS, help="engine of the interacting layers")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, metavar="N", help="the most passes over the data")
    training.add_argument("--batch-size", type=int, metavar="B", help="rows of a step, over all processes")
    training.add_argument("--learning-rate", type=float, metavar="R", help="of Adam")
    training.add_argument(
        "--patience", type=int, metavar="N", help="evaluations without a lower validation logloss until training stops"
    )
    training.add_argument("--evaluate-every", type=int, metavar="STEPS", help="beside each epoch's end")
    training.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="beside each evaluation")
    training.add_argument("--seed", type=int, metavar="N", help="of weights, order of rows and dropout")
    for name, about in (
        ("sparse", "sparse gradients of the table, and SparseAdam, for large vocabularies"),
        ("amp", "compute in bf16 by autocast"),
        ("compile", "run the model through torch.compile"),
    ):
        training.add_argument(f"--{name}", action="store_true", default=None, help=about)


def _train(arguments: argparse.Namespace) -> int:
    from .training import NonFiniteLoss, Settings, train
    from .training.run import SETTINGS_FILE, Run

    names = [field.name for field in dataclasses.fields(Settings)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    resumed = arguments.resume and (arguments.out / SETTINGS_FILE).exists()
    begun = Run.open(arguments.out).settings if resumed else Settings()
    settings = dataclasses.replace(begun, **given)
    first = os.environ.get("RANK", "0") == "0"
    try:
        with _bar(first) as bar:
            outcome = train(
                *(arguments.data, arguments.out, settings),
                resume=arguments.resume,
                force=arguments.force,
                device=arguments.device,
                progress=bar,
            )
    except NonFiniteLoss as error:
        print(f"{arguments.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{arguments.prog}: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    if first:
        why = "no better for a while" if outcome.stopped_early else "all epochs"
        speed = f", {outcome.rows_per_second:,.0f} rows/s" if outcome.rows_per_second else ""
        print(f"trained {outcome.steps:,} steps{speed} ({why}); best on validation: {outcome.best}")
        print(f"wrote {arguments.out}")
    return 0


# --- evaluate, predict, explain, export -------------------------------------------------------------------------------


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", "AUC and logloss of a run's best model", "", _evaluate)
    parser.add_argument("model", type=Path, metavar="RUN", help="what train has written")
    parser.add_argument("data", type=Path, metavar="DIR", help="what prepare has written")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--device", metavar="DEVICE", help="default: cuda if torch finds one, else cpu")


def _evaluate(arguments: argparse.Namespace) -> int:
    from .training import evaluate

    with _counting("evaluated") as advance:
        metrics = evaluate(
            arguments.model, arguments.data, split=arguments.split, device=arguments.device, advance=advance
        )
    print(f"{arguments.split}: {metrics}")
    return 0


def _add_predict(commands: Any) -> None:
    parser = _command(
        commands,
        "predict",
        "click probabilities of raw rows",
        "Writes CSV with a header, a probability for each row, in order.",
        _predict,
    )
    parser.add_argument("model", type=Path, metavar="RUN", help="what train has written")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="raw rows, with or without labels")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the CSV file to write")
    parser.add_argument("--force", action="store_true", help="replace it")
    parser.add_argument("--device", metavar="DEVICE", help="default: cuda if torch finds one, else cpu")


def _predict(arguments: argparse.Namespace) -> int:
    from .training import predict

    start = time.perf_counter()
    with _counting("predicted") as advance:
        rows = predict(
            *(arguments.model, arguments.files, arguments.out),
            force=arguments.force,
            device=arguments.device,
            advance=advance,
        )
    print(f"predicted {rows:,} rows, {rows / (time.perf_counter() - start):,.0f} rows/s")
    print(f"wrote {arguments.out}")
    return 0


def _add_explain(commands: Any) -> None:
    parser = _command(
        commands,
        "explain",
        "which fields attend to which",
        "Heat maps, PNG and CSV, of one prediction and of the mean over many, for each layer and head.",
        _explain,
    )
    parser.add_argument("model", type=Path, metavar="RUN", help="what train has written")
    parser.add_argument("data", type=Path, metavar="DIR", help="what prepare has written")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write into")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="the row whose prediction is shown (0)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--most-rows", type=int, default=100_000, metavar="N", help="rows of the mean (100000)")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--device", metavar="DEVICE", help="default: cuda if torch finds one, else cpu")


def _explain(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .training import explain
    from .training.explain import strongest

    with _counting("explained") as advance:
        found = explain(
            *(arguments.model, arguments.data, arguments.out),
            row=arguments.row,
            split=arguments.split,
            most_rows=arguments.most_rows,
            force=arguments.force,
            device=arguments.device,
            advance=advance,
        )
    console = Console()
    for title, attention in (
        (f"row {arguments.row} of {arguments.split}, probability of a click {found.probability:.4f}", found.one),
        (f"mean of {found.rows:,} rows of {arguments.split}", found.mean),
    ):
        console.print(title, highlight=False, markup=False)
        table = Table("field", "attends to", "attention", "layer", "head")
        for pair in strongest(attention, found.fields):
            table.add_row(escape(pair.query), escape(pair.key), f"{pair.weight:.4f}", str(pair.layer), str(pair.head))
        console.print(table)
    print(f"wrote {len(found.files)} files to {arguments.out}")
    return 0


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        "a run's best model for PyTorch and ONNX runtimes, without this package",
        "Writes model.pt2, a torch.export program, and model.onnx: from categorical (B, C) int64 and numeric (B, N) "
        "float32, as encoded by the run's vocabulary, to logits (B,).",
        _export,
    )
    parser.add_argument("model", type=Path, metavar="RUN", help="what train has written")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write into")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")


def _export(arguments: argparse.Namespace) -> int:
    from .training import export

    exported = export(arguments.model, arguments.out, force=arguments.force)
    for path in exported:
        print(f"wrote {path}")
    return 0


# --- what they share --------------------------------------------------------------------------------------------------


def _command(
    commands: Any, name: str, summary: str, more: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    about = f"{summary[0].upper()}{summary[1:]}. {more}".strip()
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=about)
    parser.set_defaults(run=_telling_errors(run), prog=parser.prog)
    return parser


def _telling_errors(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A bad argument or file is one line and status 2, a missing library too."""

    def told(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except ModuleNotFoundError as error:
            why = f"{error}; the command needs autoint_fast[train]"
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            why = str(error)
        print(f"{arguments.prog}: {' '.join(why.split())}", file=sys.stderr)
        return 2

    return told


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Progress | None]:
    """A bar for training, on stderr."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    from .training import Progress

    if not shown:
        yield None
        return
    speed, loss = TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[loss]}")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), speed, loss, TimeRemainingColumn())
    with RichProgress(*columns, **_drawing()) as rich:

        class Bar(Progress):
            def begin(self, what: str, total: int, done: int = 0) -> None:
                for task in rich.task_ids:
                    rich.remove_task(task)
                self.task = rich.add_task(what, total=total, completed=done, speed="", loss="")
                self.drawn = self.begun = time.perf_counter()
                self.rows = 0

            def advance(self, rows: int, loss: float | None = None) -> None:
                self.rows += rows
                now = time.perf_counter()
                rich.advance(self.task, rows)
                if now - self.drawn >= DRAW_SECONDS:
                    self.drawn = now
                    speed = f"{self.rows / (now - self.begun):,.0f} rows/s"
                    rich.update(self.task, speed=speed, loss="" if loss is None else f"loss {loss:.4f}", refresh=True)

            def say(self, line: str) -> None:
                rich.console.print(line, highlight=False, markup=False)

        yield Bar()


@contextlib.contextmanager
def _counting(done: str) -> Iterator[Callable[[int], None]]:
    """Shows how many rows are done and how fast, on stderr where that is a terminal."""
    from rich.progress import Progress as RichProgress
    from rich.progress import TextColumn

    with RichProgress(TextColumn("{task.description}"), **_drawing()) as rich:
        task, begun, drawn, rows = rich.add_task(""), time.perf_counter(), 0.0, 0

        def advance(more: int) -> None:
            nonlocal drawn, rows
            rows += more
            now = time.perf_counter()
            if now - drawn >= DRAW_SECONDS:
                drawn = now
                rich.update(task, description=f"{done} {rows:,} rows, {rows / (now - begun):,.0f}/s", refresh=True)

        yield advance


def _drawing() -> dict[str, Any]:
    """How bars are drawn: on stderr where that is a terminal, and between steps, as a thread that draws would take the
    interpreter from them."""
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    return {"console": console, "auto_refresh": False, "transient": True, "disable": not console.is_terminal}
