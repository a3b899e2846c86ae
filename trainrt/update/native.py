"""Finds or builds the library of TensorFlow ops in `kernels/`, or says exactly why not.

The library is compiled on first use, never on import, with the machine's C++ compiler and for its processor, into a
directory that belongs to the user alone. A file is named after all that it depends on and after its own digest:

    ops-<sources, TensorFlow, flags, processor>-<compiler>-<digest of the file>.so
    gpu-<sources, TensorFlow, flags>-<compilers>-<digest of the file>.so               (`cuda.py`)

so that a stale, half-written or foreign file is never loaded, two processes may build at once, and the last step of a
build is one rename. Without the library everything works, on TensorFlow's own ops, and costs more time.

Environment:
  TRAINRT_NATIVE=0   do not use the library.
  TRAINRT_CACHE      directory for what is built here; else `$XDG_CACHE_HOME/trainrt`, else `~/.cache/trainrt`.
  TRAINRT_KERNELS    directory (or file) with a library built ahead, e.g. while an image was made.
  CXX                the C++ compiler.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import tensorflow as tf

_LOST = "Statistics and updates run on TensorFlow's own ops, right but slower."
_ARITHMETIC = ("-O3", "-fno-math-errno", "-fno-trapping-math")
_PENDING = "The library is not built yet; the first run builds it, or `trainrt kernels build`."
_UNITS = {"bind.cc": ("-O1",), "cpu.cc": ("-ffp-contract=off",), "blocks.cc": ("-ffp-contract=fast",)}
"""Each unit's own flags. Updates round after every operation, as TensorFlow's ops do; folds need not."""

_ALWAYS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-w", "-Wno-psabi")
_COMPILE_LIMIT_S = 600


@dataclasses.dataclass(frozen=True)
class Status:
    """Where the library stands.

    Attributes:
      path: The library, or None if there is none that may be loaded.
      built: Whether it was built here, by `build` or by the first `load`, rather than found ready.
      reason: None if the library is there, else one line: why not, what is lost, the remedy.
      compiler: First line of the compiler's version, or None without one.
      flags: What the arithmetic is compiled with.
      key: Digest of all that the library depends on, compiler and itself aside.
    """

    path: Path | None
    built: bool
    reason: str | None
    compiler: str | None
    flags: tuple[str, ...]
    key: str

    @property
    def pending(self) -> bool:
        """Whether the next `load` compiles the library."""
        return self.path is None and self.reason == _PENDING


class BuildError(RuntimeError):
    """The library was not built; the message is one line that names the remedy."""


def sources() -> Path:
    """The directory of the C++ sources: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "_kernels"
    return inside if inside.is_dir() else package.parent / "kernels"


def cache() -> Path:
    """The directory for libraries built here. It may not exist."""
    if root := os.environ.get("TRAINRT_CACHE"):
        return Path(root)
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "trainrt"
    return Path("~/.cache/trainrt").expanduser()


