"""The digits are those of the source, and the split is fair and always the same."""

import hashlib

import numpy as np
import pytest

from trainrt import digits

SOURCE_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
"""Of scikit-learn's `load_digits().images.astype("uint8")` and `.target.astype("uint8")`, bytes one after the other."""


def _archive():
    with np.load(digits.PATH) as archive:
        return archive["x"], archive["y"]


def test_file_holds_the_source_byte_for_byte():
    x, y = _archive()
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((1797, 8, 8), np.uint8, (1797,), np.uint8)
    assert hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest() == SOURCE_SHA256


def test_file_equals_scikit_learn_where_it_is_installed():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = _archive()
    np.testing.assert_array_equal(x, source.images)
    np.testing.assert_array_equal(y, source.target)


def test_file_is_small_and_its_licence_lies_beside_it():
    assert digits.PATH.stat().st_size < 200_000
    licence = (digits.PATH.parent / "LICENSE-digits.txt").read_text()
    for needed in ("CC BY 4.0", "https://doi.org/10.24432/C50P49", "Alpaydin", "Kaynak", "Changed:"):
        assert needed in licence


def test_split_is_a_partition_of_the_file_with_every_class_on_both_sides():
    (x_train, y_train), (x_test, y_test) = digits.load()
    x, y = _archive()

    def rows(images, labels):
        return sorted(image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True))

    counts = (np.concatenate([x_train, x_test])[..., 0] * 16).astype(np.uint8)
    assert rows(counts, np.concatenate([y_train, y_test])) == rows(x, y)
    assert len(y_test) == digits.TEST_SIZE
    for labels in (y_train, y_test):
        shares = np.bincount(labels, minlength=10) / len(labels)
        assert shares.min() > 0.06
        assert shares.max() < 0.14


def test_load_returns_float32_in_zero_to_one_and_the_same_every_time():
    (x_train, y_train), (x_test, y_test) = digits.load()
    again = digits.load()
    for x in (x_train, x_test):
        assert x.dtype == np.float32
        assert (x.min(), x.max()) == (0.0, 1.0)
    for left, right in zip((x_train, y_train, x_test, y_test), (*again[0], *again[1]), strict=True):
        np.testing.assert_array_equal(left, right)
