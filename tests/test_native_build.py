"""Compiling, keeping and finding the native engine's libraries; the C++ here is a few words long."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from autoint_fast.kernels import native_build
from autoint_fast.kernels.native_build import Building, Compiler, Spec

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="libraries are built on Linux and macOS"),
    pytest.mark.skipif(native_build.compiler() is None, reason="there is no C++ compiler"),
]

SPEC = Spec("plain", 16, (("ANSWER", 42),))
SOURCE = """
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
extern "C" __attribute__((visibility("default"))) int lane_bytes() { return AUTOINT_LANE_BYTES; }
"""


class Place(NamedTuple):
    """Where a test builds: a source, a cache, and a compiler that can be watched and held up."""

    root: Path

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def source(self) -> Path:
        return self.root / "source.cpp"

    @property
    def cxx(self) -> Path:
        return self.root / "c++"

    @property
    def hold(self) -> Path:
        """While this file is there, the compiler waits; its process ids then stand in `pids`."""
        return self.root / "hold"

    @property
    def pids(self) -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return [int(pid) for pid in (self.root / "pids").read_text().split()]
        return []

    @property
    def compiled(self) -> int:
        """How often the compiler has been asked to compile."""
        with contextlib.suppress(FileNotFoundError):
            return len((self.root / "calls").read_text().split())
        return 0

    def entries(self) -> list[str]:
        """Everything in the cache but what has a name of an entry, which is shortened to "entry"."""
        return sorted("entry" if path.suffix == ".so" else path.name for path in self.cache.iterdir())


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = Place(tmp_path.resolve())
    real = native_build.compiler()
    assert real is not None
    place.source.write_text(SOURCE)
    place.cxx.write_text(
        f"""#!/bin/sh
        cd {shlex.quote(str(place.root))}
        case "$*" in *--version) ;; *)
            echo compiled >> calls
            if [ -e hold ]; then
                sleep 60 & helper=$!
                echo "$TMPDIR" > temporary
                echo $$ $helper > pids.new; mv pids.new pids
                while [ -e hold ]; do sleep 0.02; done
                kill $helper
            fi ;;
        esac
        exec {shlex.join(real.command)} "$@"
        """
    )
    place.cxx.chmod(0o755)
    monkeypatch.setenv("CXX", str(place.cxx))
    monkeypatch.setenv("AUTOINT_FAST_CACHE", str(place.cache))
    monkeypatch.setattr(native_build, "SOURCE", place.source)
    monkeypatch.setattr(native_build, "_VERDICTS", {})
    monkeypatch.setattr(native_build, "_SCRATCHES", scratches := [])
    yield place
    for building in list(native_build._RUNNING):
        building.cancel()
    for _, path in scratches:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Takes the compiler away."""

    def take_away() -> None:
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", "")
        native_build._VERDICTS.clear()

    return take_away


def answer(path: Path) -> int:
    return int(native_build.load(path).answer())


