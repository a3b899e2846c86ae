"""The data set of `trainrt demo`: 1,797 handwritten digits of 8x8 counts, inside the package.

Optical Recognition of Handwritten Digits, E. Alpaydin & C. Kaynak, 1998, CC BY 4.0,
https://doi.org/10.24432/C50P49; see `data/LICENSE-digits.txt`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

PATH = Path(__file__).parent / "data" / "digits.npz"
TEST_SIZE = 360
SEED = 0
"""Of the shuffle before the split: the file is in order of writers, and an unshuffled tail would be people whom the
training part never saw."""


def load() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The digits as `(x_train, y_train), (x_test, y_test)`, the same split every time.

    Returns:
      `x` [N, 8, 8, 1] float32 in 0..1 (the counts 0..16 over 16) and `y` [N] int64 in 0..9, N = 1437 and 360.

    >>> (x_train, y_train), (x_test, y_test) = load()
    >>> x_train.shape, x_test.shape, float(x_train.max())
    ((1437, 8, 8, 1), (360, 8, 8, 1), 1.0)
    """
    with np.load(PATH) as archive:
        x, y = archive["x"], archive["y"]
    # RandomState's stream is frozen by NumPy's policy, a Generator's is not.
    order = np.random.RandomState(SEED).permutation(len(y))
    x = (x[order, :, :, None] / 16).astype(np.float32)
    y = y[order].astype(np.int64)
    return (x[TEST_SIZE:], y[TEST_SIZE:]), (x[:TEST_SIZE], y[:TEST_SIZE])
