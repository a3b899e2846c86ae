"""Switches determinism on, refuses when that comes too late, and writes down what the bits depend on.

TensorFlow's flag is one value of the process, asked by some kernels when they are built, by others when they run, by
Python while a step is traced, and by cuDNN's choice of algorithm the first time it sees a shape. So a process is in one
mode from its first step to its last: what was traced, built or chosen in the fast mode stays fast.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.record.bits import depends_on
from trainrt.record.digest import digest_all

XLA = "xla"
"""The value of `deterministic` that asks for XLA as well."""

NCCL = "Ring"
"""What `NCCL_ALGO` is set to where it is unset: other algorithms may sum in an order that depends on timing."""

DATA_BYTES = 1 << 30
"""Most bytes of arrays that are digested for the passport; takes about 0.7 seconds."""

REMEDY = "Put `trainrt.determinism.enable(seed=...)` in the script's first lines, before the model is built"


@dataclasses.dataclass(frozen=True)
class Mode:
    """What `fit` runs in.

    Attributes:
      enforced: Whether op determinism is on.
      xla: Whether XLA compiles the step though it is on.
      seed: The seed that `fit` was given.
      changes: What was changed for it, and what that costs; a line each.
    """

    enforced: bool = False
    xla: bool = False
    seed: int | None = None
    changes: tuple[str, ...] = ()


_enabled: list[str] = []
"""What `enable` changed in this process."""


def is_enabled() -> bool:
    """Whether TensorFlow's op determinism is on in this process.

    TensorFlow has no public name for the question; without the private one the answer is that of its environment
    variable and of `enable`.
    """
    try:
        from tensorflow.python.framework import config

        return bool(config.is_op_determinism_enabled())
    except (ImportError, AttributeError):
        return bool(_enabled) or os.environ.get("TF_DETERMINISTIC_OPS", "").lower() in ("1", "true")


def enable(seed: int | None = None) -> list[str]:
    """Makes this process deterministic: TensorFlow's ops, all seeds, `tf.data`, NCCL. Call it before anything else.

    Args:
      seed: Seeds Python, NumPy, TensorFlow and Keras. None leaves seeds alone; TensorFlow then raises where an op draws
        without one.

    Returns:
      What was changed and what it costs, a line each.

    Raises:
      RuntimeError: An op has run on a GPU in the fast mode: the kernels and algorithms chosen for it stay.
    """
    if not is_enabled():
        ran = _ran_on_gpu()
        if ran:
            raise RuntimeError(
                "Determinism is for a whole process, from its first op on. "
                f"Received: {ran}. {REMEDY}, or start the process with TF_DETERMINISTIC_OPS=1."
            )
        tf.config.experimental.enable_op_determinism()
        _enabled.append(
            "TensorFlow's op determinism is on: kernels with a fixed order of sums, on a GPU slower ones where these "
            "differ; tf.data keeps its order and runs random maps one after the other"
        )
    if "NCCL_ALGO" not in os.environ:
        os.environ["NCCL_ALGO"] = NCCL
        _enabled.append(f"NCCL_ALGO={NCCL}, here and in child processes: a fixed order of sums between GPUs")
    if seed is not None:
        keras.utils.set_random_seed(checked(seed))
    return list(_enabled)


def enter(model: keras.Model, deterministic: bool | str, seed: int | None) -> Mode:
    """Brings the process into the mode that `fit` was asked for, or refuses.

    Raises:
      RuntimeError: Too late in the process; the message says what to do.
      ValueError: No seed was given, here or before.
    """
    if not deterministic:
        if seed is not None:
            keras.utils.set_random_seed(seed)
        enforced = is_enabled()
        return Mode(enforced, enforced and bool(model.jit_compile), seed)
    refuse(model, seed)
    xla = deterministic == XLA
    if xla:
        _can_use_xla(model)
    jitted = bool(doors.jit_asked_for(model))
    on_before = is_enabled()
    changes = enable(seed)
    if xla:
        doors.set_jit(model, True)
        changes.append("XLA compiles the step, with its own deterministic ops")
    elif jitted or (on_before and _may_have_jit()):
        doors.set_jit(model, False)
        changes.append(
            "XLA is off, as Keras has it in deterministic mode: steps may be slower. "
            f'deterministic="{XLA}" keeps it on where `trainrt determinism check` finds nothing against it'
        )
    if seed is not None:
        changes.append(f"Python, NumPy, TensorFlow and Keras are seeded with {seed}")
    return Mode(True, xla, seed, tuple(changes))


def refuse(model: keras.Model, seed: int | None) -> None:
    """Raises where the training could not be deterministic any more; changes nothing."""
    seeded = seed_of_process() is not None
    if not seeded and seed is None:
        raise ValueError(
            "Deterministic training needs a seed. Received: deterministic=True without seed, and none was set before. "
            "Pass trainrt.fit(..., deterministic=True, seed=1)."
        )
    if not is_enabled():
        traced = doors.traced_functions(model)
        if traced:
            raise RuntimeError(
                "Determinism is for a whole process, from its first step on. "
                f"Received: deterministic=True, but {', '.join(traced)} of {model.name!r} was made in the fast mode, "
                f"and would stay in it. {REMEDY}, or run this training in a process of its own."
            )
        ran = _ran_on_gpu()
        if ran:
            raise RuntimeError(
                f"Determinism is for a whole process, from its first op on. Received: deterministic=True, but {ran}. "
                f"{REMEDY}, or start the process with TF_DETERMINISTIC_OPS=1."
            )
    if not seeded and model.variables:
        raise RuntimeError(
            "Deterministic training starts from weights that can be drawn again. Received: deterministic=True, "
            f"seed={seed!r} for {model.name!r}, whose weights were drawn before a seed was set. {REMEDY}; "
            "keras.utils.set_random_seed(seed) there does as well on a CPU."
        )


def _can_use_xla(model: keras.Model) -> None:
    without = [layer.name for layer in doors.layers_of(model) if not layer.supports_jit]
    if model.run_eagerly or without:
        why = "is compiled with run_eagerly=True" if model.run_eagerly else f"has layers without XLA: {without[:5]}"
        raise ValueError(
            f'deterministic="{XLA}" compiles the step with XLA. Received: a model that {why}. '
            "Pass deterministic=True, which does without."
        )


def seed_of_process() -> int | None:
    """The seed that TensorFlow was given in this process; None: none was."""
    seed = tf.compat.v1.get_seed(1)[0]  # the public way to ask; with an op seed given it counts nothing up
    return None if seed is None or int(seed) == _NO_SEED else int(seed)


_NO_SEED = 87654321
"""What TensorFlow returns as the global seed when none was set."""


def checked(seed: Any) -> int | None:
    """The seed, if it is one."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"`seed` must be an int, or None. Received: seed={seed!r}.")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"`seed` must be from 0 to 2**32 - 1, as NumPy has it. Received: seed={seed}.")
    return seed


