"""The passport of a run: what it ran on and what it was asked to do. Nothing secret, nothing unserialisable.

Every part is asked for on its own, and a part that fails says so in its place: a model whose layers have no
configuration, a machine without git or without a driver still trains.
"""

from __future__ import annotations

import functools
import getpass
import math
import operator
import os
import platform
import random
import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import trainrt
from trainrt import doors
from trainrt.determinism import modes
from trainrt.record.digest import digest_all

PACKAGES = ("tensorflow", "keras", "numpy", "tensorboard", "tensorboard-plugin-profile", "nvidia-ml-py", "protobuf")

VARIABLES = (
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "KERAS_BACKEND",
    "KMP_AFFINITY",
    "MALLOC_ARENA_MAX",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED",
    "SLURM_JOB_ID",
    "TF_CUDNN_DETERMINISTIC",
    "TF_CUDNN_USE_AUTOTUNE",
    "TF_DETERMINISTIC_OPS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_FORCE_GPU_ALLOW_GROWTH",
    "TF_GPU_ALLOCATOR",
    "TF_GPU_THREAD_COUNT",
    "TF_GPU_THREAD_MODE",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_USE_LEGACY_KERAS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)
"""Environment variables that change what is computed. Only these are written down: others may hold secrets."""

SECRET = re.compile(r"token|secret|passw|pwd|credential|private|auth|api[-_]?key|access[-_]?key|(^|[-_])key$", re.I)
"""A name like this stands before a secret."""

GIT_TIMEOUT_S = 2.0
LAYERS = 512
"""Most layers that are described."""

_TEXT = 2000
_LAYERS_S = 0.25