def eventually(condition: Callable[[], object], seconds: float = 30) -> None:
    """Fails where `condition` does not become true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    if Path("/proc/self/stat").exists():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return status.stdout.strip()[:1] not in ("", "Z")


def process(code: str, place: Place) -> subprocess.Popen[str]:
    """A Python that has only this one module, `native_build`, with the test's source, and SPEC as `spec`."""
    start = f"""
        import importlib.util, os, pathlib, signal, sys, time
        found = importlib.util.spec_from_file_location("native_build", {native_build.__file__!r})
        native_build = sys.modules["native_build"] = importlib.util.module_from_spec(found)
        found.loader.exec_module(native_build)
        native_build.SOURCE = pathlib.Path({str(place.source)!r})
        spec = native_build.Spec(*{tuple(SPEC)!r})
    """
    return subprocess.Popen(
        # Neither site-packages nor the working folder: the standard library has to do.
        [sys.executable, "-I", "-S", "-c", textwrap.dedent(start) + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(child: subprocess.Popen[str]) -> str:
    printed, complaints = child.communicate(timeout=60)
    assert child.returncode == 0, complaints
    return printed.strip()


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `path` another user's."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)


# --- the machine ----------------------------------------------------------------------------------------------------


def test_instruction_sets() -> None:
    isas = native_build.isas()
    assert isas[-1] == "plain" and len(set(isas)) == len(isas)
    assert list(isas) == [isa for isa in native_build.FLAGS if isa in isas]


@pytest.mark.parametrize(
    ("machine", "features", "isas"),
    [
        ("x86_64", "fpu sse2", ("plain",)),
        ("x86_64", "avx avx2 fma f16c", ("plain",)),
        ("x86_64", "avx avx2 fma f16c bmi2", ("avx2", "plain")),
        ("x86_64", "avx2 fma f16c bmi2 avx512f avx512cd", ("avx2", "plain")),
        ("x86_64", "avx2 fma f16c bmi2 avx512f avx512vl avx512dq avx512bw", ("avx512", "avx2", "plain")),
        (
            "x86_64",
            "avx2 fma f16c bmi2 avx512f avx512vl avx512dq avx512bw avx512_bf16",
            ("avx512bf16", "avx512", "avx2", "plain"),
        ),
        ("aarch64", "", ("neon", "plain")),
        ("arm64", "", ("neon", "plain")),
        ("riscv64", "", ("plain",)),
    ],
)
def test_instruction_sets_of(
    machine: str, features: str, isas: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build.platform, "machine", lambda: machine)
    monkeypatch.setattr(native_build, "_cpu_features", lambda: set(features.split()))
    assert native_build.isas.__wrapped__() == isas


@pytest.mark.parametrize("isa", native_build.isas())
def test_each_instruction_set_builds(isa: str, place: Place) -> None:
    """For itself and none that is better."""
    avx512 = "defined __AVX512F__ && defined __AVX512VL__ && defined __AVX512DQ__ && defined __AVX512BW__"
    macros = {
        "avx512bf16": f"{avx512} && defined __AVX512BF16__",
        "avx512": f"{avx512} && !defined __AVX512BF16__",
        "avx2": "defined __AVX2__ && defined __FMA__ && defined __F16C__ && !defined __AVX512F__",
        "neon": "defined __ARM_NEON",
        "plain": "!defined __AVX2__",
    }
    place.source.write_text(f"{SOURCE}\n#if !({macros[isa]})\n#error other flags\n#endif\n")
    library = native_build.load(native_build.build(Spec(isa, 64, (("ANSWER", 7),))))
    assert (library.answer(), library.lane_bytes()) == (7, 64)


def test_flags_that_would_be_wrong() -> None:
    """They change what comes out for NaN, or tie an entry to a CPU that its name does not tell."""
    for isa in native_build.FLAGS:
        flags = native_build._flags(Spec(isa, 16), ())
        assert not {"-ffast-math", "-Ofast", "-march=native", "-mtune=native"} & set(flags)


def test_compiler_too_old_for_an_instruction_set(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\ncase "$*" in *avx512bf16*) exit 1; esac\nexec {shlex.quote(str(place.cxx))} "$@"\n')
    old.chmod(0o755)
    for isa in native_build.isas():
        assert native_build.takes(isa)
    monkeypatch.setenv("CXX", str(old))
    assert [isa for isa in native_build.isas() if not native_build.takes(isa)] in ([], ["avx512bf16"])
    assert not native_build.takes("avx512bf16")


def test_compiler(place: Place) -> None:
    made_by = native_build.compiler()
    assert made_by is not None and made_by.command == (str(place.cxx),)
    asked = subprocess.run([place.cxx, "--version"], capture_output=True, text=True, check=True)
    assert made_by.version == asked.stdout.splitlines()[0]


def test_compiler_with_arguments(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = native_build.build(Spec("plain", 16, (("ANSWER", 1),)))
    monkeypatch.setenv("CXX", f"{shlex.quote(str(place.cxx))} -DTWICE='2 * 21'")
    made_by = native_build.compiler()
    assert made_by is not None and made_by.command == (str(place.cxx), "-DTWICE=2 * 21")
    place.source.write_text(SOURCE.replace("ANSWER", "TWICE"))
    path = native_build.build(Spec("plain", 16, (("ANSWER", 1),)))
    assert path != plain and answer(path) == 42


def test_first_compiler_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    for name, status in (("c++", 1), ("g++", 0), ("clang++", 0)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho {name} of mine\necho more\nexit {status}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert native_build.compiler() == Compiler((str(tmp_path / "bin" / "g++"),), "g++ of mine")


@pytest.mark.parametrize("cxx", ["/nowhere/c++", "false", "'", " "])
def test_compiler_that_does_not_run(cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CXX says is meant: nothing else is taken in its place."""
    monkeypatch.setenv("CXX", cxx)
    assert native_build.compiler() is None
    with pytest.raises(RuntimeError, match="CXX="):
        native_build.build(SPEC)


# --- found again ----------------------------------------------------------------------------------------------------


def test_found_without_compiling(place: Place) -> None:
    assert native_build.find(SPEC) is None
    path = native_build.build(SPEC)
    assert path.parent == place.cache and answer(path) == 42
    assert native_build.build(SPEC) == native_build.find(SPEC) == path
    assert place.compiled == 1 and place.entries() == ["entry"]


def test_found_by_another_process(place: Place) -> None:
    path = native_build.build(SPEC)
    assert output(process("print(native_build.build(spec))", place)) == str(path)
    assert place.compiled == 1


def test_path_depends_on_everything(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    gcc = Compiler(("c++",), "13.1")
    paths = {
        native_build.path_of(SPEC, gcc),
        native_build.path_of(SPEC._replace(isa="neon"), gcc),
        native_build.path_of(SPEC._replace(isa="avx2"), gcc),
        native_build.path_of(SPEC._replace(lane_bytes=32), gcc),
        native_build.path_of(SPEC._replace(definitions=(("ANSWER", 43),)), gcc),
        native_build.path_of(SPEC._replace(definitions=()), gcc),
        native_build.path_of(SPEC, gcc._replace(version="13.2")),
        native_build.path_of(SPEC, gcc._replace(command=("c++", "-v"))),
        native_build.path_of(SPEC, gcc, ("-g",)),
    }
    place.source.write_text(SOURCE + "\n")
    paths.add(native_build.path_of(SPEC, gcc))
    monkeypatch.setattr(native_build, "COMMON_FLAGS", (*native_build.COMMON_FLAGS, "-g0"))
    paths.add(native_build.path_of(SPEC, gcc))
    monkeypatch.setattr(native_build, "MAGIC", b"AUTOINT\x02")
    paths.add(native_build.path_of(SPEC, gcc))
    monkeypatch.setattr(native_build.platform, "machine", lambda: "another")
    paths.add(native_build.path_of(SPEC, gcc))
    assert len(paths) == 13 and {path.parent for path in paths} == {place.cache}


def test_changed_source_is_compiled(place: Place) -> None:
    old = native_build.build(SPEC)
    place.source.write_text(SOURCE.replace("return ANSWER", "return ANSWER + 1"))
    assert native_build.find(SPEC) is None
    assert (answer(native_build.build(SPEC)), answer(old)) == (43, 42)


def test_extra_flags() -> None:
    path = native_build.build(Spec("plain", 16), ("-DANSWER=6",))
    assert answer(path) == 6
    assert native_build.find(Spec("plain", 16), ("-DANSWER=6",)) == path
    assert native_build.find(Spec("plain", 16)) is None


def test_loaded_once() -> None:
    path = native_build.build(SPEC)
    loaded: list[object] = []
    threads = [threading.Thread(target=lambda: loaded.append(native_build.load(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 8 and len(set(map(id, loaded))) == 1


# --- entries that are not to be loaded ------------------------------------------------------------------------------


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_by_one(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def library_gone(path: Path) -> None:
    """What is left is sealed in order."""
    emptied(path)
    native_build._seal(path)


def flipped(position: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return flip


def group_writable(path: Path) -> None:
    path.chmod(0o664)


def writable_by_all(path: Path) -> None:
    path.chmod(0o646)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.so")
    path.symlink_to(path.parent.parent / "elsewhere.so")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


BAD = {
    "cut in half": cut_in_half,
    "cut by a byte": cut_by_one,
    "empty": emptied,
    "sealed and empty": library_gone,
    "flipped at the start": flipped(0),
    "flipped in the middle": flipped(5000),
    "flipped in the digest": flipped(-len(native_build.MAGIC) - 1),
    "flipped in the version": flipped(-1),
    "writable by the group": group_writable,
    "writable by all": writable_by_all,
    "link": link,
    "pipe": pipe,
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD.keys())
def test_bad_entry_is_replaced(spoil: Callable[[Path], None], place: Place) -> None:
    path = native_build.build(SPEC)
    spoil(path)
    assert native_build.find(SPEC) is None
    with pytest.raises(RuntimeError, match="damaged"):
        native_build.load(path)
    assert native_build.build(SPEC) == path and native_build.find(SPEC) == path
    assert place.compiled == 2 and place.entries() == ["entry"] and not path.is_symlink()
    assert answer(path) == 42


def test_entry_of_another_user_is_replaced(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    path = native_build.build(SPEC)
    give_away(path, monkeypatch)
    assert native_build.find(SPEC) is None
    assert answer(native_build.build(SPEC)) == 42 and path.stat().st_uid == 0


def test_replaced_entry_is_another_file(place: Place) -> None:
    """A process that has the old one loaded keeps it."""
    path = native_build.build(SPEC)
    with path.open("rb") as old:
        content = old.read()
        native_build.start(SPEC).finish()
        old.seek(0)
        assert old.read() == content and os.fstat(old.fileno()).st_ino != path.stat().st_ino


# --- the folder -----------------------------------------------------------------------------------------------------


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("AUTOINT_FAST_CACHE", "here")
    assert native_build.folder() == Path.cwd() / "here"
    monkeypatch.setenv("AUTOINT_FAST_CACHE", "")
    assert native_build.folder() == Path("/xdg/autoint_fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/to/be/ignored")
    assert native_build.folder() == Path("/home/me/.cache/autoint_fast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native_build.folder() == Path("/home/me/.cache/autoint_fast")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(FileNotFoundError, match="AUTOINT_FAST_CACHE"):
        native_build.folder()


def test_nothing_is_created_before_it_is_needed(place: Place) -> None:
    code = """
        native_build.folder(); native_build.find(spec); native_build.isas(); native_build.reasons(spec)
        print("torch" in sys.modules)
    """
    assert output(process(code, place)) == "False"
    assert not place.cache.exists() and place.compiled == 0


def test_folder_is_private(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOINT_FAST_CACHE", str(place.root / "a" / "b"))
    before = os.umask(0)
    try:
        path = native_build.build(SPEC)
    finally:
        os.umask(before)
    assert path.parent == place.root / "a" / "b"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_folder_that_others_may_read(place: Place) -> None:
    place.cache.mkdir(mode=0o755)
    assert native_build.build(SPEC).parent == place.cache


@pytest.mark.parametrize("kind", ["group", "others", "link", "dangling link", "another user's"])
def test_folder_refused(kind: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native_build.build(SPEC)
    if kind == "group":
        place.cache.chmod(0o770)
    elif kind == "others":
        place.cache.chmod(0o702)
    elif kind == "another user's":
        give_away(place.cache, monkeypatch)
    else:
        place.cache.rename(place.root / "moved")
        place.cache.symlink_to(place.root / ("moved" if kind == "link" else "nowhere"))
    wrong = {"group": "chmod go-w", "others": "chmod go-w", "another user's": "belongs to user"}.get(kind, "link")
    for attempt in (
        native_build.find,
        native_build.start,
        native_build.build,
        lambda _: native_build.private(place.cache),
    ):
        with pytest.raises(PermissionError, match=wrong) as raised:
            attempt(SPEC)
        assert str(place.cache) in str(raised.value)
    (reason,) = native_build.reasons()
    assert reason == str(raised.value)
    assert path.suffix == ".so" and place.compiled == 1


def read_only(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system mounted read-only, whose permissions bind root too."""
    place.cache.mkdir(mode=0o700)
    make = tempfile.mkdtemp

    def mkdtemp(suffix: str | None = None, prefix: str | None = None, dir: Path | None = None) -> str:
        if dir == place.cache:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))
        return make(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)


def under_a_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.root / "file").write_text("")
    monkeypatch.setenv("AUTOINT_FAST_CACHE", str(place.root / "file" / "cache"))


def a_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.cache.write_text("")


def no_home(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTOINT_FAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


@pytest.mark.parametrize("spoil", [read_only, under_a_file, a_file, no_home])
def test_cache_that_cannot_be_written(
    spoil: Callable[[Place, pytest.MonkeyPatch], None], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(place, monkeypatch)
    assert native_build.reasons(SPEC) == [] and native_build.find(SPEC) is None
    path = native_build.build(SPEC)
    assert answer(path) == 42 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert native_build.build(SPEC) == path and place.compiled == 1
    other = native_build.build(SPEC._replace(lane_bytes=32))
    assert other.parent == path.parent and set(path.parent.iterdir()) == {path, other}
    assert len(native_build._SCRATCHES) == 1


def test_entry_of_a_cache_that_cannot_be_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native_build.build(SPEC)
    place.cache.rename(place.root / "kept")
    read_only(place, monkeypatch)
    path = (place.root / "kept" / path.name).rename(path)
    assert native_build.build(SPEC) == path and place.compiled == 1


def test_own_folder_is_removed_at_exit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by the process that made it only."""
    under_a_file(place, monkeypatch)
    code = """
        path = native_build.build(spec)
        child = os.fork()
        if child == 0:
            sys.exit(0 if native_build.find(spec) == path else 1)
        assert os.waitpid(child, 0)[1] == 0 and path.exists()
        print(path)
    """
    path = Path(output(process(code, place)))
    assert path.suffix == ".so" and not path.parent.exists()


# --- no compiler ----------------------------------------------------------------------------------------------------


def test_without_a_compiler(no_compiler: Callable[[], None], place: Place) -> None:
    no_compiler()
    with pytest.raises(
        RuntimeError, match=r"c\+\+, g\+\+, clang\+\+ on PATH: install one, or name it in CXX"
    ) as raised:
        native_build.build(SPEC)
    assert native_build.find(SPEC) is None
    assert native_build.reasons() == native_build.reasons(SPEC) == [str(raised.value)]
    assert not place.cache.exists()


def test_filled_cache_without_a_compiler(no_compiler: Callable[[], None]) -> None:
    path = native_build.build(SPEC)
    no_compiler()
    assert native_build.find(SPEC) == native_build.build(SPEC) == path
    assert native_build.reasons() == native_build.reasons(SPEC) == []
    other = SPEC._replace(lane_bytes=32)
    assert native_build.find(other) is None
    assert native_build.reasons(other, SPEC) == [] and len(native_build.reasons(other)) == 1


def test_newest_sound_entry_without_a_compiler(
    no_compiler: Callable[[], None], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for age, flag in enumerate(("-DA", "-DB", "-DC")):
        monkeypatch.setenv("CXX", f"{place.cxx} {flag}")
        paths.append(native_build.build(SPEC))
        os.utime(paths[-1], (1e9 - age, 1e9 - age))
    assert len(set(paths)) == 3
    no_compiler()
    assert native_build.find(SPEC) == paths[0]
    cut_in_half(paths[0])
    os.utime(paths[0])
    assert native_build.find(SPEC) == paths[1]


def test_reasons_are_cheap_and_looked_for_again(
    no_compiler: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native_build.reasons(SPEC) == []
    native_build.reasons(SPEC).append("what a caller does to its own list")
    assert native_build.reasons(SPEC) == []
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    no_compiler()
    monkeypatch.setattr(native_build, "_look", lambda specs, extra: ["looked"])
    assert native_build.reasons(SPEC) == ["looked"]
    monkeypatch.setattr(native_build, "_look", lambda specs, extra: ["looked again"])
    assert native_build.reasons(SPEC) == ["looked"]
    now += native_build.REASONS_HOLD
    assert native_build.reasons(SPEC) == ["looked again"]


# --- compiling ------------------------------------------------------------------------------------------------------


def test_done_and_finish(place: Place) -> None:
    place.hold.touch()
    building = native_build.start(SPEC)
    eventually(lambda: place.pids)
    assert not building.done() and not building.path.exists() and native_build.find(SPEC) is None
    place.hold.unlink()
    eventually(building.done)
    assert building.finish() == building.finish() == building.path == native_build.find(SPEC)
    building.cancel()
    assert place.entries() == ["entry"] and not native_build._RUNNING


def test_compiler_says_why(place: Place) -> None:
    place.source.write_text(SOURCE + "int nonsense = undeclared_name;\n")
    building = native_build.start(SPEC)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="undeclared_name") as raised:
            building.finish()
        assert str(place.cxx) in str(raised.value) and "-DANSWER=42" in str(raised.value)
    assert place.entries() == [] and not native_build._RUNNING


def test_compiler_says_a_lot(place: Place) -> None:
    """More than a pipe holds; the end of it is shown."""
    lines = "".join(f"#warning {'x' * 100} {i}\n" for i in range(3000))
    place.source.write_text(lines + "#error the last word\n")
    building = native_build.start(SPEC)
    eventually(building.done)
    with pytest.raises(RuntimeError, match="the last word") as raised:
        building.finish()
    assert len(str(raised.value).splitlines()) <= 21


def test_exit_status_that_is_lost(place: Place) -> None:
    """Where SIGCHLD is ignored, every process seems to have gone well."""
    place.source.write_text("nonsense\n")
    code = """
        native_build.compiler()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            native_build.build(spec)
        except RuntimeError as error:
            print(error)
    """
    assert "nonsense" in output(process(code, place)) and place.entries() == []


def test_source_that_is_not_there(place: Place) -> None:
    """As where an application was packed without it."""
    place.source.unlink()
    (reason,) = native_build.reasons(SPEC)
    assert str(place.source) in reason


def test_compiler_that_is_gone(place: Place) -> None:
    assert native_build.compiler() is not None
    place.cxx.unlink()
    with pytest.raises(RuntimeError, match="cannot be started"):
        native_build.build(SPEC)
    assert place.entries() == []


def test_cancel_ends_every_process(place: Place) -> None:
    place.hold.touch()
    building = native_build.start(SPEC)
    eventually(lambda: place.pids)
    # What the compiler has not removed goes with this folder.
    assert Path((place.root / "temporary").read_text().strip()).parent == place.cache
    building.cancel()
    assert len(place.pids) == 2
    eventually(lambda: not any(map(alive, place.pids)))
    assert place.entries() == [] and building.done()
    with pytest.raises(RuntimeError, match="cancelled"):
        building.finish()


def test_cancel_while_another_thread_waits(place: Place) -> None:
    place.hold.touch()
    building = native_build.start(SPEC)
    eventually(lambda: place.pids)
    failures: list[RuntimeError] = []

    def wait() -> None:
        try:
            building.finish()
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    building.cancel()
    thread.join(30)
    assert len(failures) == 1 and place.entries() == []


def test_threads_finish_one_build(place: Place) -> None:
    building = native_build.start(SPEC)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(building.finish())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [building.path] * 4 and place.compiled == 1


def test_leaving_ends_the_compiler(place: Place) -> None:
    place.hold.touch()
    code = f"""
        native_build.start(spec)
        while not os.path.exists({str(place.root / "pids")!r}):
            time.sleep(0.01)
    """
    child = process(code, place)
    assert output(child) == ""
    eventually(lambda: not any(map(alive, place.pids)))
    assert place.entries() == []


def test_killed_in_the_middle(place: Place) -> None:
    place.hold.touch()
    child = process("native_build.start(spec).finish()", place)
    eventually(lambda: place.pids)
    child.kill()
    child.communicate()
    place.hold.unlink()
    eventually(lambda: not alive(place.pids[0]))
    (left,) = place.cache.iterdir()
    assert left.name.startswith(native_build.WORK_PREFIX) and native_build.find(SPEC) is None
    path = native_build.build(SPEC)
    # Somebody else's build may still be running.
    assert left.exists() and answer(path) == 42
    long_ago = time.time() - 2 * native_build.ABANDONED_AFTER
    os.utime(left, (long_ago, long_ago))
    native_build.start(SPEC).finish()
    assert place.entries() == ["entry"]


def unused_for(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_entries_that_other_versions_no_longer_use(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go when something is built; what is in use, this version's own, and what is no entry stay."""
    stale, used = (native_build.build(SPEC._replace(definitions=(("ANSWER", n),))) for n in (1, 2))
    for path in (stale, used):
        unused_for(path, 1.5 * native_build.UNUSED_AFTER)
    loaded = native_build.load(stale)
    unused_for(stale, 1.5 * native_build.UNUSED_AFTER)
    made = used.stat().st_mtime_ns
    assert native_build.find(SPEC._replace(definitions=(("ANSWER", 2),))) == used
    assert used.stat().st_mtime_ns == made
    # Names as entries have them, and one of somebody else's.
    link, folder = (place.cache / f"{digit * 32}-{digit * 32}-{digit * 32}.so" for digit in "ab")
    link.symlink_to(used)
    folder.mkdir()
    foreign = place.cache / "libforeign.so"
    foreign.touch()
    for path in (link, folder, foreign):
        then = time.time() - 1.5 * native_build.UNUSED_AFTER
        os.utime(path, (then, then), follow_symlinks=False)
    native_build.build(SPEC._replace(definitions=(("ANSWER", 3),)))
    assert stale.exists() and used.exists()
    place.source.write_text(SOURCE + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path: os.unlink("/dev/null/x"))
        own = native_build.build(SPEC)
    assert stale.exists()
    unused_for(own, 1.5 * native_build.UNUSED_AFTER)
    native_build.build(SPEC._replace(definitions=(("ANSWER", 3),)))
    assert not stale.exists() and used.exists() and own.exists() and link.is_symlink() and folder.is_dir()
    assert foreign.exists()
    assert loaded.answer() == 1


# --- several processes ----------------------------------------------------------------------------------------------


def test_two_processes_at_once(place: Place) -> None:
    place.hold.touch()
    children = [process("print(native_build.load(native_build.build(spec)).answer())", place) for _ in range(2)]
    eventually(lambda: place.compiled == 2)
    assert len(list(place.cache.iterdir())) == 2
    place.hold.unlink()
    assert [output(child) for child in children] == ["42", "42"]
    assert place.entries() == ["entry"] and native_build.find(SPEC) is not None


def in_a_fork(function: Callable[[], bool]) -> None:
    """Fails where `function`, in a child process, does not return True."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def held_up(place: Place) -> Building:
    """A build whose compiler waits."""
    place.hold.touch()
    building = native_build.start(SPEC)
    eventually(lambda: place.pids)
    return building


def test_fork_leaves_the_compiler_alone(place: Place) -> None:
    building = held_up(place)

    def child() -> bool:
        building.cancel()
        native_build._leave()
        return not building.done() and building in native_build._RUNNING

    in_a_fork(child)
    assert all(map(alive, place.pids)) and not building.done()
    place.hold.unlink()
    assert answer(building.finish()) == 42 and place.compiled == 1


def test_fork_finds_what_the_parent_finished(place: Place) -> None:
    building = held_up(place)
    reader, writer = os.pipe()

    def child() -> bool:
        if building.done():
            return False
        os.write(writer, b"x")
        eventually(building.done)
        return building.finish() == building.path

    waiting = threading.Thread(target=in_a_fork, args=(child,))
    waiting.start()
    os.read(reader, 1)
    place.hold.unlink()
    building.finish()
    waiting.join(30)
    assert not waiting.is_alive() and place.compiled == 1
    os.close(reader)
    os.close(writer)


def test_fork_builds_what_the_parent_has_not(place: Place) -> None:
    building = held_up(place)

    def child() -> bool:
        place.hold.unlink()
        return answer(building.finish()) == 42 and native_build.find(SPEC) == building.path

    in_a_fork(child)
    assert building.finish() == building.path
    assert place.compiled == 2 and place.entries() == ["entry"]


@pytest.mark.parametrize("held", [True, False])
def test_fork_while_a_thread_finishes(held: bool, place: Place) -> None:
    """The child gets the lock as it is, held for ever."""
    building = held_up(place)
    if held:
        building._lock.acquire()
    in_a_fork(lambda: building.cancel() is None and not building.done())
    if held:
        building._lock.release()
    building.cancel()
    assert place.entries() == []