def processor() -> str:
    """The instruction sets of this processor, as the kernel lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return " ".join(sorted(value.split()))
    return f"{platform.machine()} {platform.processor()}"


def key(target: str = "native") -> str:
    """Digest of sources, TensorFlow, flags and processor. `target` is `"native"` or a value for `-march`."""
    digest = hashlib.sha256()
    files = sorted(f for f in sources().rglob("*") if f.suffix in (".h", ".cc"))
    for file in files:
        digest.update(f"{file.relative_to(sources())}\0".encode() + file.read_bytes() + b"\0")
    for part in (
        tf.version.VERSION,
        tf.version.GIT_VERSION,
        *(f for f in tf.sysconfig.get_compile_flags() if not f.startswith("-I")),
        *_flags(target),
        repr((_ALWAYS, _UNITS)),
        platform.machine(),
        processor() if target == "native" else "",
    ):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def build(force: bool = False, target: str = "native", directory: str | os.PathLike[str] | None = None) -> Path:
    """Compiles the library, unless it is there.

    Args:
      force: Compile even if it is there.
      target: `"native"` for this very processor, or a value for the compiler's `-march`, such as `"x86-64-v3"`, for an
        image that runs on others.
      directory: Where to put it; the user's cache by default. `TRAINRT_KERNELS` finds it elsewhere.

    Returns:
      The library.

    Raises:
      BuildError: No compiler, no private directory, or the compiler failed.
    """
    compiler = _compiler()
    if compiler is None:
        raise BuildError(f"No C++ compiler was found. {_LOST} Install g++ or set CXX.")

    def made(scratch: Path) -> Path:
        return _compile(compiler, target, scratch)

    return publish("ops", key(target), compiler.digest, made, force, directory)


def publish(
    kind: str,
    name: str,
    compiler: str,
    make: Callable[[Path], Path],
    force: bool = False,
    directory: str | os.PathLike[str] | None = None,
) -> Path:
    """Compiles a library in a directory of its own and renames it to what it is, unless it is there.

    Args:
      kind, name, compiler: The first parts of the file's name: see the module.
      make: Given an empty directory, makes the library in it.
      force, directory: As `build` takes them.

    Raises:
      BuildError: No private directory, or what `make` raises.
    """
    home = Path(directory) if directory is not None else cache()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{home} cannot be made ({error.strerror}). {_LOST} Set TRAINRT_CACHE.") from error
    if complaint := _distrust(home):
        raise BuildError(f"{complaint} {_LOST} Set TRAINRT_CACHE to a directory of your own.")
    if not force and (found := find(home, kind, name, compiler)):
        return found
    _sweep(home)
    try:
        scratch = Path(tempfile.mkdtemp(prefix="build-", dir=home))
    except OSError as error:
        raise BuildError(f"{home} cannot be written ({error.strerror}). {_LOST} Set TRAINRT_CACHE.") from error
    try:
        library = make(scratch)
        os.chmod(library, 0o755 if directory is not None else 0o700)
        ready = home / f"{kind}-{name}-{compiler}-{_digest(library)}.so"
        os.replace(library, ready)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ready


def clean() -> list[Path]:
    """Removes every library from the user's cache, and what an interrupted build left. Returns what it removed."""
    removed = []
    home = cache()
    if home.is_dir() and not _distrust(home):
        for path in [*home.glob("ops-*.so"), *home.glob("gpu-*.so"), *home.glob("build-*")]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def load() -> ModuleType | None:
    """The ops, built first if they have to be; None if that cannot be done, and `status().reason` says why."""
    if _switched_off():
        return None
    with _lock:
        return _load()[0]


def status() -> Status:
    """Where the library stands. Builds nothing: before the first `load`, `reason` may be that it is not built yet."""
    if _load.cache_info().currsize and not _switched_off():
        return _load()[1]
    compiler = _compiler()
    path, reason = _search(compiler)
    if path is None and reason is None:
        reason = _PENDING
        if compiler is None:
            reason = f"No C++ compiler was found. {_LOST} Install g++ or set CXX."
    return _status(path, False, reason, compiler)


@dataclasses.dataclass(frozen=True)
class Compiler:
    path: str
    version: str
    digest: str


_lock = threading.Lock()


def _switched_off() -> bool:
    return os.environ.get("TRAINRT_NATIVE") == "0"


@functools.cache
def _load() -> tuple[ModuleType | None, Status]:
    compiler = _compiler()
    path, reason = _search(compiler)
    built = False
    if path is None and reason is None:
        try:
            path, built = build(), True
        except BuildError as error:
            reason = str(error)
    if path is None:
        return None, _status(None, False, reason, compiler)
    try:
        return tf.load_op_library(os.fspath(path)), _status(path, built, None, compiler)
    except (tf.errors.OpError, OSError, RuntimeError) as error:
        reason = f"{path} does not load ({one_line(str(error))}). {_LOST} Run `trainrt kernels build --force`."
        return None, _status(None, False, reason, compiler)


def _status(path: Path | None, built: bool, reason: str | None, compiler: Compiler | None) -> Status:
    return Status(path, built, reason, compiler.version if compiler else None, _flags("native"), key())


