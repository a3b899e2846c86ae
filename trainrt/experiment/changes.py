"""The single changes that an experiment tries: each is made while a step is traced, and taken back after it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.clip import Clip
from trainrt.experiment.replay import Replay, dealt, pooled, rows_of

CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
STANDARD = (0.3, 0.5, 2.0)
"""Inputs whose mean is within the first of zero, and whose deviation is between the others, are standardised."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing done otherwise.

    Attributes:
      name: What, e.g. `"learning rate x 10"`.
      causes: Ids of `findings.CAUSES` that hold the model back if this moves the loss, likeliest first.
      advice: What to do then.
      make: A context inside of which the change holds, for a `Replay`.
      unless: `Replay` -> why there is nothing to try; None: there is.
      broad: It changes several things at once, so that a narrower change which helps says more.
    """

    name: str
    causes: tuple[str, ...]
    advice: str
    make: Callable[[Replay], Any]
    unless: Callable[[Replay], str | None] = lambda replay: None
    broad: bool = False


def _rate(factor: float):
    @contextlib.contextmanager
    def make(replay: Replay) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for optimizer in doors.optimizers(replay.model):
                for part in doors.parts(optimizer):
                    stack.enter_context(doors.scaled_rate(part, factor))
            yield

    return make


@contextlib.contextmanager
def _no_clip(replay: Replay) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for part in _parts(replay):
            for name in CLIPS:
                stack.enter_context(doors.replaced(part, name, None))
        stack.enter_context(doors.replaced(replay, "clip", None))
        yield


def _clipless(replay: Replay) -> str | None:
    held = replay.clip is not None or any(getattr(part, name, None) for part in _parts(replay) for name in CLIPS)
    return None if held else "nothing is clipped"


def _parts(replay: Replay) -> list:
    return [part for optimizer in doors.optimizers(replay.model) for part in doors.parts(optimizer)]


@contextlib.contextmanager
def _no_regulariser(replay: Replay) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for variable in _regularised(replay):
            stack.enter_context(doors.replaced(variable, "regularizer", None))
        for layer in _penalised(replay):
            stack.enter_context(doors.replaced(layer, "activity_regularizer", None))
        yield


def _regularised(replay: Replay) -> list:
    return [v for v in replay.model.trainable_variables if getattr(v, "regularizer", None) is not None]


def _penalised(replay: Replay) -> list:
    return [la for la in doors.layers_of(replay.model) if getattr(la, "activity_regularizer", None) is not None]


def _penaltyless(replay: Replay) -> str | None:
    return None if _regularised(replay) or _penalised(replay) else "nothing is regularised"


@contextlib.contextmanager
def _no_decay(replay: Replay) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for part in _parts(replay):
            stack.enter_context(doors.replaced(part, "weight_decay", None))
        yield


def _decayless(replay: Replay) -> str | None:
    return None if any(getattr(part, "weight_decay", None) for part in _parts(replay)) else "nothing decays"


@contextlib.contextmanager
def _standardised(replay: Replay) -> Iterator[None]:
    scales = _scales(replay)

    def scaled(batch):
        parts = batch if isinstance(batch, tuple) else (batch,)
        leaves = keras.tree.flatten(parts[0])
        made = [a if s is None else ((a - s[0]) / s[1]).astype(a.dtype) for a, s in zip(leaves, scales, strict=True)]
        x = keras.tree.pack_sequence_as(parts[0], made)
        return (x, *parts[1:]) if isinstance(batch, tuple) else x

    batches, measured = [scaled(batch) for batch in replay.batches], scaled(replay.measured)
    with doors.replaced(replay, "batches", batches), doors.replaced(replay, "measured", measured):
        yield


def _scales(replay: Replay) -> list:
    """For each input of real numbers its mean and deviation, over all rows that are held; None for what are indices."""
    rows = pooled(replay.batches)
    leaves = keras.tree.flatten(rows[0] if isinstance(rows, tuple) else rows)
    found: list[tuple | None] = []
    for leaf in leaves:
        if leaf is None or leaf.dtype.kind != "f":
            found.append(None)
            continue
        # Features of a table have a scale each; places of a picture share theirs, a channel each.
        axes = 0 if leaf.ndim <= 2 else tuple(range(leaf.ndim - 1))
        mean, std = leaf.mean(axes, dtype=np.float64), leaf.std(axes, dtype=np.float64)
        near, low, high = STANDARD
        if np.abs(mean).max() <= near and low <= np.median(std) <= high:
            found.append(None)
        else:
            found.append((mean, np.where(std > 0, std, 1.0)))
    return found


def _standard(replay: Replay) -> str | None:
    return "they are, or are no real numbers" if all(s is None for s in _scales(replay)) else None


@contextlib.contextmanager
def _shuffled(replay: Replay) -> Iterator[None]:
    """The same number of rows, drawn from all over the data."""
    sizes = [rows_of(batch) for batch in replay.batches]
    rows = pooled([*replay.batches, replay.measured])
    order = np.random.RandomState(1).permutation(rows_of(rows))
    order = np.resize(order, sum(sizes))
    with doors.replaced(replay, "batches", dealt(rows, sizes, order)):
        yield


@contextlib.contextmanager
def _another_optimizer(replay: Replay) -> Iterator[None]:
    model = replay.model
    fresh = _alternative(model)
    fresh.build(model.trainable_variables)
    with doors.replaced(model, "optimizer", fresh):
        yield


def _alternative(model: keras.Model) -> keras.optimizers.Optimizer:
    current = next(doors.parts(model.optimizer))
    adaptive = isinstance(current, (keras.optimizers.Adam, keras.optimizers.RMSprop))
    made = keras.optimizers.SGD(0.01, momentum=0.9) if adaptive else keras.optimizers.Adam(0.001)
    if isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        return keras.optimizers.LossScaleOptimizer(made)
    return made


def _own_optimizers(replay: Replay) -> str | None:
    if replay.model.optimizer is None or not doors.has_keras_train_step(replay.model):
        return "the model has a train step, and optimizers, of its own"
    return None


@contextlib.contextmanager
def _float32(replay: Replay) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for layer in doors.layers_of(replay.model):
            stack.enter_context(doors.replaced(layer, "dtype_policy", keras.dtype_policies.get("float32")))
        yield


def _full_precision(replay: Replay) -> str | None:
    layers = doors.layers_of(replay.model)
    if all(layer.compute_dtype in (None, "float32", "float64") for layer in layers):
        return "the model computes in float32"
    if any(v.dtype != "float32" for v in replay.model.trainable_variables):
        return "the weights themselves are not float32; make the model under float32 to try it"
    return None


@contextlib.contextmanager
def _no_dropout(replay: Replay) -> Iterator[None]:
    with doors.without_dropout(replay.model):
        yield


def _dropless(replay: Replay) -> str | None:
    return None if doors.dropouts(replay.model) else "nothing is dropped"


_RATE = "the learning rate; trainrt.lr_range(model, x, y) says how far."

CHANGES = (
    Change(
        "no clip",
        ("clip_too_tight",),
        "Loosen the clip or leave it out: trainrt.fit(..., clip=None).",
        _no_clip,
        _clipless,
    ),
    Change("learning rate x 10", ("lr_too_low",), f"Raise {_RATE}", _rate(10.0)),
    Change("learning rate x 0.1", ("lr_too_high",), f"Lower {_RATE}", _rate(0.1)),
    Change(
        "standardised inputs",
        ("inputs_unnormalised", "inputs_too_small"),
        "Standardise the inputs: keras.layers.Normalization(), adapted to the training data.",
        _standardised,
        _standard,
    ),
    Change(
        "shuffled rows",
        ("unshuffled_data",),
        "Shuffle before batching: shuffle=True for arrays, dataset.shuffle(rows) for a dataset.",
        _shuffled,
    ),
    Change(
        "no regulariser", ("over_regularised",), "Weaken the regulariser to a tenth.", _no_regulariser, _penaltyless
    ),
    Change("no weight decay", ("weight_decay_too_high",), "Weaken the decay to a tenth.", _no_decay, _decayless),
    Change("dropout off", ("dropout_too_high",), "Drop less.", _no_dropout, _dropless),
    Change(
        "another optimizer",
        ("wrong_optimizer", "lr_too_low", "lr_too_high"),  # it brings a learning rate of its own
        "Train with it.",
        _another_optimizer,
        _own_optimizers,
        True,
    ),
    Change(
        "float32",
        ("update_rounding",),
        "Compute in float32, or keep float32 weights under 'mixed_bfloat16'.",
        _float32,
        _full_precision,
    ),
)
"""What is tried, the likeliest and cheapest first: the budget may end before all are."""


@contextlib.contextmanager
def adjustable_rate(replay: Replay) -> Iterator[Callable[[float], None]]:
    """A function that sets the rate of the model's optimizer, whatever it comes from; for what is traced inside."""
    rate = tf.Variable(0.0, trainable=False, dtype=tf.float32)
    with contextlib.ExitStack() as stack:
        for part in doors.parts(replay.model.optimizer):
            stack.enter_context(doors.rate_from(part, lambda: rate.value()))
        yield lambda value: rate.assign(float(value)) and None


def named(name: str) -> Change:
    """The change of a name.

    Raises:
      ValueError: There is none; the message lists them.
    """
    for change in CHANGES:
        if change.name == name:
            return change
    raise ValueError(f"There is no change {name!r}. Those that are: {', '.join(repr(c.name) for c in CHANGES)}.")


def clip_of(clip: Any) -> Clip | None:
    """A `clip` argument of `fit` as what it means."""
    from trainrt import clip as clips

    return clips.resolve(clip)
