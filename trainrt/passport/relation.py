"""How much of the targets each single feature explains, from a bounded sample of rows. NumPy only.

Of numbers it is the squared correlation; of classes the correlation ratio: the variance between the classes' means
over the whole variance, at the best coding of two classes the same thing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ROWS = 1024
"""Most rows that are kept."""

FEATURES = 4096
"""Most features of a row; wider data is not looked at."""

ELEMENTS = 1 << 20
CLASSES = 50
A_BATCH = 512
"""Most rows of one batch."""

LARGEST = 5


class Relation:
    """Pairs of inputs and targets, evenly from the batches of a pass."""

    def __init__(self):
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._stride = 1
        self._seen = 0
        self._unfit = False

    def see(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Rows of one batch, in the same order."""
        if self._unfit or not len(inputs) or inputs.dtype.kind not in "fiub" or targets.dtype.kind not in "fiub":
            self._unfit = True
            return
        features = inputs[0].size
        if not 0 < features <= FEATURES or targets[0].size > CLASSES:
            self._unfit = True
            return
        if self._seen % self._stride == 0:
            step = -(-len(inputs) // A_BATCH)
            self._pairs.append(
                (inputs[::step].reshape(-1, features).copy(), targets[::step].reshape(len(targets[::step]), -1).copy())
            )
            most = min(ROWS, max(ELEMENTS // features, 64))
            while sum(len(x) for x, _ in self._pairs) > most and len(self._pairs) > 1:
                self._pairs = self._pairs[::2]
                self._stride *= 2
        self._seen += 1

    def summary(self) -> dict[str, Any] | None:
        """`largest`: the features that explain most, each with its share; None where there is nothing to compare."""
        pairs = list(self._pairs)
        if (
            self._unfit
            or not pairs
            or len({x.shape[1] for x, _ in pairs}) > 1
            or len({y.shape[1] for _, y in pairs}) > 1
        ):
            return None
        x = np.concatenate([x for x, _ in pairs]).astype(np.float64)
        y = np.concatenate([y for _, y in pairs]).astype(np.float64)
        keep = np.isfinite(x).all(1) & np.isfinite(y).all(1)
        x, y = x[keep], y[keep]
        if len(x) < 32:
            return None
        if y.shape[1] > 1:
            if not ((np.count_nonzero(y, axis=1) == 1).all() and (y.max(1) == 1).all()):
                return None  # several numbers a row
            codes = y.argmax(1)
        else:
            values, codes = np.unique(y[:, 0], return_inverse=True)
            if len(values) > CLASSES or (values != np.floor(values)).any():
                return self._told(_correlation(x, y[:, 0]), len(x))
        if len(x) < 10 * len(np.unique(codes)):
            return None  # chance alone explains a good part
        return self._told(_ratio(x, codes.reshape(-1)), len(x))

    def _told(self, shares: np.ndarray, rows: int) -> dict[str, Any]:
        order = np.argsort(-shares, kind="stable")[:LARGEST]
        largest = [[int(i), float(shares[i])] for i in order]
        return {"rows": rows, "features": len(shares), "largest": largest}


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[features] squared correlation of each with y; 0 where either never changes."""
    x, y = x - x.mean(0), y - y.mean()
    spread = np.square(x).sum(0) * np.square(y).sum()
    return np.square(y @ x) / np.where(spread > 0, spread, np.inf)


def _ratio(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """[features] variance between the classes' means over all of it; 0 where a feature never changes."""
    count = np.bincount(codes)
    known = count > 0
    sums = (codes == np.arange(len(count))[:, None]).astype(np.float64) @ x
    means = sums[known] / count[known][:, None]
    between = (count[known][:, None] * np.square(means - x.mean(0))).sum(0)
    within = np.square(x - x.mean(0)).sum(0)
    return between / np.where(within > 0, within, np.inf)
