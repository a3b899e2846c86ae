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

ELEMENTS = 1 << 19
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
        x = np.concatenate([x for x, _ in pairs])
        wide = x.dtype.itemsize > (4 if x.dtype.kind == "f" else 2)
        x = x.astype(np.float64 if wide else np.float32, copy=False)
        y = np.concatenate([y for _, y in pairs]).astype(np.float64)
        keep = np.isfinite(x).all(1) & np.isfinite(y).all(1)
        if not keep.all():
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
    """[features] squared correlation of each with y; 0 where either never changes. Overwrites x."""
    _centre(x)
    y = y - y.mean()
    length = np.sqrt(np.square(y).sum())
    y = (y / (length if length > 0 else np.inf)).astype(x.dtype)
    return _over(np.square(np.einsum("i,ij->j", y, x)), x)


def _ratio(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """[features] variance between the classes' means over all of it; 0 where a feature never changes. Overwrites x."""
    _centre(x)
    count = np.bincount(codes)
    count = count[count > 0].astype(x.dtype)
    starts = np.cumsum([0, *count[:-1]], dtype=np.int64)
    # Not as a product of matrices: for one so small the threads of BLAS take twenty times its time.
    sums = np.add.reduceat(x[np.argsort(codes, kind="stable")], starts, axis=0)
    return _over((np.square(sums) / count[:, None]).sum(0), x)


def _centre(x: np.ndarray) -> None:
    """Takes the mean of each feature off. The first row goes before it, so that what varies little beside its size
    keeps its digits in float32."""
    x -= x[0].copy()
    x -= x.mean(0)


def _over(part: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[features] part over the squares of the centred x."""
    whole = np.einsum("ij,ij->j", x, x)
    return part / np.where(whole > 0, whole, np.inf)
