"""The passport of a run: what it ran on and what it was asked to do. Nothing secret, nothing unserialisable."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import trainrt
from trainrt import doors

PACKAGES = ("tensorflow", "keras", "numpy", "tensorboard", "tensorboard-plugin-profile", "nvidia-ml-py", "protobuf")

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "KERAS_BACKEND",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "TF_CUDNN_DETERMINISTIC",
    "TF_DETERMINISTIC_OPS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)
"""Environment variables that change what is computed. Only these are written down: others may hold secrets."""


def passport(model: keras.Model, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before the first step, as JSON-able values.

    Args:
      model: A compiled model.
      arguments: The arguments of `fit`; data is described by type and shape, never written down.
    """
    return {
        "trainrt": trainrt.__version__,
        "start": time.time(),
        "host": socket.gethostname(),
        "user": _user(),
        "command": list(sys.argv),
        "directory": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": {name: _version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "devices": [_device(device) for device in tf.config.list_physical_devices()],
        "strategy": type(model.distribute_strategy).__name__,
        "replicas": model.distribute_strategy.num_replicas_in_sync,
        "precision": keras.config.dtype_policy().name,
        "floatx": keras.config.floatx(),
        "model": {"name": model.name, "class": type(model).__name__},
        "optimizer": _optimizer(model.optimizer),
        "compile": {
            "loss": described(doors.compiled_loss(model)),
            "jit_compile": bool(model.jit_compile),
            "run_eagerly": bool(model.run_eagerly),
            "steps_per_execution": int(model.steps_per_execution),
        },
        "fit": {name: described(value) for name, value in arguments.items()},
    }


def _optimizer(optimizer: keras.optimizers.Optimizer | None) -> dict[str, Any] | None:
    if optimizer is None:
        return None
    try:
        config = described(optimizer.get_config(), depth=4)
    except Exception as error:  # a user's optimizer may have a config that cannot be made
        config = {"error": f"{type(error).__name__}: {error}"}
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return {"class": type(inner).__name__, "name": inner.name, "config": config}


def described(value: Any, depth: int = 2) -> Any:
    """A JSON-able description: plain values as they are, arrays by shape, anything else by its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        return f"{type(value).__name__} {getattr(value.dtype, 'name', value.dtype)} {list(shape)}"
    if depth and isinstance(value, Mapping):
        return {str(k): described(v, depth - 1) for k, v in value.items()}
    if depth and isinstance(value, (list, tuple)) and len(value) <= 32:
        return [described(v, depth - 1) for v in value]
    if type(value).__module__ == "trainrt.clip":
        return repr(value)
    return getattr(value, "__name__", None) or type(value).__name__


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


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _device(device) -> str:
    details = tf.config.experimental.get_device_details(device) if device.device_type == "GPU" else {}
    return f"{device.device_type} {details.get('device_name', device.name.rpartition(':')[2])}"
