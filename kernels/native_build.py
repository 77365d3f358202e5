"""The native engine's shared libraries: compiled by the system's C++ compiler, kept in a folder of the user's own.

A library is one file, an entry: what the compiler made, the sha256 of that, and MAGIC. Loaders ignore what follows a
library, and an entry whose digest is wrong is never loaded: a shortened library would not raise, but kill the process.

An entry is named `<source>-<spec>-<compiler>.so`. The first two stand for the source, the flags, the Spec and the kind
of machine, the last for the compiler, so that a machine without one still finds what another has built from the same
source. No flag depends on the CPU at hand: an entry runs wherever its instruction set does. Entries of other sources
that nobody has used for UNUSED_AFTER go when something is built.

Importing this module runs and creates nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# All of the C++ there is: a file that it includes would not be part of an entry's name.
SOURCE = Path(__file__).with_name("native.cpp")
COMPILERS = ("c++", "g++", "clang++")
# What each instruction set needs of the CPU and asks of the compiler, best first. Never -march=native: an entry would
# need more than its name tells.
_AVX512 = ("-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mavx2", "-mfma", "-mf16c", "-mbmi2")
FLAGS: Mapping[str, tuple[str, ...]] = {
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mbmi2"),
    "neon": (),
    "plain": (),
}
# Never -ffast-math: NaN and infinity have to come out as in the reference.
COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
)
# The last byte is the format's version.
MAGIC = b"AUTOINT\x01"
DIGEST_SIZE = hashlib.sha256().digest_size
WORK_PREFIX = "building-"
# Seconds after which a folder that a build worked in is taken for left behind by a process that was killed.
ABANDONED_AFTER = 24 * 3600
# Seconds after which an entry of another source goes, if no use of it has been noted meanwhile.
UNUSED_AFTER = 90 * 24 * 3600
# An entry's name: the hashes of its source, of what it is, and of the compiler.
ENTRY = re.compile(r"(?:[0-9a-f]{32}-){2}[0-9a-f]{32}\.so")
# Seconds for which an entry's last use is not written down again.
USE_HOLDS = 24 * 3600
# Seconds for which an answer of `reasons` holds: reading the environment alone would take longer than it may.
REASONS_HOLD = 1.0


class Spec(NamedTuple):
    """What one library is built for; a generic one lacks the macros of a shape."""

    isa: str  # a key of FLAGS
    lane_bytes: int  # the width of a vector
    definitions: tuple[tuple[str, int], ...] = ()  # macros


class Compiler(NamedTuple):
    """A C++ compiler that runs."""

    command: tuple[str, ...]
    version: str  # the first line of what it says of itself


class Refused(PermissionError):
    """The cache folder is one that somebody else could have put a library into."""


# --- the machine ----------------------------------------------------------------------------------------------------


def _cpu_features() -> set[str]:
    """The features of an x86 CPU, under Linux's names; empty where they are not known."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
        with contextlib.suppress(OSError):
            return set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.lower().split())
        return set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    return set()


@functools.cache
def isas() -> tuple[str, ...]:
    """The instruction sets that this CPU runs, best first; "plain", the architecture's least, is always the last."""
    # Linux writes avx512_bf16 for what compilers call avx512bf16.
    features = {feature.replace("_", "") for feature in _cpu_features()}
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return tuple(
        isa
        for isa, flags in FLAGS.items()
        if (arm if isa == "neon" else features.issuperset(flag.removeprefix("-m") for flag in flags))
    )


def compiler() -> Compiler | None:
    """The compiler that CXX names, with any arguments, else the first of COMPILERS on PATH that runs; None without."""
    return _compiler(os.environ.get("CXX", ""), os.environ.get("PATH"))


@functools.lru_cache(maxsize=8)
def _compiler(cxx: str, path: str | None) -> Compiler | None:
    for candidate in [cxx] if cxx else COMPILERS:
        # An unmatched quote in CXX is a ValueError.
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            name, *arguments = shlex.split(candidate)
            program = shutil.which(name, path=path)
            if program is not None:
                command = (os.path.abspath(program), *arguments)
                asked = [*command, "--version"]
                answer = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60)
                return Compiler(command, answer.stdout.decode(errors="replace").partition("\n")[0].strip())
    return None


def takes(isa: str) -> bool:
    """Whether the compiler knows an instruction set's flags; True without a compiler, for others may have built."""
    made_by = compiler()
    return made_by is None or _takes(made_by, isa)