class Surroundings:
    """What a fit began in. What takes long, git and the installed packages, is asked on a thread while Keras traces."""

    def __init__(self):
        self._answers: dict[str, Any] = {"start": time.time(), "random_states": _guarded(_random_states)}
        self._thread = threading.Thread(target=self._ask, name="trainrt-surroundings", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        self._answers["git"] = _guarded(_git)
        self._answers["packages"] = _guarded(_packages)
        self._answers["drivers"] = _guarded(_drivers)

    def answers(self) -> dict[str, Any]:
        """What is known; waits for the rest, but not for long."""
        self._thread.join(GIT_TIMEOUT_S)
        return {"git": None, "packages": None, "drivers": None, **self._answers}


def passport(model: keras.Model, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before the first step, as JSON-able values with string keys.

    Args:
      model: A compiled model.
      arguments: The arguments of `fit`; data is described by type and shape, never written down.
    """
    parts: dict[str, Callable[[], Any]] = {
        "trainrt": lambda: trainrt.__version__,
        "host": socket.gethostname,
        "pid": os.getpid,
        "user": _user,
        "command": lambda: masked(sys.argv),
        "directory": os.getcwd,
        "python": platform.python_version,
        "platform": platform.platform,
        "processor": processor,
        "cores": os.cpu_count,
        "versions": lambda: {name: _version(name) for name in PACKAGES},
        "variables": lambda: {name: clean(os.environ[name]) for name in VARIABLES if name in os.environ},
        "devices": lambda: [device(each) for each in tf.config.list_physical_devices()],
        "tensorflow": _tensorflow,
        "strategy": lambda: type(model.distribute_strategy).__name__,
        "replicas": lambda: model.distribute_strategy.num_replicas_in_sync,
        "precision": lambda: keras.config.dtype_policy().name,
        "floatx": keras.config.floatx,
        "seed": modes.seed_of_process,
        "model": lambda: _model(model),
        "optimizer": lambda: _optimizer(model.optimizer),
        "compile": lambda: _compiled(model),
        "fit": lambda: {name: described(value) for name, value in arguments.items()},
    }
    return {name: _guarded(ask) for name, ask in parts.items()}


def weights_digest(model: keras.Model) -> str | None:
    """The digest of all weights, in their order; None before the model is built."""
    try:
        return (
            digest_all(np.asarray(tf.convert_to_tensor(weight.value)) for weight in model.weights)
            if model.built
            else None
        )
    except Exception:  # a weight that is no array of numbers
        return None


def described(value: Any, depth: int = 2) -> Any:
    """A JSON-able description: plain values as they are, arrays by shape, anything else by its type."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, np.generic):
        return described(value.item(), 0)
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        return f"{type(value).__name__} {getattr(value.dtype, 'name', value.dtype)} {_listed(shape)}"
    if depth and isinstance(value, Mapping):
        items = list(value.items())[:64]
        return {str(k): _hidden(str(k), v) or described(v, depth - 1) for k, v in items}
    if depth and isinstance(value, (list, tuple)) and len(value) <= 32:
        return [described(v, depth - 1) for v in value]
    if type(value).__module__ == "trainrt.clip":
        return repr(value)
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else type(value).__name__


def masked(command: Sequence[str]) -> list[str]:
    """A command line whose secrets are three stars.

    >>> masked(["train.py", "--lr=0.1", "--api-key", "abc", "--token=xyz", "WANDB_API_KEY=1", "s3://me:pw@host/x"])
    ['train.py', '--lr=0.1', '--api-key', '***', '--token=***', 'WANDB_API_KEY=***', 's3://***@host/x']
    """
    result, next_is_secret = [], False
    for argument in map(str, command):
        name, equals, value = argument.partition("=")
        if next_is_secret and not argument.startswith("-"):
            result.append("***")
        elif equals and value and _is_secret(name):
            result.append(f"{name}=***")
        else:
            result.append(clean(argument))
        next_is_secret = not equals and argument.startswith("-") and _is_secret(argument)
    return result


def _hidden(name: str, value: Any) -> str | None:
    """Three stars for the value of a name that stands before a secret; None: it is none."""
    texts = value if isinstance(value, (list, tuple)) else (value,)
    return "***" if _is_secret(name) and any(isinstance(text, str | bytes) for text in texts) else None


def _is_secret(name: str) -> bool:
    return bool(SECRET.search(name)) and "tokenizer" not in name.lower() and "num_tokens" not in name.lower()


def clean(text: str) -> str:
    """A text without the user and password of an address, and not too long."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)[:_TEXT]


def essence(error: BaseException | None) -> str:
    """What an error says, without the lines of Python by which TensorFlow leads to a node.

    >>> essence(ValueError("At node a defined at:\\n  File 'x.py', line 1, in f\\n\\nToo large.\\n\\t [[{{node a}}]]"))
    'At node a defined at: Too large.'
    """
    lines = (line for line in str(error).splitlines() if not line.startswith(("  File ", "\t [[")))
    return " ".join(" ".join(lines).replace(" (most recent call last)", "").split())


def _guarded(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def _listed(shape: Any) -> list:
    try:
        return list(shape)
    except (TypeError, ValueError):  # a TensorShape of unknown rank
        return []


# ---------------------------------------------------------------------------------------------- what was asked to train


def _model(model: keras.Model) -> dict[str, Any]:
    weights = list(model.weights)
    trainable = sum(math.prod(w.shape) for w in model.trainable_weights)
    total = sum(math.prod(w.shape) for w in weights)
    layers: list[dict[str, Any]] = []
    _describe_layers(model, "", layers, time.perf_counter() + _LAYERS_S)
    return {
        "name": model.name,
        "class": _class(model),
        "parameters": total,
        "trainable_parameters": trainable,
        "weights": len(weights),
        "layers": layers,
        "outputs": [list(one.shape) for one in getattr(model, "outputs", None) or ()],
    }


def _describe_layers(model: Any, prefix: str, found: list[dict[str, Any]], until: float) -> None:
    """Name, class, weights and configuration of each layer; without the configuration when time has run out."""
    for layer in getattr(model, "layers", ()):
        if len(found) >= LAYERS:
            return
        one: dict[str, Any] = {
            "name": f"{prefix}{layer.name}",
            "class": _class(layer),
            "parameters": sum(math.prod(w.shape) for w in getattr(layer, "weights", ())),
            "trainable": bool(layer.trainable),
            "dtype": _guarded(functools.partial(operator.attrgetter("dtype_policy.name"), layer)),
        }
        nested = getattr(layer, "layers", None)
        if not nested and time.perf_counter() < until:
            one["config"] = _guarded(functools.partial(_config, layer))
        found.append(one)
        if nested and prefix.count("/") < 8:
            _describe_layers(layer, f"{one['name']}/", found, until)


_KNOWN_FROM_ELSEWHERE = ("name", "trainable", "dtype", "batch_shape", "build_config")


def _config(layer: Any) -> dict[str, Any]:
    config = layer.get_config()
    named = {str(k): v for k, v in config.items() if k not in _KNOWN_FROM_ELSEWHERE and v is not None}
    return {name: _hidden(name, value) or _short(value) for name, value in named.items()}


def _short(value: Any) -> Any:
    """An object that Keras serialised, as its class and what it was given."""
    if isinstance(value, Mapping) and "class_name" in value:
        inner = value.get("config")
        given = {k: v for k, v in inner.items() if v is not None and k != "name"} if isinstance(inner, Mapping) else {}
        return {"class": str(value["class_name"]), **described(given, 2)} if given else str(value["class_name"])
    return described(value, 3)


def _optimizer(optimizer: keras.optimizers.Optimizer | None) -> dict[str, Any] | None:
    if optimizer is None:
        return None
    config = _guarded(lambda: described(optimizer.get_config(), depth=4))  # a user's may have none
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return {"class": type(inner).__name__, "name": inner.name, "config": config}


def _compiled(model: keras.Model) -> dict[str, Any]:
    config = _guarded(lambda: model.get_compile_config() or {})
    names = ("loss_weights", "metrics", "weighted_metrics")
    return {
        "loss": described(doors.compiled_loss(model)),
        "jit_compile": bool(model.jit_compile),
        "run_eagerly": bool(model.run_eagerly),
        "steps_per_execution": int(model.steps_per_execution),
        **{name: described(config[name], 4) for name in names if config.get(name) is not None},
    }


def _class(thing: Any) -> str:
    kind = type(thing)
    own = not kind.__module__.startswith("keras.")
    return f"{kind.__module__}.{kind.__qualname__}" if own else kind.__name__


# ------------------------------------------------------------------------------------------------------ what it ran on


def _random_states() -> dict[str, str]:
    """Checksums of the states of Python's and NumPy's generators: two runs from the same states agree in them."""
    python = zlib.crc32(repr(random.getstate()).encode())
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = np.asarray(keys).tobytes() + repr((kind, *rest)).encode()
    return {"python": f"{python:08x}", "numpy": f"{zlib.crc32(state):08x}"}


def _tensorflow() -> dict[str, Any]:
    """Flags of TensorFlow that change what is computed, or how fast."""
    build = dict(tf.sysconfig.get_build_info())
    return {
        "tf32": bool(tf.config.experimental.tensor_float_32_execution_enabled()),
        "deterministic_ops": _deterministic(),
        "jit": described(tf.config.optimizer.get_jit()),
        "run_functions_eagerly": bool(tf.config.functions_run_eagerly()),
        "soft_placement": bool(tf.config.get_soft_device_placement()),
        "inter_op_threads": tf.config.threading.get_inter_op_parallelism_threads(),
        "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "optimizer": described(tf.config.optimizer.get_experimental_options()),
        "build": {name: described(build[name]) for name in ("cuda_version", "cudnn_version") if build.get(name)},
    }


def _deterministic() -> bool | None:
    """Whether op determinism is on. TensorFlow has no public name for it; None where this one is gone."""
    try:
        from tensorflow.python.framework import config

        return bool(config.is_op_determinism_enabled())
    except (ImportError, AttributeError):
        return None


def _git() -> dict[str, Any] | None:
    """Commit and dirtiness of the project of the main script; None where there is none, or git takes too long."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    directory = os.path.dirname(os.path.abspath(main)) if main else os.getcwd()
    # The status neither takes locks nor runs a program that the repository names.
    command = ["git", "-C", directory, "-c", "core.fsmonitor=false"]
    surroundings = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}

    def ask(*words: str) -> str | None:
        answer = subprocess.run(
            [*command, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            env=surroundings,
        )
        return answer.stdout if answer.returncode == 0 else None

    try:
        commit = ask("rev-parse", "HEAD")
        if commit is None:
            return None
        changes = ask("status", "--porcelain", "--untracked-files=no")
        branch = ask("rev-parse", "--abbrev-ref", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    return {
        "commit": commit.strip(),
        "branch": branch.strip() if branch else None,
        "dirty": None if changes is None else bool(changes.strip()),
        "changed": [] if changes is None else [line[3:] for line in changes.splitlines()[:50]],
    }


@functools.cache
def _packages() -> dict[str, str]:
    """Name -> version of everything that is installed."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(str(name), str(distribution.version))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _drivers() -> dict[str, Any] | None:
    """The NVIDIA driver and what it knows of each device; None where TensorFlow has no GPU."""
    if not tf.config.list_physical_devices("GPU"):
        return None
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return {
            "nvidia": _text(pynvml.nvmlSystemGetDriverVersion()),
            "gpus": [
                {
                    "name": _text(pynvml.nvmlDeviceGetName(handle)),
                    "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                }
                for handle in handles
            ],
        }
    finally:
        pynvml.nvmlShutdown()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None


def processor() -> str:
    """The name of the processor."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def device(each) -> str:
    """A physical device by its kind and name."""
    details = tf.config.experimental.get_device_details(each) if each.device_type == "GPU" else {}
    return f"{each.device_type} {details.get('device_name', each.name.rpartition(':')[2])}"
