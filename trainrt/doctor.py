"""`trainrt doctor`: what this machine has, which paths a training takes on it, and what to install for more.

Each check asks one thing, and one that fails says so in its place: a doctor that dies tells nothing. The exit status
says for scripts what matters: 0 all is well, 1 it trains but something is missing, 2 it does not train.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import trainrt
from trainrt.banners import without_banners

WELL, MISSING, BROKEN = "ok", "missing", "broken"
STATUSES = {WELL: 0, MISSING: 1, BROKEN: 2}
"""What a check may come to, and the exit status of a doctor whose worst check does."""

KERAS = ((3, 12), (3, 15))
"""The first and the last minor version of Keras whose own tests have passed with `trainrt.fit`."""

NVML_LINES = 8


@dataclasses.dataclass(frozen=True)
class Check:
    """What one thing came to.

    Attributes:
      name: What was looked at.
      status: One of `STATUSES`.
      says: What there is, a line or more.
      remedy: What to do for more; "" when there is nothing to do.
    """

    name: str
    status: str
    says: str
    remedy: str = ""


def examine(require: Sequence[str] = ()) -> list[Check]:
    """Looks at everything.

    Args:
      require: `"gpu"` and `"kernels"` make what is otherwise a matter of speed a fault: their lack is "broken".
    """
    found = []
    for name, ask in _CHECKS.items():
        try:
            check = ask()
        except Exception as error:
            check = Check(name, BROKEN, f"{type(error).__name__}: {error}"[:500], "Please report it with this page.")
        needed = {"gpu": "GPU", "kernels": "kernels"}
        if any(needed[each] == check.name and not check.says.startswith(_HAS[each]) for each in require):
            check = dataclasses.replace(check, status=BROKEN)
        found.append(check)
    return found


_HAS = {"gpu": "TensorFlow sees", "kernels": "built"}
"""How a check that found what may be required begins."""


def status(checks: Sequence[Check]) -> int:
    """The exit status: that of the worst check.

    >>> status([Check("a", "ok", ""), Check("b", "missing", "")])
    1
    """
    return max((STATUSES[check.status] for check in checks), default=0)


def text(checks: Sequence[Check]) -> str:
    """The checks as plain text, to be pasted into a report."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        first, *rest = check.says.splitlines() or [""]
        lines.append(f"{check.status:7}  {check.name:{width}}  {first}")
        lines += [f"{'':7}  {'':{width}}  {line}" for line in rest]
        lines += [f"{'':7}  {'':{width}}  -> {line}" for line in check.remedy.splitlines()]
    lines.append("")
    lines.append(
        {
            0: "All is well.",
            1: "It trains; what is missing above costs speed or sight.",
            2: "Something is broken, see above.",
        }[status(checks)]
    )
    return "\n".join(lines)


def run(as_json: bool = False, require: Sequence[str] = ()) -> int:
    """Prints what was found; returns the exit status."""
    import json

    with without_banners():  # they would stand between the lines that somebody pastes into a report
        checks = examine(require)
    if as_json:
        print(json.dumps({"status": status(checks), "checks": [dataclasses.asdict(c) for c in checks]}, indent=2))
    else:
        print(text(checks))
    return status(checks)


# ---------------------------------------------------------------------------------------------------------- the checks


def _python() -> Check:
    says = f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores"
    return Check("machine", WELL, says)


def _trainrt() -> Check:
    return Check("trainrt", WELL, f"{trainrt.__version__} in {os.path.dirname(trainrt.__file__)}")


def _tensorflow() -> Check:
    import keras
    import tensorflow as tf

    says = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, NumPy {metadata.version('numpy')}"
    if keras.backend.backend() != "tensorflow":
        return Check(
            "TensorFlow",
            BROKEN,
            f"{says}, whose backend is {keras.backend.backend()}",
            "export KERAS_BACKEND=tensorflow",
        )
    version = tuple(int(part) for part in keras.__version__.split(".")[:2])
    if not KERAS[0] <= version <= KERAS[1]:
        first, last = (".".join(map(str, each)) for each in KERAS)
        return Check(
            "TensorFlow",
            MISSING,
            f"{says}; Keras {first} to {last} were checked, this one was not",
            f"pip install 'keras>={first},<={last}.*'",
        )
    return Check("TensorFlow", WELL, says)


def _gpu() -> Check:
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    driver = _driver()
    if devices:
        names = [
            str(tf.config.experimental.get_device_details(device).get("device_name", device.name)) for device in devices
        ]
        return Check("GPU", WELL, f"TensorFlow sees {len(devices)}: {', '.join(names)}\n{driver}")
    if "GPU " not in driver:
        return Check("GPU", WELL, f"none, so the CPU trains ({driver})")
    cuda = dict(tf.sysconfig.get_build_info()).get("cuda_version")
    if not cuda:
        return Check("GPU", MISSING, f"there, but this TensorFlow was built without CUDA\n{driver}",
                     "pip install 'tensorflow[and-cuda]'")  # fmt: skip
    return Check(
        "GPU",
        MISSING,
        f"there, but TensorFlow does not see it\n{driver}",
        f"pip install 'tensorflow[and-cuda]=={tf.__version__}'\n"
        "CUDA_VISIBLE_DEVICES must not hide it; python -c 'import tensorflow as tf; "
        'tf.config.list_physical_devices("GPU")\' prints which library is missing',
    )