def _ran_on_gpu() -> str | None:
    """Which GPU has had memory allocated on it: something has run there."""
    for device in tf.config.list_physical_devices("GPU"):
        name = device.name.removeprefix("/physical_device:")
        try:
            peak = tf.config.experimental.get_memory_info(name)["peak"]
        except (ValueError, RuntimeError):
            continue
        if peak:
            return f"ops have run on {name} in the fast mode, which holds {peak:,} bytes"
    return None


def _may_have_jit() -> bool:
    """Whether Keras would have compiled with XLA by itself: on a machine with a GPU it does."""
    return bool(tf.config.list_physical_devices("GPU"))


# ------------------------------------------------------------------------------------------- what the bits depend on


def passport(mode: Mode, model: keras.Model, known: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the passport of a run: the mode, and a fingerprint of all that its bits depend on.

    Two runs of the same fingerprint have the same bits, as far as their data is arrays (`data_digest` is None for what
    is read from a pipeline; digests of the batches tell then).

    Args:
      model: The model that trains.
      known: The passport so far.
      arguments: The arguments of `fit`.
    """
    result: dict[str, Any] = {
        "enforced": mode.enforced,
        "xla": mode.xla,
        "seed": mode.seed if mode.seed is not None else known.get("seed"),
        "changes": list(mode.changes),
        "hash_seed": os.environ.get("PYTHONHASHSEED"),
        "cores": _cores(),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
        "model_config": _config_digest(model),
    }
    if mode.enforced:
        result["data_digest"] = data_digest([arguments.get(name) for name in ("x", "y", "sample_weight")])
    result["fingerprint"] = fingerprint({**known, "determinism": result})
    return result


def fingerprint(environment: Mapping[str, Any]) -> str:
    """16 hexadecimal digits over all that the bits of a run depend on."""
    text = json.dumps(depends_on(environment), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _config_digest(model: keras.Model) -> str | None:
    """A digest of the model's configuration; None for a model without, such as most subclasses."""
    try:
        text = json.dumps(model.get_config(), sort_keys=True, default=str)
    except Exception:
        return None
    return hashlib.sha256(re.sub(r"0x[0-9a-fA-F]+", "", text).encode()).hexdigest()[:16]


def data_digest(data: Any) -> str | None:
    """The digest of arrays; None for anything else, and for more of them than `DATA_BYTES`."""
    leaves = [leaf for leaf in keras.tree.flatten(data) if leaf is not None]
    if not leaves or not all(isinstance(leaf, (np.ndarray, tf.Tensor)) for leaf in leaves):
        return None
    try:
        arrays = [np.asarray(leaf) for leaf in leaves]
        return digest_all(arrays) if sum(a.nbytes for a in arrays) <= DATA_BYTES else None
    except Exception:  # strings, objects: what cannot be digested must not end the record
        return None


def _cores() -> int | None:
    """Cores that this process may use: TensorFlow has as many threads where nobody says otherwise."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