@functools.lru_cache(maxsize=32)
def _takes(made_by: Compiler, isa: str) -> bool:
    command = [*made_by.command, *FLAGS[isa], "-x", "c++", "-E", os.devnull, "-o", os.devnull]
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _no_compiler() -> str:
    cxx = os.environ.get("CXX")
    if cxx:
        return f"CXX={cxx!r} is no C++ compiler that runs: correct it, or unset it to have {', '.join(COMPILERS)} tried"
    return f"there is no C++ compiler, none of {', '.join(COMPILERS)} on PATH: install one, or name it in CXX"


# --- the folder -----------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where entries are kept: AUTOINT_FAST_CACHE, else autoint_fast in XDG_CACHE_HOME, else in ~/.cache.

    Raises FileNotFoundError where there is no home folder either.
    """
    named = os.environ.get("AUTOINT_FAST_CACHE")
    if named:
        return Path(named).absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache and os.path.isabs(cache):
        return Path(cache, "autoint_fast")
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        raise FileNotFoundError("there is no home folder to keep libraries in: name a folder in AUTOINT_FAST_CACHE")
    return Path(home, ".cache", "autoint_fast")


def _trusted(status: os.stat_result) -> bool:
    """Whether only this user, or root, who needs no such way in, can have written it."""
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _check(place: Path) -> None:
    """Raises Refused for a folder that others control, another OSError for one that cannot be looked at."""
    status = place.lstat()
    if stat.S_ISLNK(status.st_mode):
        wrong = "is a symbolic link: name the folder itself in AUTOINT_FAST_CACHE"
    elif not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{place} is not a folder")
    elif _trusted(status):
        return
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        wrong = "can be written by others: run chmod go-w on it, or name another folder in AUTOINT_FAST_CACHE"
    else:
        wrong = f"belongs to user {status.st_uid}: name a folder of your own in AUTOINT_FAST_CACHE"
    raise Refused(f"{place} could hold somebody else's code, it {wrong}")


def private(place: Path) -> Path:
    """`place`, created where it is not there, after a look at who controls it.

    Raises PermissionError, more exactly Refused, for a link, a folder of another user's and one that others can write;
    another OSError where it cannot be created.
    """
    try:
        _check(place)
    except FileNotFoundError:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(place)
    return place


def _cache() -> Path | None:
    """The cache folder, None where it cannot be looked at; raises Refused."""
    try:
        place = folder()
        _check(place)
    except Refused:
        raise
    except OSError:
        return None
    return place


# Folders of processes that could not write to the cache: one each, more only where threads raced for it. Those that a
# fork has inherited can be read, but are not this process's to remove.
_SCRATCHES: list[tuple[int, Path]] = []


def _scratch() -> Path:
    """This process's own folder for want of a cache, removed at exit."""
    here = os.getpid()
    if all(pid != here for pid, _ in _SCRATCHES):
        _SCRATCHES.append((here, Path(tempfile.mkdtemp(prefix="autoint_fast-"))))
    return next(path for pid, path in _SCRATCHES if pid == here)


def _sweep(place: Path) -> None:
    """Removes what processes that were killed have left behind, and what other versions no longer use."""
    ours, now = f"{_source()}-", time.time()
    for work in place.glob(f"{WORK_PREFIX}*"):
        with contextlib.suppress(OSError):
            if now - work.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(work, ignore_errors=True)
    for entry in place.glob("*.so"):
        # The folder may be the user's, with other libraries in it.
        if entry.name.startswith(ours) or not ENTRY.fullmatch(entry.name):
            continue
        with contextlib.suppress(OSError):
            status = entry.lstat()
            unused = now - max(status.st_atime, status.st_mtime)
            if unused > UNUSED_AFTER and stat.S_ISREG(status.st_mode):
                # A process that has loaded it keeps what it has.
                entry.unlink()


def _note_use(file: int, status: os.stat_result) -> None:
    """Writes down that an open entry is in use, where that is allowed: many file systems do not do so by themselves."""
    now = time.time_ns()
    if now - status.st_atime_ns > USE_HOLDS * 1e9:
        with contextlib.suppress(OSError):
            # The time of its making stays, which tells the newest.
            os.utime(file, ns=(now, status.st_mtime_ns))


