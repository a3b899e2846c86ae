"""The vocabulary of a record: what is written down of every step, and in which shape.

The device reduces each tensor of interest to a row of *moments*. Norms, means, ratios and shares are arithmetic on
moments, done when somebody reads. Moments merge, so a window of steps is again moments: every step is observed, and
only the stored resolution falls as a run grows.

Legend of shapes, used all over the package:
  P  parameters (trainable weights)     S  subjects (gradient, update, weight and each optimizer slot)
  M  moments                            J  joint sums (and two extremes) of a weight
  T  windows of one or more steps       K  scalars
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

VERSION = 1
"""Version of the record. A reader refuses a newer one with a clear message."""

MOMENTS = ("count", "sum", "sumsq", "absmax", "zeros", "nonfinite", "peak", "trough")
"""Columns of moments. The first six are reduced on the device over one step's tensor; sums and extremes are those of
the finite elements, so that one NaN does not hide the rest. `peak` and `trough` are the largest and smallest `sumsq`
of the steps in the window."""

DEVICE_MOMENTS = MOMENTS[:6]

JOINT_SUMS = (
    "steps",
    "scale",
    "clipped",
    "skipped",
    "gradient_update",
    "rounded",
    "decay",
    "slot_steps",
    "gradient_momentum",
    "momentum_norms",
    "normalized_gradient",
    "under_epsilon",
    "rates",
)
"""Sums over the steps of a window that involve more than one tensor of a weight.

  steps                how often an optimizer was asked to update the weight
  scale, clipped       the clip's scales; steps in which the scale was not 1
  skipped              steps that the optimizer left out since a gradient under loss scaling was not finite
  gradient_update      the inner product of gradient and update
  rounded              elements whose gradient was not zero and that did not change all the same
  decay                squared norm of what weight decay alone took off: (learning rate * weight decay * weight)^2
  slot_steps           steps in which the gradient was held against the slots, for what follows: `SLOTS_EVERY`
  gradient_momentum    the inner product of gradient and the slot "momentum" after the step
  momentum_norms       the product of their norms
  normalized_gradient  (gradient after the clip / divisor)^2 over the elements, the second moment freed of its bias
  under_epsilon        elements whose second moment counts for less than the optimizer's epsilon
  rates                each element's own learning rate, bias correction included

The last three, and the extremes, are of optimizers that divide by the root of a second moment: `update.adaptive`.
`decay` takes the weight after the step for the one before it: off by about twice the update ratio.

NaN: not measured."""

SLOTS_EVERY = 8
"""Roots and quotients cost as much as all other statistics together. So the native kernels hold the gradient against
the slots in the first 8 steps that are observed, and then in every 8th, by the optimizer's own count of its steps; all
else is of every step. Without the kernels this too is of every step."""

JOINT_EXTREMES = ("largest_rate", "smallest_rate")
"""Of the windows' `rates`, the largest and the smallest of any element in any step."""

JOINT = JOINT_SUMS + JOINT_EXTREMES
"""Columns of a record's `joint`."""

EARLIER_JOINTS = {5: ("steps", "scale", "clipped", "gradient_update", "rounded")}
"""Number of columns -> the columns of `joint` in records that were written before there were the others."""

SCALAR = ("mean", "min", "max")
"""Columns of a scalar over a window of steps. The mean is NaN when a step of the window was."""

GRADIENT, UPDATE, WEIGHT = "gradient", "update", "weight"
"""The subjects that every weight has: the gradient handed to the optimizer (before any clip, loss scale divided out),
the weight after the step minus the weight before it, and the weight after the step."""

