"""Columns of the chunks of a run, each read when somebody asks for it: most readers want a few of all there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainrt.record.vocabulary import JOINT, JOINT_EXTREMES, MOMENTS, Moments

if TYPE_CHECKING:
    from trainrt.record.reading import StoredRecord
    from trainrt.record.vocabulary import Record

MOMENTS_TOGETHER = (("count", "sumsq", "zeros", "nonfinite"), ("peak", "trough"), ("sum",), ("absmax",))
JOINTS_TOGETHER = (
    ("steps", "scale", "clipped", "skipped", "gradient_update", "rounded"),
    ("slot_steps", "under_epsilon", "normalized_gradient"),
    ("decay",),
    ("gradient_momentum", "momentum_norms"),
    ("rates", *JOINT_EXTREMES),
)
"""Columns that are read in one go."""


class Weights:
    """Which weights of the chunks a run has: some of them, or groups of them as one weight each.

    Args:
      count: Weights of the run.
      groups: For each of them its indices along the P of the chunks. None: all, as they are.
      joined: Whether a group is one weight, and not just a place.
    """

    def __init__(self, count: int, groups: Sequence[np.ndarray] | None = None, joined: bool = False):
        self.count, self.groups, self.joined = count, groups, joined

    def of(self, part: np.ndarray, join: Callable) -> np.ndarray:
        """[T, count, columns] of the [T, P, columns] of a chunk."""
        if self.groups is None:
            return part
        return join(part, self.groups) if self.joined else part[:, [int(group[0]) for group in self.groups]]


class Columns:
    """Columns [T, weights.count] of the cubes [T, P, columns] of chunks.

    Args:
      chunks: Records, one after the other.
      weights: Which weights.
      names: Of the columns of a cube.
      together: Those that are read in one go.
      cube: Returns the cube of a chunk.
      join: Makes one weight of each group, [T, P, columns] -> [T, groups, columns].
    """

    def __init__(
        self,
        chunks: Sequence[Record | StoredRecord],
        weights: Weights,
        names: Sequence[str],
        together: Sequence[Sequence[str]],
        cube: Callable[[Any], np.ndarray],
        join: Callable[[np.ndarray, Sequence[np.ndarray]], np.ndarray],
    ):
        self._chunks, self._weights, self._names, self._together = chunks, weights, names, together
        self._cube, self._join = cube, join
        self._known: dict[str, np.ndarray] = {}

    @classmethod
    def of_subject(cls, chunks: Sequence[Record | StoredRecord], weights: Weights, subject: str) -> Columns:
        return cls(chunks, weights, MOMENTS, MOMENTS_TOGETHER, lambda chunk: chunk.moments[subject], _join_moments)

    @classmethod
    def of_joints(cls, chunks: Sequence[Record | StoredRecord], weights: Weights) -> Columns:
        return cls(chunks, weights, JOINT, JOINTS_TOGETHER, lambda chunk: chunk.joint, _join_sums)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._known:
            names = next(names for names in self._together if name in names)
            self._known.update(zip(names, self._read([self._names.index(each) for each in names]), strict=True))
        return self._known[name]

    def _read(self, indices: Sequence[int]) -> np.ndarray:
        """[indices, T, P]: each column in one piece, so that work on it touches no other's memory, and filled in place:
        two copies of a long run would not fit the budget."""
        planes = np.empty((len(indices), sum(map(len, self._chunks)), self._weights.count))
        at = 0
        for chunk in self._chunks:
            part = self._weights.of(self._cube(chunk), self._join)
            for plane, index in zip(planes, indices, strict=True):
                plane[at : at + len(part)] = part[..., index]
            at += len(part)
        return planes


class RunMoments(Moments):
    """Moments [T, P] of a subject of a run, whose columns are read when they are asked for."""

    def __init__(self, column: Callable[[str], np.ndarray]):
        self._read = column

    def _column(self, name: str) -> np.ndarray:
        return self._read(name)

    def __getitem__(self, index) -> RunMoments:
        return RunMoments(lambda name: self._column(name)[index])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.count.shape

    @functools.cached_property
    def array(self) -> np.ndarray:  # type: ignore[override]
        return np.stack([self._column(name) for name in MOMENTS], axis=-1)


def _join_moments(part: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """[T, P, M] -> [T, groups, M]"""
    return Moments(part).join(groups).array


def _join_sums(part: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """[T, P, J] -> [T, groups, J]: steps are the most of any weight, scales, clipped and skipped ones their means."""
    if not groups:
        return part[:, :0]
    starts = np.cumsum([0, *map(len, groups[:-1])])
    part = part[:, np.concatenate(groups)]
    measured = ~np.isnan(part)
    joined = np.add.reduceat(np.where(measured, part, 0.0), starts, axis=1)
    steps = JOINT.index("steps")
    most = np.fmax.reduceat(part[..., steps], starts, axis=1)
    slot_steps = JOINT.index("slot_steps")
    joined[..., slot_steps] = np.fmax.reduceat(part[..., slot_steps], starts, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        for name in ("scale", "clipped", "skipped"):
            joined[..., JOINT.index(name)] *= most / joined[..., steps]
    joined[..., steps] = most
    for name, reduce in zip(JOINT_EXTREMES, (np.fmax, np.fmin), strict=True):
        joined[..., JOINT.index(name)] = reduce.reduceat(part[..., JOINT.index(name)], starts, axis=1)
    return np.where(np.logical_or.reduceat(measured, starts, axis=1), joined, np.nan)