def _work_folder() -> Path:
    """A new folder to build in, inside the one where the entry is to go.

    Raises Refused; any other trouble with the cache leads to this process's own folder.
    """
    try:
        place = private(folder())
        work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=place))
    except Refused:
        raise
    except OSError:
        return Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=_scratch()))
    _sweep(place)
    return work


# --- entries --------------------------------------------------------------------------------------------------------


def _flags(spec: Spec, extra: Sequence[str]) -> list[str]:
    macros = (("AUTOINT_LANE_BYTES", spec.lane_bytes), *spec.definitions)
    return [*COMMON_FLAGS, *FLAGS[spec.isa], *(f"-D{name}={value}" for name, value in macros), *extra]


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _source() -> str:
    return _hash(SOURCE.read_bytes())


def _stem(spec: Spec, extra: Sequence[str]) -> str:
    return f"{_source()}-{_hash(MAGIC, sys.platform, platform.machine(), _flags(spec, extra), tuple(spec))}"


def _name(spec: Spec, made_by: Compiler, extra: Sequence[str]) -> str:
    return f"{_stem(spec, extra)}-{_hash(tuple(made_by))}.so"


def path_of(spec: Spec, made_by: Compiler, extra: tuple[str, ...] = ()) -> Path:
    """Where the cache keeps, or would keep, the entry of `spec` made by a compiler."""
    return folder() / _name(spec, made_by, extra)


def _seal(library: Path) -> None:
    """Makes an entry of what a compiler wrote."""
    # The folder keeps others out, or lets them read where its owner says so.
    library.chmod(0o644)
    digest = hashlib.sha256(library.read_bytes()).digest()
    with library.open("ab") as file:
        file.write(digest + MAGIC)


def _sound(path: Path) -> bool:
    """Whether `path` is a whole entry that nobody else can have written."""
    try:
        # Without waiting for anybody to write, should it be a pipe.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not (stat.S_ISREG(status.st_mode) and _trusted(status)):
                return False
            content = file.read()
            end = len(content) - DIGEST_SIZE - len(MAGIC)
            # Of nothing there is a digest too.
            sound = end > 0 and content[end:] == hashlib.sha256(content[:end]).digest() + MAGIC
            if sound:
                _note_use(file.fileno(), status)
            return sound
    except OSError:
        return False


def _candidates(place: Path, spec: Spec, made_by: Compiler | None, extra: tuple[str, ...]) -> Iterator[Path]:
    if made_by is not None:
        yield place / _name(spec, made_by, extra)
        return
    dated = []
    for path in place.glob(f"{_stem(spec, extra)}-*.so"):
        with contextlib.suppress(OSError):
            dated.append((path.lstat().st_mtime, path))
    yield from (path for _, path in sorted(dated, reverse=True))


def find(spec: Spec, extra: tuple[str, ...] = ()) -> Path | None:
    """The sound entry of `spec` where there is one; never compiles.

    Without a compiler, the newest made by any. Raises PermissionError for a folder that `private` refuses.
    """
    made_by, cache = compiler(), _cache()
    places = [path for _, path in _SCRATCHES] if cache is None else [cache, *(path for _, path in _SCRATCHES)]
    every = (path for place in places for path in _candidates(place, spec, made_by, extra))
    return next(filter(_sound, every), None)


# --- building -------------------------------------------------------------------------------------------------------