DISTANCE = "distance"
"""A subject that a run has if it was asked for: the weight after the step minus the weight at the start of the fit."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One trainable weight.

    Attributes:
      path: The Keras path, e.g. `"dense/kernel"`; unique in a roster.
      layer: Path of the layer that owns it, e.g. `"dense"`.
      shape: Its shape.
      dtype: Its dtype, e.g. `"float32"`.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Roster:
    """The names along the axes of a record.

    Attributes:
      parameters: P parameters.
      subjects: S subjects: `gradient`, `update`, `weight`, then the optimizer's slots by their real names.
      scalars: K names of scalars, e.g. `"loss"`, `"learning_rate"`.
    """

    parameters: tuple[Parameter, ...]
    subjects: tuple[str, ...]
    scalars: tuple[str, ...]

    @property
    def paths(self) -> list[str]:
        return [parameter.path for parameter in self.parameters]

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(s for s in self.subjects if s not in (GRADIENT, UPDATE, WEIGHT, DISTANCE))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Roster:
        fields = json.loads(text)
        parameters = tuple(
            Parameter(p["path"], p["layer"], tuple(p["shape"]), p["dtype"]) for p in fields["parameters"]
        )
        return cls(parameters, tuple(fields["subjects"]), tuple(fields["scalars"]))


class Moments:
    """A view of [..., M] float64, columns as in `MOMENTS`, whose attributes have the shape [...].

    A row of NaN was not measured: the loss does not reach the weight, or it has no such slot. It is never zero.

    >>> m = Moments.of(np.array([3.0, 0.0, -4.0, np.nan]))
    >>> float(m.norm), float(m.zero_share), float(m.nonfinite_share)
    (5.0, 0.25, 0.25)
    """

    def __init__(self, array: np.ndarray):
        array = np.asarray(array, np.float64)
        if array.shape[-1:] != (len(MOMENTS),):
            raise ValueError(f"Moments need a last axis of {len(MOMENTS)}, {MOMENTS}. Received: shape {array.shape}.")
        self.array = array

    def __getitem__(self, index) -> Moments:
        return Moments(self.array[index])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape[:-1]

    def _column(self, name: str) -> np.ndarray:
        return self.array[..., MOMENTS.index(name)]

    @property
    def count(self) -> np.ndarray:
        """Elements seen, over all steps of the window."""
        return self._column("count")

    @property
    def finite(self) -> np.ndarray:
        """Finite elements seen."""
        return self.count - self._column("nonfinite")

    @property
    def sum(self) -> np.ndarray:
        """Sum of the finite elements, over all steps of the window."""
        return self._column("sum")

    @property
    def sumsq(self) -> np.ndarray:
        """Sum of the squares of the finite elements, over all steps of the window."""
        return self._column("sumsq")

    @property
    def absmax(self) -> np.ndarray:
        """Largest magnitude of a finite element in the window."""
        return self._column("absmax")

    @property
    def mean(self) -> np.ndarray:
        """Mean of the finite elements."""
        return _divide(self._column("sum"), self.finite)

    @property
    def rms(self) -> np.ndarray:
        """Root of the mean square of the finite elements."""
        return np.sqrt(_divide(self._column("sumsq"), self.finite))

    def norm_over(self, steps) -> np.ndarray:
        """L2 norm of the tensor: root of the mean over `steps` steps of the squared norm."""
        return np.sqrt(_divide(self._column("sumsq"), steps))

    @property
    def norm(self) -> np.ndarray:
        """L2 norm of one step's tensor. For windows of several steps use `norm_over`."""
        return np.sqrt(self._column("sumsq"))

    @property
    def peak_norm(self) -> np.ndarray:
        """The largest L2 norm of any one step in the window."""
        return np.sqrt(self._column("peak"))

    @property
    def trough_norm(self) -> np.ndarray:
        """The smallest L2 norm of any one step in the window."""
        return np.sqrt(self._column("trough"))

    @property
    def zeros(self) -> np.ndarray:
        """Elements that are exactly zero, over all steps of the window."""
        return self._column("zeros")

    @property
    def zero_share(self) -> np.ndarray:
        return _divide(self._column("zeros"), self.count)

    @property
    def nonfinite(self) -> np.ndarray:
        """Elements that are NaN or infinite, over all steps of the window."""
        return self._column("nonfinite")

    @property
    def nonfinite_share(self) -> np.ndarray:
        return _divide(self._column("nonfinite"), self.count)

    @classmethod
    def of(cls, tensor: np.ndarray) -> Moments:
        """Moments of one array, in float64: the twin of what the device measures."""
        x = np.asarray(tensor, np.float64).reshape(-1)
        finite = x[np.isfinite(x)]
        with np.errstate(over="ignore", under="ignore"):
            sumsq = np.square(finite).sum()
        absmax = np.abs(finite).max(initial=0.0)
        return cls(np.array([x.size, finite.sum(), sumsq, absmax, (x == 0).sum(), x.size - finite.size, sumsq, sumsq]))

    @classmethod
    def from_device(cls, rows: np.ndarray) -> Moments:
        """Completes [..., 6] rows of single steps with `peak` and `trough`."""
        sumsq = rows[..., 2:3]
        return cls(np.concatenate([rows, sumsq, sumsq], axis=-1))

    def merge(self, axis: int = 0) -> Moments:
        """The moments of all windows along `axis` together. Rows that were not measured are left out."""
        a = self.array
        axis = axis if axis >= 0 else axis - 1
        unmeasured = np.isnan(a[..., :1])
        low = a
        if unmeasured.any():
            a, low = np.where(unmeasured, 0.0, a), np.where(unmeasured, np.inf, a)  # no moment is below 0
        merged = a.sum(axis=axis)
        for name, extreme, of in (("absmax", np.max, a), ("peak", np.max, a), ("trough", np.min, low)):
            merged[..., MOMENTS.index(name)] = extreme(of[..., MOMENTS.index(name)], axis=axis + (axis < 0))
        return Moments(np.where(unmeasured.all(axis=axis), np.nan, merged))

    def join(self, groups: Sequence[np.ndarray]) -> Moments:
        """The moments of each group of tensors as of one tensor: the weights of a layer in the same steps.

        Differs from `merge` in `peak` and `trough`: the squared norms of one step add. They are exact in windows of one
        step. In wider ones the weights may peak in different steps: `peak` is an upper and `trough` a lower bound.

        Args:
          groups: G non-empty arrays of indices along the last axis.

        Returns:
          [..., G]. A tensor that was not measured is left out of its group.
        """
        if not groups:
            return self[..., :0]
        starts = np.cumsum([0, *map(len, groups[:-1])])
        a = self.array[..., np.concatenate(groups), :]
        measured = ~np.isnan(a[..., :1])
        a = np.where(measured, a, 0.0)
        joined = np.add.reduceat(a, starts, axis=-2)
        absmax, sumsq, peak, trough = (MOMENTS.index(name) for name in ("absmax", "sumsq", "peak", "trough"))
        joined[..., absmax] = np.maximum.reduceat(a[..., absmax], starts, axis=-1)
        for column in (peak, trough):
            joined[..., column] = np.minimum(joined[..., column], joined[..., sumsq])
        return Moments(np.where(np.logical_or.reduceat(measured, starts, axis=-2), joined, np.nan))