def _search(compiler: Compiler | None) -> tuple[Path | None, str | None]:
    """A library that may be loaded; or why none may ever be; or neither, if one has to be built."""
    if _switched_off():
        return None, f"TRAINRT_NATIVE=0. {_LOST} Unset it."
    if ahead := os.environ.get("TRAINRT_KERNELS"):
        place = Path(ahead)
        directory = place if place.is_dir() else place.parent
        if complaint := _distrust(directory):
            return None, f"TRAINRT_KERNELS: {complaint} {_LOST}"
        for target in _targets():
            found = find(directory, "ops", key(target), None)
            if found and (place.is_dir() or found == place):
                return found, None
    home = cache()
    if home.is_dir() and not _distrust(home):
        return find(home, "ops", key(), compiler.digest if compiler else None), None
    return None, None


def find(directory: Path, kind: str, name: str, compiler: str | None) -> Path | None:
    """An intact library of that kind and name, by that compiler or, if None, by any; nothing that others may write."""
    if not directory.is_dir() or _distrust(directory):
        return None
    for path in sorted(directory.glob(f"{kind}-{name}-{compiler or '*'}-*.so")):
        if not _distrust(path) and path.stem.rpartition("-")[2] == _digest(path):
            return path
    return None


def _distrust(path: Path) -> str | None:
    """Why nothing is loaded from here: it is another user's, or others may write to it. None if all is well."""
    try:
        facts = path.stat()
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})."
    if facts.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to another user."
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others (mode {stat.S_IMODE(facts.st_mode):o})."
    return None


def _targets() -> Iterator[str]:
    """What a library built ahead may be made for, the best first."""
    yield "native"
    flags = set(processor().split())
    if platform.machine() == "x86_64":
        if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
            yield "x86-64-v4"
        if {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"} <= flags:
            yield "x86-64-v3"
        if {"sse4_2", "ssse3", "popcnt", "cx16"} <= flags:
            yield "x86-64-v2"
        yield "x86-64"
    elif platform.machine() == "aarch64":
        yield "armv8-a"


def _flags(target: str) -> tuple[str, ...]:
    if target == "native" and platform.machine() == "aarch64":
        return (*_ARITHMETIC, "-mcpu=native")
    return (*_ARITHMETIC, f"-march={target}")


def _compiler() -> Compiler | None:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return describe(path)
    return None


@functools.cache
def describe(path: str) -> Compiler | None:
    """The compiler of that path; None if it does not say its version."""
    try:
        version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = version.splitlines() or [""]
    named = next((line for line in lines if ", release " in line), lines[0])  # nvcc says it later
    return Compiler(path, named, hashlib.sha256(version.encode()).hexdigest()[:8])


def _compile(compiler: Compiler, target: str, scratch: Path) -> Path:
    """Compiles the units side by side: the one with TensorFlow's headers takes as long as all the arithmetic."""

    def run(*arguments: str) -> None:
        run_compiler(compiler.path, arguments, scratch)

    def compile_unit(unit: str) -> str:
        flags = tf.sysconfig.get_compile_flags() if unit == "bind.cc" else _flags(target)
        run(*flags, *_ALWAYS, *_UNITS[unit], "-c", os.fspath(sources() / unit), "-o", f"{unit}.o")
        return f"{unit}.o"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_unit, _UNITS))
    run("-shared", "-o", "ops.so", *objects, *tf.sysconfig.get_link_flags())
    return scratch / "ops.so"


def run_compiler(path: str, arguments: Sequence[str], scratch: Path) -> None:
    """Runs a compiler in a directory.

    Raises:
      BuildError: It failed, in one line.
    """
    try:
        subprocess.run(
            [path, *arguments],
            cwd=scratch,
            check=True,
            capture_output=True,
            text=True,
            timeout=_COMPILE_LIMIT_S,
            env={**os.environ, "LC_ALL": "C", "TMPDIR": os.fspath(scratch)},
        )
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        first = one_line(lines[0]) if lines else f"exit status {error.returncode}"
        raise BuildError(f"{path} failed: {first}. {_LOST} Set CXX to another compiler.") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{path} failed: {one_line(str(error))}. {_LOST} Set CXX.") from error


def _sweep(home: Path) -> None:
    """Removes what builds that died left behind."""
    for path in home.glob("build-*"):
        try:
            if time.time() - path.stat().st_mtime > 2 * _COMPILE_LIMIT_S:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]