class Building:
    """A compiler at work, as `start` gives it; every method may be called from any thread.

    In a process forked off meanwhile it leaves the parent's compiler alone: `done` waits for the parent's entry, and
    `finish` builds anew where that has not come.
    """

    def __init__(self, spec: Spec, extra: tuple[str, ...], made_by: Compiler) -> None:
        self._spec, self._extra = spec, extra
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._outcome: Path | str | None = None  # str: what went wrong
        self._work = _work_folder()
        try:
            # Where the entry goes.
            self.path = self._work.parent / _name(spec, made_by, extra)
            source, library = str(SOURCE), str(self._library)
            self._command = [*made_by.command, *_flags(spec, ()), source, *extra, "-o", library]
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # What a compiler that is killed leaves behind goes with the folder.
                    env={**os.environ, "TMPDIR": str(self._work)},
                    # A group of its own: a compiler is several processes, to be killed together.
                    start_new_session=True,
                )
        except BaseException:
            shutil.rmtree(self._work, ignore_errors=True)
            raise
        _RUNNING.add(self)

    @property
    def _library(self) -> Path:
        return self._work / "library.so"

    @property
    def _log(self) -> Path:
        return self._work / "log"

    def done(self) -> bool:
        """Whether `finish` would not wait for the compiler."""
        if os.getpid() != self._pid:
            return self.path.exists()
        return self._process.poll() is not None

    def finish(self) -> Path:
        """The entry, once the compiler is through.

        Raises RuntimeError with what the compiler said where it failed, or where the build was cancelled.
        """
        if os.getpid() != self._pid:
            return build(self._spec, self._extra)
        with self._lock:
            if self._outcome is None:
                try:
                    self._outcome = self._conclude()
                finally:
                    self._tidy()
            if isinstance(self._outcome, str):
                raise RuntimeError(self._outcome)
            return self._outcome

    def cancel(self) -> None:
        """Ends the compiler; what is finished stays."""
        if os.getpid() != self._pid:
            return
        self._kill()
        with self._lock:
            if self._outcome is None:
                self._outcome = f"the build of {self.path} was cancelled"
                self._tidy()

    def _conclude(self) -> Path | str:
        code = self._process.wait()
        try:
            # Where SIGCHLD is ignored, every exit status is 0.
            if code == 0 and self._library.exists():
                _seal(self._library)
                os.replace(self._library, self.path)
                return self.path
            said = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            said = [str(error)]
        return "\n".join([f"compiling failed ({code}): {shlex.join(self._command)}", *said[-20:]])

    def _kill(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _tidy(self) -> None:
        self._kill()
        shutil.rmtree(self._work, ignore_errors=True)
        _RUNNING.discard(self)


_RUNNING: set[Building] = set()


@atexit.register
def _leave() -> None:
    for building in list(_RUNNING):
        building.cancel()
    for pid, path in _SCRATCHES:
        if pid == os.getpid():
            shutil.rmtree(path, ignore_errors=True)


def start(spec: Spec, extra: tuple[str, ...] = ()) -> Building:
    """A compiler working on the entry of `spec`, with `extra` flags after the source.

    Where the cache cannot be written, the entry goes to a folder of this process's, which is removed at exit.

    Raises RuntimeError without a compiler or where it does not start, PermissionError for a folder that `private`
    refuses.
    """
    made_by = compiler()
    if made_by is None:
        raise RuntimeError(_no_compiler())
    try:
        return Building(spec, extra, made_by)
    except Refused:
        raise
    except OSError as error:
        raise RuntimeError(f"{shlex.join(made_by.command)} cannot be started: {error}") from error


def build(spec: Spec, extra: tuple[str, ...] = ()) -> Path:
    """The entry of `spec`, compiled where there is no sound one. Raises as `start` and `Building.finish` do."""
    return find(spec, extra) or start(spec, extra).finish()


# --- using ----------------------------------------------------------------------------------------------------------

_LOADED: dict[Path, ctypes.CDLL] = {}


def load(path: Path) -> ctypes.CDLL:
    """The library of an entry, loaded once per process.

    Raises RuntimeError for an entry that is not sound, OSError where the system will not load it.
    """
    library = _LOADED.get(path)
    if library is None:
        if not _sound(path):
            raise RuntimeError(f"{path} is damaged, or not this user's alone to write")
        library = _LOADED.setdefault(path, ctypes.CDLL(str(path)))
    return library


_VERDICTS: dict[tuple[tuple[Spec, ...], tuple[str, ...]], tuple[float, list[str]]] = {}


def reasons(*specs: Spec, extra: tuple[str, ...] = ()) -> list[str]:
    """Why none of `specs` can be found or built here; of no specs, why nothing can. Looks again once a second."""
    key, now = (specs, extra), time.monotonic()
    verdict = _VERDICTS.get(key)
    if verdict is None or now >= verdict[0]:
        verdict = _VERDICTS[key] = (now + REASONS_HOLD, _look(specs, extra))
    return verdict[1].copy()


def _look(specs: tuple[Spec, ...], extra: tuple[str, ...]) -> list[str]:
    if os.name != "posix":
        return ["it runs on Linux and macOS only"]
    if not SOURCE.is_file():
        return [f"{SOURCE} is missing, which it is compiled from"]
    try:
        cache = _cache()
        if compiler() is not None:
            return []
        found = any(find(spec, extra) for spec in specs)
        if not specs and cache is not None:
            found = any(cache.glob("*.so"))
    except OSError as error:
        return [str(error)]
    return [] if found else [_no_compiler()]