@dataclasses.dataclass(eq=False)
class Record:
    """T consecutive windows of steps, all axes named by a roster.

    Attributes:
      steps: [T, 2] int64: first and last step of each window.
      wall_time: [T] float64: seconds since the epoch at which the window's last step had run.
      moments: subject -> [T, P, M] float64.
      joint: [T, P, J] float64, columns as in `JOINT`. NaN: not measured.
      scalars: [T, K, 3] float64, columns as in `SCALAR`.
    """

    steps: np.ndarray
    wall_time: np.ndarray
    moments: dict[str, np.ndarray]
    joint: np.ndarray
    scalars: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, windows: slice) -> Record:
        return Record(
            self.steps[windows],
            self.wall_time[windows],
            {subject: cube[windows] for subject, cube in self.moments.items()},
            self.joint[windows],
            self.scalars[windows],
        )

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.steps, self.wall_time, self.joint, self.scalars, *self.moments.values()))

    def merge(self, every: int | None = None) -> Record:
        """Each `every` consecutive windows as one, by default all of them; `every` must divide T."""
        every = len(self) if every is None else every
        if every == 1:
            return self

        def grouped(array: np.ndarray) -> np.ndarray:
            return array.reshape(-1, every, *array.shape[1:])

        steps, scalars, joint = grouped(self.steps), grouped(self.scalars), grouped(self.joint)
        width = (steps[..., 1] - steps[..., 0] + 1)[..., None]
        with np.errstate(invalid="ignore", over="ignore"):  # inf - inf is NaN, as it should be
            mean = (scalars[..., 0] * width).sum(1) / width.sum(1)
        low, high = np.fmin.reduce(scalars[..., 1], axis=1), np.fmax.reduce(scalars[..., 2], axis=1)
        return Record(
            np.stack([steps[:, 0, 0], steps[:, -1, 1]], axis=1),
            self.wall_time[every - 1 :: every],
            {subject: Moments(grouped(cube)).merge(1).array for subject, cube in self.moments.items()},
            merge_joint(joint),
            np.stack([mean, low, high], axis=-1),
        )

    @classmethod
    def concatenate(cls, records: Sequence[Record]) -> Record:
        """The windows of several records, one after the other."""
        if len(records) == 1:
            return records[0]
        return cls(
            np.concatenate([r.steps for r in records]),
            np.concatenate([r.wall_time for r in records]),
            {s: np.concatenate([r.moments[s] for r in records]) for s in records[0].moments},
            np.concatenate([r.joint for r in records]),
            np.concatenate([r.scalars for r in records]),
        )

    @classmethod
    def empty(cls, roster: Roster) -> Record:
        """No windows, with the shapes of a roster."""
        p, k = len(roster.parameters), len(roster.scalars)
        return cls(
            np.zeros((0, 2), np.int64),
            np.zeros(0),
            {subject: np.zeros((0, p, len(MOMENTS))) for subject in roster.subjects},
            np.zeros((0, p, len(JOINT))),
            np.zeros((0, k, len(SCALAR))),
        )


def merge_joint(joint: np.ndarray) -> np.ndarray:
    """[T, N, P, J] -> [T, P, J]: each N windows as one. What was not measured in some is that of the others."""
    unmeasured = np.isnan(joint)
    merged = np.where(unmeasured.all(1), np.nan, np.nansum(joint, axis=1)) if unmeasured.any() else joint.sum(1)
    for name, reduce in zip(JOINT_EXTREMES, (np.fmax, np.fmin), strict=True):
        merged[..., JOINT.index(name)] = reduce.reduce(joint[..., JOINT.index(name)], axis=1)
    return merged


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What Keras reported at the end of an epoch: `logs` holds the running means, `val_` metrics included.

    Attributes:
      epoch: Index of the epoch, from 0.
      step: Last step of the epoch.
      logs: Metric name -> value.
    """

    epoch: int
    step: int
    logs: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Document:
    """Whatever else is known of a run, as it was known after a step: the data passport, what a trace says, digests.

    Attributes:
      kind: What it is of, e.g. `"data"`: a run keeps all documents of a kind, in order.
      step: The step.
      content: JSON-able, with string keys.
    """

    kind: str
    step: int
    content: Mapping[str, Any]


def unique(names: Iterable[str]) -> list[str]:
    """The names, a number behind each one that came before: two layers may share a path.

    >>> unique(["a", "b", "a"])
    ['a', 'b', 'a#2']
    """
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result


def _divide(numerator, denominator) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator, np.float64) / denominator
