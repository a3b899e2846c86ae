"""The ops' GPU kernels: a library of their own, found or built beside that of `native.py`, or why there is none.

It needs a CUDA compiler, and a TensorFlow that was built with CUDA, as the Linux packages are. It is compiled when a
weight is first seen on a GPU, for that GPU, or ahead by `trainrt kernels build --gpu`, then, without a GPU, for
compute capability 8.0 and 9.0 and as PTX of 7.5, which the driver makes into code for any later one. The CUDA runtime
is linked in and asks for the driver when it is first used: the library loads on a machine without a GPU.

**What has not run.** No GPU kernel here has ever run on a GPU: it compiles, loads, registers, and its launch geometry
and arithmetic run on the host (`kernels/shim.h`). So none is trusted. Before the first update on a GPU `parity.py`
tries it there, against Keras's own optimizer on the same GPU, to the bit; when it differs or raises, a warning says
so once and the process keeps to TensorFlow's own ops.

Environment, besides that of `native.py`:
  CUDACXX            the CUDA compiler; else `nvcc` in PATH, below CUDA_HOME, or in /usr/local/cuda.
  TRAINRT_CUDA=0     do not use the library.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainrt import doors
from trainrt.update import native

OPS = ("TrainrtMeasure", "TrainrtObserve", "TrainrtUpdate")

_LOST = "On a GPU, statistics and updates run on TensorFlow's own ops, right but slower."
_ARITHMETIC = ("-O3", "-fmad=false", "-ftz=true", "-prec-div=true", "-prec-sqrt=true")
"""Every operation is rounded, and subnormals of float32 are zero, as in TensorFlow's GPU kernels (`enable_ftz`, and
`-nvptx-prec-divf32=2`, in tensorflow/compiler/mlir/tools/kernel_gen)."""

_ANY = ("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_75,code=compute_75")  # fmt: skip
_HOST = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-w")


@dataclasses.dataclass(frozen=True)
class Status:
    """Where the GPU kernels stand.

    Attributes:
      path: The library, or None if there is none that may be loaded.
      reason: None if the library is there, else one line: why not, and the remedy.
      compiler: The CUDA compiler and its version, or None.
      registered: The ops that TensorFlow has a GPU kernel of in this process.
    """

    path: Path | None
    reason: str | None
    compiler: str | None
    registered: tuple[str, ...]


def registered() -> tuple[str, ...]:
    """Our ops that TensorFlow has a GPU kernel of, in this process."""
    from tensorflow.python.framework import kernels

    return tuple(
        op for op in OPS if any(k.device_type == "GPU" for k in kernels.get_registered_kernels_for_op(op).kernel)
    )


def architectures() -> tuple[str, ...]:
    """What to compile for: the GPUs of this machine, or without one what `_ANY` says."""
    found = set()
    for gpu in tf.config.list_physical_devices("GPU"):
        major, minor = tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))
        if not major:
            return _ANY
        found.add(f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}")
    return tuple(sorted(found)) or _ANY


def build(
    force: bool = False, directory: str | os.PathLike[str] | None = None, flags: Sequence[str] | None = None
) -> Path:
    """Compiles the library, unless it is there.

    Args:
      force, directory: As `native.build` takes them.
      flags: What to compile for, as nvcc takes it; `architectures()` by default.

    Returns:
      The library.

    Raises:
      native.BuildError: No CUDA compiler, no private directory, or a compiler failed.
    """
    if reason := _unable():
        raise native.BuildError(reason)
    cuda, host = _nvcc(), native._compiler()
    assert cuda is not None
    if host is None:
        raise native.BuildError(f"No C++ compiler was found, which nvcc needs. {_LOST} Install g++ or set CXX.")
    flags = architectures() if flags is None else tuple(flags)

    def made(scratch: Path) -> Path:
        return _compile(cuda.path, host.path, flags, scratch)

    return native.publish("gpu", _name(flags), _compilers(cuda, host), made, force, directory)


def load() -> str | None:
    """Loads the kernels, built first if they have to be; None once they are there, else why they are not."""
    if os.environ.get("TRAINRT_CUDA") == "0":
        return f"TRAINRT_CUDA=0. {_LOST} Unset it."
    if native.load() is None:
        return f"the native ops are not there: {native.status().reason}"
    return _load()


def status() -> Status:
    """Where the kernels stand. Builds and loads nothing."""
    cuda = _nvcc()
    path = _search()
    reason = None
    if path is None:
        reason = _unable() or f"They are not built yet; the first run on a GPU builds them, or `{_COMMAND}`."
    if os.environ.get("TRAINRT_CUDA") == "0":
        path, reason = None, f"TRAINRT_CUDA=0. {_LOST} Unset it."
    known = registered() if native.status().path and _load.cache_info().currsize else ()
    return Status(path, reason, f"{cuda.path}, {cuda.version}" if cuda else None, known)


_COMMAND = "trainrt kernels build --gpu"


def on_gpu(variable: Any) -> bool:
    """Whether a weight, a `keras.Variable` or `tf.Variable`, lies on a GPU."""
    return "GPU" in doors.raw(variable).device


def refusal(variables: Sequence[Any]) -> str | None:
    """Why the kernels may not touch these weights, which may all lie on the host; None if they may."""
    there = [on_gpu(v) for v in variables]
    if not any(there):
        return None
    if not all(there):
        return "some weights are on a GPU and some are not"
    return load()


def distrust(key: tuple, trial: Callable[[], str | None]) -> str | None:
    """Tries kernels, once for each key; None if they may be trusted, else why not, which a warning says too.

    Args:
      key: What is tried, for the message and the memory: `(name, device, ...)`.
      trial: Returns None if all agrees, else what does not. What it raises is a reason too.
    """
    if key not in _trials:
        try:
            complaint = trial()
        except Exception as error:  # whatever a kernel that never ran on a GPU does
            complaint = f"{type(error).__name__}: {native.one_line(str(error))}"
        _trials[key] = complaint and f"its GPU kernel failed its trial: {complaint}"
        if complaint:
            warnings.warn(
                f"trainrt's GPU kernels failed their trial ({key[0]} on {key[1]}: {complaint}). {_LOST} "
                "Please report it.",
                RuntimeWarning,
                stacklevel=2,
            )
    return _trials[key]


_trials: dict[tuple, str | None] = {}


@functools.cache
def _load() -> str | None:
    path = _search()
    if path is None:
        try:
            path = build()
        except native.BuildError as error:
            return str(error)
    try:
        tf.load_library(os.fspath(path))
    except (tf.errors.OpError, OSError, RuntimeError) as error:
        return f"{path} does not load ({native.one_line(str(error))}). {_LOST} Run `{_COMMAND} --force`."
    missing = set(OPS) - set(registered())
    return f"{path} registers no GPU kernel of {', '.join(sorted(missing))}. {_LOST}" if missing else None


def _search() -> Path | None:
    cuda, host = _nvcc(), native._compiler()
    compilers = _compilers(cuda, host) if cuda and host else None
    places: list[tuple[Path, str | None]] = []
    if ahead := os.environ.get("TRAINRT_KERNELS"):
        place = Path(ahead)
        places.append((place if place.is_dir() else place.parent, None))
    places.append((native.cache(), compilers))
    for directory, compiler in places:
        for flags in dict.fromkeys((architectures(), _ANY)):
            if found := native.find(directory, "gpu", _name(flags), compiler):
                return found
    return None


def _unable() -> str | None:
    """Why nothing can be built here; None if it can."""
    build = tf.sysconfig.get_build_info()
    if not build.get("is_cuda_build") or build.get("is_rocm_build"):
        return f"This TensorFlow was built without CUDA. {_LOST} pip install 'tensorflow[and-cuda]'."
    if _nvcc() is None:
        return f"No CUDA compiler was found. {_LOST} Install CUDA's nvcc, or set CUDACXX."
    return None


def _nvcc() -> native.Compiler | None:
    places = [os.environ.get("CUDACXX"), "nvcc"]
    places += [os.path.join(home, "bin", "nvcc") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    for place in filter(None, places):
        if path := shutil.which(place):
            return native.describe(path)
    return None


def _compilers(cuda: native.Compiler, host: native.Compiler) -> str:
    return f"{cuda.digest}{host.digest}"


def _name(flags: Sequence[str]) -> str:
    """Digest of all that the library depends on but the compilers; the processor is not a part of it."""
    parts = [native.key("x86-64"), *_ARITHMETIC, *_HOST, *flags]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(nvcc: str, cxx: str, flags: Sequence[str], scratch: Path) -> Path:
    """The launches with nvcc, what binds them to TensorFlow with the host's compiler alone, side by side."""
    sources = native.sources()
    device = ["-std=c++17", f"-ccbin={cxx}", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-w"]
    device += [*_ARITHMETIC, *flags, "-x", "cu", "-c", os.fspath(sources / "device.cu.cc"), "-o", "device.o"]
    bind = [*tf.sysconfig.get_compile_flags(), *_HOST, "-O1"]
    bind += ["-c", os.fspath(sources / "bind_gpu.cc"), "-o", "bind.o"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = [pool.submit(native.run_compiler, path, given, scratch) for path, given in ((nvcc, device), (cxx, bind))]
        for job in jobs:
            job.result()
    place, library = (flag[2:] for flag in tf.sysconfig.get_link_flags())
    link = ["-shared", "-cudart=static", f"-ccbin={cxx}", "-o", "gpu.so", "device.o", "bind.o", f"-L{place}"]
    native.run_compiler(nvcc, [*link, "-Xlinker", f"-l{library}"], scratch)
    return scratch / "gpu.so"
