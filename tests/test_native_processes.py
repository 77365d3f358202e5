"""The native engine in processes of its own: workers of a DataLoader, its first use, and no compiler."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from autoint_fast.kernels import native_build, native_engine
from tests.test_native_engine import private_copy

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="libraries are built on Linux and macOS"),
    pytest.mark.skipif(native_build.compiler() is None, reason="there is no C++ compiler"),
]

ROOT = Path(__file__).parents[1]
# A worker that hangs is found out after this many seconds.
PATIENCE = 180

PREAMBLE = """
import pathlib, sys
import torch
from autoint_fast import InteractingLayer, why

torch.manual_seed(0)
torch.set_num_threads(1)
layers = {name: InteractingLayer(2, 16, backend=name) for name in ("auto", "native", "reference")}
for layer in layers.values():
    layer.load_state_dict(layers["reference"].state_dict())
x = torch.randn(37, 7, 16)


def check(name):
    got, expected = (x.clone().requires_grad_() for _ in range(2))
    for layer, leaf in ((layers[name], got), (layers["reference"], expected)):
        layer.zero_grad()
        out = layer(leaf)
        out.square().mean().backward()
        torch.testing.assert_close(out, layers["reference"](x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-6)
    for one, two in zip(layers[name].parameters(), layers["reference"].parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def refusal():
    try:
        layers["native"](x)
    except ValueError as error:
        return str(error)
    raise AssertionError("backend='native' has run")
"""


def start(code: str, *arguments: object, **variables: str | None) -> subprocess.Popen[str]:
    """A process that runs `code` behind the preamble; a variable of None is one that is not set."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *map(str, arguments)],
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*children: subprocess.Popen[str]) -> list[str]:
    """What they printed; fails where one hangs or ends with an error."""
    try:
        outputs = [child.communicate(timeout=PATIENCE)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
    return outputs


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder for a cache, empty."""
    place = tmp_path / "cache"
    place.mkdir(mode=0o700)
    return place


@pytest.fixture
def no_programs(tmp_path: Path) -> Path:
    """A PATH without a compiler."""
    place = tmp_path / "bin"
    place.mkdir()
    return place


# --- first use ------------------------------------------------------------------------------------------------


def test_two_processes_compile_at_once(cache: Path) -> None:
    """Both have the right numbers, and one sound entry is left of two builds."""
    code = """
        import time

        pathlib.Path(sys.argv[1]).touch()
        while not pathlib.Path(sys.argv[2]).exists():
            time.sleep(0.01)
        assert why(layers["auto"], x).choice == "native"
        check("auto")
        check("native")
    """
    ready = [cache.parent / "one", cache.parent / "two"]
    # Each compiles for half as long: what meets in the cache is all that counts here.
    made_by = native_build.compiler()
    assert made_by is not None
    hasty = cache.parent / "c++"
    hasty.write_text(f'#!/bin/sh\nexec {shlex.join(made_by.command)} "$@" -O0\n')
    hasty.chmod(0o755)
    variables = {"AUTOINT_FAST_CACHE": str(cache), "CXX": str(hasty)}
    finish(*(start(code, *order, **variables) for order in (ready, ready[::-1])))
    left = list(cache.iterdir())
    assert len(left) == 1 and left[0].suffix == ".so" and native_build._sound(left[0])


def test_asking_compiles_nothing(cache: Path) -> None:
    code = """
        for layer in layers.values():
            print(why(layer, x))
        assert why(layers["auto"], x).choice == "native"
    """
    finish(start(code, AUTOINT_FAST_CACHE=str(cache)))
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [(None, "there is no C++ compiler"), ("false", "CXX='false' is no C++ compiler")],
    ids=["none on PATH", "CXX=false"],
)
def test_no_compiler(cxx: str | None, reason: str, cache: Path, no_programs: Path) -> None:
    code = """
        answer = why(layers["auto"], x)
        assert answer.choice == "torch" and len(answer.reasons["native"]) == 1, answer
        assert sys.argv[1] in answer.reasons["native"][0], answer
        check("auto")
        assert sys.argv[1] in refusal(), refusal()
        assert why(layers["native"], x).choice == "nothing (it raises)"
        layers["auto"].eval().freeze()
        torch.testing.assert_close(layers["auto"](x), layers["reference"](x), rtol=1e-5, atol=1e-5)
    """
    path = str(no_programs) if cxx is None else os.environ["PATH"]
    finish(start(code, reason, AUTOINT_FAST_CACHE=str(cache), PATH=path, CXX=cxx))
    assert not list(cache.iterdir())


def test_compiler_that_fails(cache: Path, no_programs: Path) -> None:
    """It is asked once; what it said is a reason like any other."""
    compiler = no_programs / "c++"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho >>{cache.parent}/asked\necho out of order >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    code = """
        check("auto")
        answer = why(layers["auto"], x)
        assert answer.choice == "torch" and "out of order" in answer.reasons["native"][0], answer
        assert "out of order" in refusal() and "compile" in refusal(), refusal()
        check("auto")
    """
    finish(start(code, AUTOINT_FAST_CACHE=str(cache), CXX=str(compiler)))
    assert not list(cache.iterdir()), "the failed build has left something behind"
    assert len((cache.parent / "asked").read_text().splitlines()) == 1


def test_a_filled_cache_needs_no_compiler(tmp_path: Path, no_programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that was built where there was one; a dtype that is not there is refused."""
    entry = native_build.build(native_engine._spec(torch.float32))
    place = private_copy(tmp_path, [entry], monkeypatch)
    code = """
        assert why(layers["auto"], x).choice == "native"
        check("auto")
        check("native")
        double = InteractingLayer(2, 16, dtype=torch.float64)
        answer = why(double, x.double())
        assert answer.choice == "torch" and "C++ compiler" in answer.reasons["native"][0], answer
        assert double(x.double()).isfinite().all()
    """
    finish(start(code, AUTOINT_FAST_CACHE=str(place), PATH=str(no_programs), CXX=None))
    native_engine.forget()


# --- workers ----------------------------------------------------------------------------------------------------

WORKERS = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
from autoint_fast import InteractingLayer, why
from autoint_fast.kernels import native_engine

native_engine.THREAD_OPERATIONS = 1.0


def work(layer, x):
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(leaf)
    out.square().sum().backward()
    return [out.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]


class Batches(Dataset):
    def __init__(self, layer, x):
        self.layer, self.x = layer, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return work(self.layer, self.x[i]), native_engine._threads(1e12)


def two_threads(worker):
    torch.set_num_threads(2)


def main(method):
    torch.manual_seed(0)
    layer = InteractingLayer(2, 16, backend="native")
    x = torch.randn(6, 100, 7, 16)
    torch.set_num_threads(2)
    assert native_engine._threads(1e12) == 2
    expected = [work(layer, batch) for batch in x]
    # A child forked off a process whose OpenMP has threads cannot start any, whoever asks.
    for init, threads in ((None, 1), (two_threads, 2)) if method == "spawn" else ((None, 1),):
        loader = DataLoader(
            Batches(layer, x), batch_size=None, num_workers=2, multiprocessing_context=method, worker_init_fn=init
        )
        for _ in range(2 if method == "fork" else 1):
            got = list(loader)
            assert [used for _, used in got] == [threads] * len(x), got
            for (values, _), right in zip(got, expected, strict=True):
                assert all(torch.equal(one, two) for one, two in zip(values, right, strict=True))
            again = [work(layer, batch) for batch in x]
            assert all(torch.equal(a, b) for one, two in zip(again, expected) for a, b in zip(one, two))


if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str, tmp_path: Path) -> None:
    """Their parent has used two threads; they take one, or as many as they are told, and give its bits."""
    native_build.build(native_engine._spec(torch.float32))
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    command = [sys.executable, str(script), method]
    child = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    finish(child)
