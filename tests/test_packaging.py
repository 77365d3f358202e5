"""What is built, and what an import finds, whatever the kind of install and the folder one stands in."""

from __future__ import annotations

import email.message
import email.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import autoint_fast

ROOT = Path(__file__).parent.parent
# Everything that a fresh clone has at its top but dotfiles.
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "autoint_fast",
    "kernels",
    "benchmarks",
    "tests",
}


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """What a command prints; pip asks no index, and nothing around the test tells it where to look."""
    private = ("PIP_", "PYTHON", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def copy_of_sources(to: Path) -> Path:
    """A clean copy of the repository, so that building leaves nothing in it and finds nothing stale."""
    to.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in TOP_LEVEL:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, to / name)
    return to


def files_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(path from the folder, content) of the files in it."""
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder).as_posix(), path.read_bytes()


# --- wheel and sdist --------------------------------------------------------------------------------------


def build(kind: str, sources: Path, to: Path) -> Path:
    """The one file that building a "wheel" or an "sdist" with this environment's setuptools gives."""
    run([sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", to, sources], cwd=to.parent)
    (built,) = to.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", copy_of_sources(folder / "sources"), folder / "dist")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return build("sdist", copy_of_sources(folder / "sources"), folder / "dist")


def contents(archive: Path) -> dict[str, bytes]:
    """The files of a wheel by name."""
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name) for name in file.namelist()}


def metadata_of(archive: Path) -> email.message.Message:
    (text,) = (text for name, text in contents(archive).items() if name.endswith(".dist-info/METADATA"))
    return email.parser.Parser().parsestr(text.decode())


def test_top_level_of_the_wheel(wheel: Path) -> None:
    """`kernels` at the top would overwrite somebody else's package of that name."""
    dist_info = f"autoint_fast-{autoint_fast.__version__}.dist-info"
    assert wheel.name == f"autoint_fast-{autoint_fast.__version__}-py3-none-any.whl"
    assert {name.split("/")[0] for name in contents(wheel)} == {"autoint_fast", dist_info}
    assert contents(wheel)[f"{dist_info}/top_level.txt"].split() == [b"autoint_fast"]


def test_wheel_holds_every_source(wheel: Path) -> None:
    sources = {f"autoint_fast/{name}": data for name, data in files_of(ROOT / "autoint_fast")}
    sources |= {f"autoint_fast/kernels/{name}": data for name, data in files_of(ROOT / "kernels")}
    packed = {name: data for name, data in contents(wheel).items() if ".dist-info/" not in name}
    assert packed == sources
    assert "autoint_fast/py.typed" in packed and "autoint_fast/kernels/torch_engine.py" in packed


