"""What `fit` was asked for beyond Keras's own arguments, checked before anything happens."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import keras

from trainrt import clip as clips
from trainrt import doors
from trainrt.clip import Clip
from trainrt.determinism import modes
from trainrt.determinism.digests import Digests, asked
from trainrt.distribution import replicas
from trainrt.endurance import checkpoint as checkpoints
from trainrt.endurance.checkpoint import Checkpoint
from trainrt.record.windows import BUDGET_BYTES
from trainrt.sinks import Sink

EXPERIMENT_S = 60.0
LEAST_BUDGET = 1 << 20
NONFINITE = ("report", "skip", "stop")
SPIKE = (None, "skip", "stop")
UNGUARDED = ("report", None)
"""What `on_nonfinite` and `on_spike` are when every step is left as it is."""


@dataclasses.dataclass(frozen=True)
class Request:
    """The checked arguments of `fit`.

    Attributes:
      logdir: Directory below which the run writes one of its own; None keeps the run in memory.
      clip: Scales for the gradients, or None.
      every: Observe every n-th step; 0 observes none.
      sinks: More places for the record.
      deterministic: False, True, or "xla": with XLA.
      seed: For all random generators, or None.
      digests: What is digested, or None.
      sum_duplicates: Whether repeated rows of sparse gradients are added up first.
      trace: Steps to trace, the last one excluded; "auto"; None: none.
      checkpoint: Where and when to save the training, or None.
      on_nonfinite, on_spike: What becomes of a step that would poison the training.
      record_budget: About how many bytes the record may grow to.
      distance: Whether to measure how far each weight is from where it started.
      experiment_s: Seconds for an experiment after the training, 0 for none.
    """

    logdir: str | None
    clip: Clip | None
    every: int
    sinks: tuple[Sink, ...]
    deterministic: bool | str = False
    seed: int | None = None
    digests: Digests | None = None
    sum_duplicates: bool = False
    trace: tuple[int, int] | str | None = None
    checkpoint: Checkpoint | None = None
    on_nonfinite: str = "report"
    on_spike: str | None = None
    record_budget: int = BUDGET_BYTES
    distance: bool = False
    experiment_s: float = 0.0


def check(
    model: Any,
    *,
    logdir: Any,
    clip: Any,
    observe: Any,
    deterministic: Any,
    trace: Any,
    on_nonfinite: Any,
    on_spike: Any = None,
    sinks: Any,
    seed: Any = None,
    digests: Any = None,
    sum_duplicates: Any = False,
    checkpoint: Any = None,
    record_budget: Any = BUDGET_BYTES,
    distance: Any = False,
    experiment: Any = False,
) -> Request:
    """Checks the model and the arguments that are not Keras's.

    Raises:
      TypeError: Not a Keras model, or an argument of the wrong type.
      ValueError: A model that is not compiled, or a value out of range or in conflict with another.
      RuntimeError: It is too late in this process for deterministic training.
      NotImplementedError: Asked for something that is not built yet.
    """
    if not doors.is_trainer(model):
        raise TypeError(
            "`trainrt.fit` trains a Keras 3 model on TensorFlow: trainrt.fit(model, x, y, ...). "
            f"Received: model of type {type(model).__module__}.{type(model).__name__}.{_hint(model)}"
        )
    doors.assert_compiled(model)
    replicas.check(model)
    _deterministic(deterministic)
    request = Request(
        _logdir(logdir),
        clips.resolve(clip),
        _every(observe),
        _sinks(sinks),
        deterministic,
        modes.checked(seed),
        asked(digests, bool(deterministic)),
        _sum_duplicates(model, sum_duplicates),
        _trace(trace),
        checkpoints.resolve(checkpoint),
        on_nonfinite,
        on_spike,
        _record_budget(record_budget),
        _distance(model, distance, observe),
        _experiment(model, experiment, observe),
    )
    if request.clip is not None:
        _one_clip(model, request.clip)
    if on_nonfinite not in NONFINITE:
        raise ValueError(f"`on_nonfinite` must be one of {NONFINITE}. Received: on_nonfinite={on_nonfinite!r}.")
    if deterministic:
        modes.refuse(model, request.seed)
    if on_spike not in SPIKE:
        raise ValueError(f"`on_spike` must be one of {SPIKE}. Received: on_spike={on_spike!r}.")
    if (on_nonfinite, on_spike) != UNGUARDED:
        _guardable(model)
    return request


def _hint(model: Any) -> str:
    """What may have been meant by something that is no model."""
    if isinstance(model, type) and issubclass(model, keras.Model):
        return f" That is a class: make a model of it, {model.__name__}(...)."
    if type(model).__module__.partition(".")[0] in ("tf_keras", "tensorflow"):
        return " A model of tf_keras (Keras 2) has to be ported to Keras 3 first."
    return " The model comes first, as in model.fit(x, y)."


def check_trainable(model: keras.Model, request: Request) -> None:
    """Checks that a built model has something to train.

    Keras warns and evaluates its loss over and over. That stays so when nothing of trainrt's own was asked for.

    Raises:
      ValueError: No trainable weights, and a record or a clip was asked for.
    """
    if model.trainable_weights or not doors.has_keras_train_step(model):
        return
    frozen = [layer.name for layer in getattr(model, "layers", ()) if layer.weights and not layer.trainable]
    asked = request.logdir is not None or request.clip is not None or request.sinks
    if asked:
        which = f" Frozen layers: {', '.join(frozen[:5])}." if frozen else ""
        raise ValueError(
            f"The model {model.name!r} has no trainable weights, so there is nothing to fit.{which} "
            "Set `trainable = True` on what should learn, then compile again; or call model.evaluate for its loss."
        )


def check_trace(trace: tuple[int, int] | str | None, total_steps: int | None) -> None:
    """Checks `trace` against the steps of the run, once they are known (None: nobody knows).

    Raises:
      ValueError: The window lies outside the run.
    """
    if trace is None or isinstance(trace, str):
        return
    if total_steps is not None and trace[1] > total_steps:
        raise ValueError(
            f"`trace` must lie within the steps of the run, 0 to {total_steps}. Received: trace={trace!r}. "
            f"For the last ten steps pass trace=({max(total_steps - 10, 0)}, {total_steps})."
        )


def _guardable(model: keras.Model) -> None:
    if doors.makes_own_train_function(model):
        raise ValueError(
            "`on_nonfinite` and `on_spike` stand around the model's train_step. Received: a model with a train "
            "function of its own. Leave them out, or put what is special into train_step."
        )


def _logdir(logdir: Any) -> str | None:
    if logdir is None:
        return None
    if not isinstance(logdir, (str, os.PathLike)) or not os.fspath(logdir):
        raise TypeError(f"`logdir` must be a path, or None to write nothing. Received: logdir={logdir!r}.")
    path = os.fspath(logdir)
    if isinstance(path, bytes):
        raise TypeError(f"`logdir` must be a str or a pathlib.Path. Received: logdir={logdir!r}.")
    return path


def _every(observe: Any) -> int:
    if isinstance(observe, bool):
        return int(observe)
    if not isinstance(observe, int):
        raise TypeError(
            "`observe` must be True (every step), False (off) or an int n (every n-th step). "
            f"Received: observe={observe!r}."
        )
    if observe < 1:
        raise ValueError(f"`observe` must be at least 1; to switch it off pass observe=False. Received: {observe}.")
    return observe


def _sum_duplicates(model: keras.Model, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"`sum_duplicates` must be True or False. Received: sum_duplicates={value!r}.")
    if value and model.distribute_strategy.num_replicas_in_sync > 1:
        raise NotImplementedError(
            "`sum_duplicates=True` is not built for several replicas yet. Until it is: one-hot inputs to a Dense layer."
        )
    return value


def _distance(model: keras.Model, value: Any, observe: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"`distance` must be True or False. Received: distance={value!r}.")
    if value and observe is False:
        raise ValueError("`distance=True` measures in observed steps. Received: observe=False. Leave one of them out.")
    if value and replicas.several(model.distribute_strategy):
        raise NotImplementedError("`distance=True` is not built for several replicas yet. Leave it out there.")
    return value


def _experiment(model: keras.Model, value: Any, observe: Any) -> float:
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"`experiment` must be True, False, or seconds. Received: experiment={value!r}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`experiment` must be a number of seconds that is not negative. Received: {value!r}.")
    if value and observe is False:
        raise ValueError("`experiment` judges findings. Received: observe=False, which finds nothing. Leave one out.")
    if value and replicas.several(model.distribute_strategy):
        raise NotImplementedError("`experiment` is not built for several replicas. Call trainrt.explain on one device.")
    return EXPERIMENT_S if value is True else float(value)


def _record_budget(budget: Any) -> int:
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"`record_budget` must be an int, bytes. Received: record_budget={budget!r}.")
    if budget < LEAST_BUDGET:
        raise ValueError(
            f"`record_budget` must be at least {LEAST_BUDGET} bytes (1 MiB). Received: record_budget={budget}. "
            "For no record at all pass observe=False."
        )
    return budget


def _deterministic(deterministic: Any) -> None:
    if not isinstance(deterministic, bool) and deterministic != modes.XLA:
        raise TypeError(
            f"`deterministic` must be True, False, or {modes.XLA!r} for determinism with XLA. "
            f"Received: deterministic={deterministic!r}."
        )


def _sinks(sinks: Any) -> tuple[Sink, ...]:
    if not isinstance(sinks, Sequence) or isinstance(sinks, (str, bytes)):
        raise TypeError(f"`sinks` must be a list or tuple of sinks. Received: sinks={sinks!r}.")
    for sink in sinks:
        missing = [name for name in ("open", "write", "close") if not callable(getattr(sink, name, None))]
        if missing or isinstance(sink, type):
            what = "is a class, not an object of it" if isinstance(sink, type) else f"has no {', '.join(missing)}"
            raise TypeError(f"A sink is an object with open, write and close. Received: {sink!r}, which {what}.")
    return tuple(sinks)


def _trace(trace: Any) -> tuple[int, int] | str | None:
    if trace is None or (isinstance(trace, str) and trace == "auto"):
        return trace
    pair = isinstance(trace, (tuple, list)) and len(trace) == 2
    if not pair or any(isinstance(step, bool) or not isinstance(step, int) for step in trace):
        raise TypeError(f"`trace` must be a pair of steps (start, stop), or 'auto'. Received: trace={trace!r}.")
    if not 0 <= trace[0] < trace[1]:
        raise ValueError(f"`trace` must be (start, stop) with 0 <= start < stop. Received: trace={trace!r}.")
    return trace[0], trace[1]


def _one_clip(model: keras.Model, clip: Clip) -> None:
    for optimizer in doors.optimizers(model):
        for part in doors.parts(optimizer):
            for name in ("clipnorm", "clipvalue", "global_clipnorm"):
                value = getattr(part, name, None)
                if value:
                    raise ValueError(
                        f"`clip` and the optimizer's own `{name}` would clip twice. Received: clip={clip!r}, "
                        f"{type(part).__name__}({name}={value!r}). Keep one; `clip` is the one that is recorded."
                    )