def _driver() -> str:
    """What NVML knows: the driver, and a line `GPU n: ...` for each device."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:
        return f"NVML: {str(error) or type(error).__name__}"
    try:
        lines = [f"driver {_decoded(pynvml.nvmlSystemGetDriverVersion())}"]
        for index in range(min(pynvml.nvmlDeviceGetCount(), NVML_LINES)):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = _decoded(pynvml.nvmlDeviceGetName(handle))
            lines.append(f"GPU {index}: {name}, {memory.free >> 20:,} of {memory.total >> 20:,} MiB free")
        return "\n".join(lines)
    finally:
        pynvml.nvmlShutdown()


def _decoded(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _compiler() -> Check:
    from trainrt.update import native

    found = native.status().compiler
    if found:
        return Check("compiler", WELL, found)
    return Check("compiler", MISSING, "no C++ compiler was found", "apt-get install g++, or set CXX")


def _kernels() -> Check:
    from trainrt.update import native

    if native.status().pending and native.status().compiler:
        native.load()
    found = native.status()
    if found.path is not None:
        when = "built" if found.built else "built before"
        return Check("kernels", WELL, f"{when}: {found.path}\n{' '.join(found.flags)}")
    return Check("kernels", MISSING, f"none: {found.reason}", "trainrt kernels build")


def _gpu_kernels() -> Check:
    """Whether updates on a GPU have kernels. They are built where there is a GPU to build them for."""
    import tensorflow as tf

    from trainrt.update import cuda

    there = bool(tf.config.list_physical_devices("GPU"))
    reason = cuda.load() if there else cuda.status().reason
    found = cuda.status()
    if not there:
        return Check("GPU kernels", WELL, f"not needed, as there is no GPU; {found.path or reason}")
    if reason:
        return Check("GPU kernels", MISSING, reason, "trainrt kernels build")
    return Check("GPU kernels", WELL, f"{found.path}\nregistered for GPUs: {', '.join(found.registered)}\n"
                 "each optimizer's is tried against Keras on the GPU before it is used")  # fmt: skip


def _updates() -> Check:
    """Which update each of Keras's optimizers takes for a plain float32 weight."""
    import keras

    from trainrt.update import fused

    paths: dict[str, list[str]] = {}
    for kind in _optimizers():
        variable = keras.Variable([1.0])
        optimizer = kind()
        optimizer.build([variable])
        found = fused.plan(optimizer, [variable])
        why = "one fused pass" if isinstance(found, fused.Fused) else f"Keras's own apply, then measured: {found}"
        paths.setdefault(why if "has no fused update" not in why else "Keras's own apply, then measured", []).append(
            kind.__name__
        )
    return Check("updates", WELL, "\n".join(f"{why}: {', '.join(names)}" for why, names in sorted(paths.items())))


def _optimizers() -> list[type]:
    """The optimizers of Keras that can be made without arguments."""
    import keras

    kinds = {
        kind
        for kind in vars(keras.optimizers).values()
        if isinstance(kind, type)
        and issubclass(kind, keras.optimizers.Optimizer)
        and kind is not keras.optimizers.Optimizer
        and not _required(kind)
    }
    return sorted(kinds, key=lambda kind: kind.__name__)


def _required(kind: type) -> list[str]:
    """The arguments without which none can be made: those of an optimizer around another one."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
    return [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _xla() -> Check:
    import tensorflow as tf

    double = tf.function(lambda x: x * 2, jit_compile=True)
    value = float(double(tf.constant(21.0)))
    if value != 42:
        return Check("XLA", BROKEN, f"21 * 2 compiled to {value}", "train with jit_compile=False")
    return Check("XLA", WELL, "compiles; a step that it compiles keeps Keras's own update")


def _profiler() -> Check:
    missing = [name for name in ("tensorboard", "tensorboard-plugin-profile") if not _version(name)]
    if missing:
        return Check("profiler", MISSING, f"{', '.join(missing)} missing", f"pip install {' '.join(missing)}")
    says = ", ".join(f"{name} {_version(name)}" for name in ("tensorboard", "tensorboard-plugin-profile"))
    return Check("profiler", WELL, says)


def _plugin() -> Check:
    points = {point.name: point for point in metadata.entry_points(group="tensorboard_plugins")}
    if "trainrt" not in points:
        return Check("TensorBoard", MISSING, "the Training page is not registered", "pip install trainrt again")
    points["trainrt"].load()
    module = importlib.import_module("trainrt.plugin.files")
    return Check("TensorBoard", WELL, f"the Training page is registered, {len(module.static_files())} files")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _training() -> Check:
    """Trains a model of two layers for a moment, and reads its record."""
    import contextlib
    import time

    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).standard_normal((64, 4)).astype("float32")
    begun = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        history = trainrt.fit(model, x, x[:, :1], batch_size=8, epochs=2, verbose=0)
    took = time.perf_counter() - begun
    steps = len(history.run)
    if steps != 16 or not np.isfinite(history.run["update_ratio"]).all():
        return Check("training", BROKEN, f"{steps} of 16 steps were recorded", "Please report it with this page.")
    return Check("training", WELL, f"16 steps of a model of 2 layers, each observed, in {took:.1f} s with tracing")


def _clocks() -> Check:
    """What else reads the machine."""
    found = shutil.which("nvidia-smi")
    if not found:
        return Check("nvidia-smi", WELL, "not there; it is not needed")
    answer = subprocess.run([found, "-L"], capture_output=True, text=True, timeout=20)
    return Check("nvidia-smi", WELL, answer.stdout.strip() or answer.stderr.strip()[:200])


_CHECKS: dict[str, Callable[[], Check]] = {
    "machine": _python,
    "trainrt": _trainrt,
    "TensorFlow": _tensorflow,
    "GPU": _gpu,
    "nvidia-smi": _clocks,
    "compiler": _compiler,
    "kernels": _kernels,
    "GPU kernels": _gpu_kernels,
    "updates": _updates,
    "XLA": _xla,
    "profiler": _profiler,
    "TensorBoard": _plugin,
    "training": _training,
}
