"""Which steps share a window, so that a record of any length stays within a budget and no step is missing in it.

Windows widen as the run grows. What is abnormal keeps its full resolution: a step with something that is not finite, or
whose loss or gradient norm leaps above those before it, and the steps around it.
"""

from __future__ import annotations

import numpy as np

from trainrt.record.vocabulary import JOINT, MOMENTS, SCALAR, Record, Roster

BUDGET_BYTES = 256 << 20
"""How large a record may grow unless `fit` is told otherwise."""

DOUBLINGS = 24
"""Widths that the budget is shared among: more steps than anybody trains."""

APART = 8
"""Of the windows of a width, one in so many is kept for what is abnormal."""

AROUND = 2
"""Steps before and after something abnormal that keep their full resolution too."""

HISTORY, LEAST, SIGMAS = 128, 64, 6.0
"""A spike is so many robust standard deviations above the median of the last steps, when there are at least `LEAST`."""

WATCHED = ("loss", "gradient_norm")
_BLOCK, _AHEAD = 16, 64


class Windows:
    """Merges steps into windows.

    The first `per_width` windows hold one step, the next as many hold two, then four, and so on. Each width allows
    `per_width / APART` windows more for what is abnormal.

    Args:
      roster: Of the records.
      budget_bytes: About how large the record may grow.
    """

    def __init__(self, roster: Roster, budget_bytes: int):
        p = len(roster.parameters)
        size = p * (len(roster.subjects) * len(MOMENTS) * 4 + len(JOINT) * 8) + len(roster.scalars) * 24 + 400
        self.per_width = int(np.clip(budget_bytes * APART // ((APART + 1) * DOUBLINGS * size), 16, 1024))
        self._width = 1
        self._left = self.per_width
        self._apart = self.per_width // APART
        self._after = 0
        self._pending: Record | None = None
        self._spikes = [_Spikes(roster.scalars.index(name)) for name in WATCHED if name in roster.scalars]

    def add(self, record: Record) -> list[Record]:
        """Takes windows of one step; returns what is complete by now."""
        special = _nonfinite(record)
        for spikes in self._spikes:
            special |= spikes.of(record)
        done, start = [], 0
        for first, stop in self._stretches(special):
            if self._apart <= stop - first:
                break
            done += self._widen(record[start:first])
            before = self._rest(AROUND)
            self._apart -= stop - first + len(before)
            done += [*before, record[first:stop]]
            start = stop
        return done + self._widen(record[start:])

    def rest(self) -> list[Record]:
        """The window that is not full yet."""
        return self._rest(0)

    def _rest(self, apart: int) -> list[Record]:
        """What waits for its window, the last `apart` steps of it by themselves."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        kept = max(len(pending) - apart, 0)
        return [*([pending[:kept].merge()] if kept else []), *([pending[kept:]] if kept < len(pending) else [])]

    def _stretches(self, special: np.ndarray) -> list[tuple[int, int]]:
        """The steps that keep their resolution, first and last excluded: the special ones and those after them."""
        if not self._after and not special.any():
            return []
        wide = np.zeros(len(special) + AROUND, bool)
        wide[: self._after] = True
        for shift in range(AROUND + 1):
            wide[shift : shift + len(special)] |= special
        self._after = int(np.flatnonzero(wide[len(special) :])[-1] + 1) if wide[len(special) :].any() else 0
        edges = np.flatnonzero(np.diff(wide[: len(special)].astype(np.int8), prepend=0, append=0))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

    def _widen(self, record: Record) -> list[Record]:
        done = []
        while len(record):
            if self._pending is not None:
                record, self._pending = Record.concatenate([self._pending, record]), None
            windows = min(len(record) // self._width, self._left)
            if not windows:
                self._pending = record
                break
            done.append(record[: windows * self._width].merge(self._width))
            record = record[windows * self._width :]
            self._left -= windows
            if not self._left:
                self._width, self._left = self._width * 2, self.per_width
                self._apart += self.per_width // APART
        return done


class _Spikes:
    """Finds the steps whose scalar leaps above those before. A spike is kept out of the history that later ones are
    judged by, unless most of a stretch leapt: then the level has changed."""

    def __init__(self, column: int):
        self._column = column
        self._seen = np.zeros(0)

    def of(self, record: Record) -> np.ndarray:
        """[T] bool."""
        values = record.scalars[:, self._column, SCALAR.index("mean")]
        result = np.zeros(len(values), bool)
        at = 0
        while at < len(values):
            at += self._calm(values[at : at + _AHEAD * _BLOCK])
            block = values[at : at + _BLOCK]
            over = block > (_limits(self._seen) if len(self._seen) >= LEAST else np.inf)
            result[at : at + _BLOCK] = over
            accepted = block if 2 * over.sum() > len(block) else block[~over]
            self._seen = np.concatenate([self._seen, accepted[np.isfinite(accepted)]])[-HISTORY:]
            at += _BLOCK
        return result

    def _calm(self, values: np.ndarray) -> int:
        """How many of the values come before the first block with a spike, asked of all blocks at once."""
        if len(self._seen) < HISTORY or len(values) <= _BLOCK or not np.isfinite(values).all():
            return 0
        history = np.concatenate([self._seen, values])
        before = np.lib.stride_tricks.sliding_window_view(history, HISTORY)[: len(values) : _BLOCK]
        over = values > np.repeat(_limits(before), _BLOCK)[: len(values)]
        calm = int(over.argmax()) // _BLOCK * _BLOCK if over.any() else len(values)
        self._seen = history[calm : calm + HISTORY]
        return calm


def _limits(seen: np.ndarray) -> np.ndarray:
    """What is a spike after the finite [..., n] values that were seen."""
    median = _median(seen)
    spread = 1.4826 * _median(np.abs(seen - median[..., None]))
    return median + SIGMAS * np.maximum(spread, 1e-3 * np.abs(median))


def _median(values: np.ndarray) -> np.ndarray:
    """Along the last axis of finite values; NumPy's own takes ten times as long for so few."""
    ordered, half = np.sort(values), values.shape[-1] // 2
    return np.asarray(ordered[..., half - (1 - values.shape[-1] % 2) : half + 1].mean(-1))


def _nonfinite(record: Record) -> np.ndarray:
    """[T] whether anything in the window is not finite."""
    column = MOMENTS.index("nonfinite")
    result = np.zeros(len(record), bool)
    for cube in record.moments.values():
        result |= np.nansum(cube[..., column], axis=1) > 0
    return result