def test_metadata(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Name"].replace("-", "_") == "autoint_fast"
    assert metadata["Version"] == autoint_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == {"test", "bench", "train", "libraries"}
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert {re.split(r"[ ;<>=!~]", need)[0] for need in needs} == {"torch", "triton", "einops"}
    # torch pins triton exactly, so a bound from above would only ever be in its way.
    (triton,) = (need for need in needs if need.startswith("triton"))
    assert "platform_system" in triton and not re.search(r"<|==\d|~=", triton)
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    (license_text,) = (text for name, text in contents(wheel).items() if name.endswith("/LICENSE"))
    assert license_text == (ROOT / "LICENSE").read_bytes()


def test_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as file:
        # Python 3.12 warns without a filter, and early releases of 3.10 and 3.11 know none.
        file.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert contents(build("wheel", unpacked, tmp_path / "dist")) == contents(wheel)


# --- installs ---------------------------------------------------------------------------------------------

# Prints what imports find and whether the layer and the command run there.
PROBE = """
import contextlib, io, json
import torch
import autoint_fast
from autoint_fast.__main__ import main
from autoint_fast.kernels import torch_engine

try:
    import kernels
    other = kernels.__file__
except ImportError as error:
    other = str(error)
x = torch.randn(3, 4, 8, requires_grad=True)
autoint_fast.InteractingLayer(2, 8, backend="torch")(x).sum().backward()
with contextlib.redirect_stdout(io.StringIO()) as report:
    status = main([])
print(json.dumps({
    "package": autoint_fast.__file__,
    "kernels": torch_engine.__file__,
    "other": other,
    "gradient": x.grad.isfinite().all().item(),
    "report": report.getvalue() if status == 0 else "",
}))
"""


def make_environment(folder: Path) -> Path:
    """A fresh virtual environment that sees this one's torch, einops and setuptools; gives its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    # A path file adds folders, not what their own path files name: an editable install does not come along.
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    site_packages(python).joinpath("borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    return python


def site_packages(python: Path) -> Path:
    found = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=python.parent)
    return Path(found.strip())


class Installed:
    """An environment with one kind of install, and the sources it was made from."""

    def __init__(self, kind: str, folder: Path, wheel: Path) -> None:
        self.kind = kind
        self.sources = copy_of_sources(folder / "sources")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.python = make_environment(folder / "venv")
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--quiet"]
        editable = ["--no-build-isolation", "--editable", self.sources]
        if kind == "regular":
            run([*pip, wheel], cwd=self.elsewhere)
        elif kind == "editable":
            run([*pip, *editable], cwd=self.elsewhere)
        elif kind == "strict":
            run([*pip, "--config-settings", "editable_mode=strict", *editable], cwd=self.elsewhere)
        self.their_kernels = site_packages(self.python) / "kernels" / "__init__.py"
        self.their_kernels.parent.mkdir()
        self.their_kernels.touch()

    def probe(self, cwd: Path) -> dict[str, str]:
        answer: dict[str, str] = json.loads(run([self.python, "-c", PROBE], cwd=cwd))
        assert answer["gradient"] is True
        assert f"autoint_fast {autoint_fast.__version__} ({Path(answer['package']).parent})" in answer["report"]
        return answer


@pytest.fixture(scope="module")
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(request.param, tmp_path_factory.mktemp(request.param), wheel)


@pytest.mark.parametrize("installed", ["regular", "editable", "strict", "none"], indirect=True)
def test_from_the_root_of_the_repository(installed: Installed) -> None:
    """The root's own folders count there, and the engines are found whatever is installed."""
    answer = installed.probe(installed.sources)
    assert Path(answer["package"]).parent == installed.sources / "autoint_fast"
    assert Path(answer["kernels"]).parent == installed.sources / "kernels"
    assert "imported as 'kernels'" in answer["other"]
    assert "use `import autoint_fast.kernels`" in answer["other"]


@pytest.mark.parametrize("installed", ["regular", "editable", "strict"], indirect=True)
def test_from_elsewhere(installed: Installed) -> None:
    """An install is found, and somebody else's package `kernels` beside it."""
    answer = installed.probe(installed.elsewhere)
    assert answer["other"] == str(installed.their_kernels)
    package, kernels = Path(answer["package"]).parent, Path(answer["kernels"]).parent
    if installed.kind == "editable":
        assert (package, kernels) == (installed.sources / "autoint_fast", installed.sources / "kernels")
    else:
        assert kernels == package / "kernels"
    if installed.kind == "regular":
        assert package == site_packages(installed.python) / "autoint_fast"


# --- the repository ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_top_level_of_the_repository() -> None:
    tracked = run(["git", "ls-files", "-z"], cwd=ROOT).split("\0")
    top = {name.split("/")[0] for name in tracked if name and not name.startswith(".")}
    assert top == TOP_LEVEL


def test_ci_runs_the_lines_of_the_readme() -> None:
    """The README's line for the benchmark and its line for the tests are what the script takes from it."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = run(["bash", script, "--list"], cwd=ROOT).splitlines()
    assert [line.split(" && ")[-1] for line in lines] == ["python -m benchmarks", "pytest -n logical"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert set(lines) < set(readme)


def test_oldest_versions_are_stated() -> None:
    """The README names the bounds that the package declares."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for package in ("torch", "triton", "einops"):
        bound = re.search(rf'"{package}>=([\d.]+)', project)
        assert bound and f"{package} {bound[1]}" in readme
