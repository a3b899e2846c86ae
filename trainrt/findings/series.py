"""Series that more than one rule reads from a run."""

from __future__ import annotations

import dataclasses

import numpy as np

from trainrt.record.run import Run
from trainrt.record.vocabulary import UPDATE, WEIGHT, Moments


def observed(run: Run, update: Moments) -> np.ndarray:
    """[T] steps of each window whose tensors were measured: fewer than its width when only every n-th was."""
    sizes = np.array([max(parameter.size, 1) for parameter in run.roster.parameters])
    return _reduce(np.fmax, update.count / sizes)


def clip_scale(run: Run) -> np.ndarray:
    """[T] mean factor by which the clip multiplied the gradients; of several weights the smallest. 1 is no clip."""
    return _reduce(np.fmin, run.joint("scale") / run.joint("steps"))


def clipped_share(run: Run) -> np.ndarray:
    """[T] share of the window's steps in which the clip held."""
    return _reduce(np.fmax, run.joint("clipped") / run.joint("steps"))


def kernels(run: Run, weight: Moments) -> np.ndarray:
    """[P] bool: weights whose update ratio means something. A bias or a weight that begins at zero has no size of its
    own to compare with."""
    # A GRU's bias has two rows.
    matrix = np.array([len(p.shape) >= 2 and not p.path.endswith("bias") for p in run.roster.parameters], bool)
    if not len(run.steps):
        return matrix
    # A window of several steps holds the first weights only in its trough; a zero-initialised one has left zero since.
    return matrix & (weight.trough_norm[0] > 0.1 * np.nan_to_num(weight.peak_norm[0]))


def kernel_ratio(update: Moments, weight: Moments) -> np.ndarray:
    """[T, P] update over weight, root mean squares, over the elements that moved: a table of which a batch uses few
    rows is judged by those rows. NaN where nothing moved."""
    moved = 1 - update.zero_share
    return update.rms / (weight.rms * np.sqrt(np.where(moved > 0, moved, np.nan)))


def middle(values: np.ndarray) -> np.ndarray:
    """[T] medians of [T, P], NaN left out; NaN where a row has nothing else.

    >>> middle(np.array([[3.0, np.nan, 1.0, 2.0], [4.0, np.nan, 1.0, np.nan], [np.nan] * 4]))
    array([2. , 2.5, nan])
    """
    if not values.shape[1]:
        return np.full(len(values), np.nan)
    # NaN comes last. np.nanmedian is ten times slower.
    order, count = np.sort(values, axis=1), (~np.isnan(values)).sum(axis=1)
    row = np.arange(len(values))
    low, high = order[row, np.maximum(count - 1, 0) // 2], order[row, np.minimum(count // 2, values.shape[1] - 1)]
    return np.where(count > 0, (low + high) / 2, np.nan)


def percentile(values: np.ndarray, q: float, weights: np.ndarray | None = None) -> float:
    """The q-th percentile (0 to 100) of the finite values, each as often as its weight says; NaN if there are none.

    >>> percentile(np.array([1.0, np.nan, 2.0, 9.0]), 50)
    2.0
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    keep = np.isfinite(values) & (weights > 0)
    if not keep.any():
        return float("nan")
    values, weights = values[keep], weights[keep]
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, q / 100 * reached[-1])])


@dataclasses.dataclass(frozen=True)
class Trend:
    """How the loss went, in levels that one batch cannot move.

    Attributes:
      first: Level over the first tenth of the steps.
      last: Level over the last fifth of the steps.
      best: Lowest level of any tenth.
      worst: Highest level of any tenth, infinite values left out.
      start: Mean of the first window, a single batch when the windows are single steps.
      noise: Spread of a window around the trend, as a standard deviation (1.4826 MAD of the differences).
    """

    first: float
    last: float
    best: float
    worst: float
    start: float
    noise: float

    @property
    def fall(self) -> float:
        """Share of the first level that the loss has lost; negative when it rose."""
        return (max(self.first, self.start) - self.last) / max(abs(self.first), abs(self.start), 1e-300)


def loss_trend(run: Run) -> Trend:
    """The trend of the batch loss."""
    return run.memo("loss_trend", lambda: _loss_trend(run))


def _loss_trend(run: Run) -> Trend:
    loss = scalar(run, "loss")
    if not len(loss):
        return Trend(*[float("nan")] * 6)
    width = (run.steps[:, 1] - run.steps[:, 0] + 1).astype(float)
    tenths = [part for part in np.array_split(np.arange(len(loss)), min(10, len(loss))) if len(part)]
    levels = np.array([percentile(loss[part], 50, width[part]) for part in tenths])
    steps = np.diff(loss[np.isfinite(loss)])
    # Differences of neighbours hold the noise twice and the trend hardly at all.
    noise = 1.4826 * percentile(np.abs(steps - percentile(steps, 50)), 50) / np.sqrt(2) if len(steps) else 0.0
    known = levels[np.isfinite(levels)]
    if not len(known):
        nan = float("nan")
        return Trend(nan, nan, nan, nan, nan, nan)
    finite = loss[np.isfinite(loss)]
    tail = slice(-max(1, len(loss) // 5), None)
    last = percentile(loss[tail], 50, width[tail])
    return Trend(known[0], last, known.min(), known.max(), float(finite[0]), float(np.nan_to_num(noise)))


def pace(run: Run) -> tuple[float, float]:
    """Median update ratio of kernels, and how far all updates went, end to end."""
    return run.memo("pace", lambda: _pace(run))


def _pace(run: Run) -> tuple[float, float]:
    update, weight = run.moments(UPDATE), run.moments(WEIGHT)
    matrices = np.flatnonzero(kernels(run, weight))
    if not len(matrices):
        return float("nan"), float("nan")
    typical = middle(kernel_ratio(update[:, matrices], weight[:, matrices]))
    width = run.steps[:, 1] - run.steps[:, 0] + 1
    return percentile(typical, 50, width.astype(float)), float(np.nansum(typical * width))


def falls_late(run: Run) -> bool:
    """Whether the loss still falls in the second half, by a twentieth and beyond its noise: a run that needs time."""
    loss = scalar(run, "data_loss") if np.isfinite(scalar(run, "data_loss")).any() else scalar(run, "loss")
    if len(loss) < 20:
        return False
    quarters = [percentile(part, 50) for part in np.array_split(loss, 4)]
    fall = quarters[1] - quarters[3]
    noise = loss_trend(run).noise / np.sqrt(len(loss) / 4)
    return bool(fall > max(4 * noise, 0.05 * abs(quarters[1])))


def _reduce(function: np.ufunc, values: np.ndarray) -> np.ndarray:
    """[T] of [T, P], NaN left out; NaN where a window has nothing else."""
    return function.reduce(values, axis=1) if values.shape[1] else np.full(len(values), np.nan)


def scalar(run: Run, name: str, column: str = "mean") -> np.ndarray:
    """[T] of a scalar; all NaN where the run has no such scalar."""
    return run.scalar(name, column) if name in run.roster.scalars else np.full(len(run.steps), np.nan)


def penalty(run: Run) -> np.ndarray:
    """[T] what is in the loss beside the data's part: regularisers, and what layers add; NaN where there is neither."""
    parts = np.stack([scalar(run, "regularization_loss"), scalar(run, "added_loss")])
    return np.where(np.isnan(parts).all(axis=0), np.nan, np.nansum(parts, axis=0))
