"""A digest is equal for equal bits, differs for any one bit, and can be summed in any order."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trainrt.record.digest import FIRST, GOLDEN, SECOND, digest, digest_all

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.uint8, np.bool_]
WORD = (1 << 64) - 1


def twin(data: bytes) -> int:
    """The definition, in Python's integers."""
    data += bytes(-len(data) % 8)
    total = 0
    for i in range(len(data) // 8):
        w = int.from_bytes(data[8 * i : 8 * i + 8], "little") + i * int(GOLDEN) & WORD
        w = (w ^ w >> 33) * int(FIRST) & WORD
        w = (w ^ w >> 29) * int(SECOND) & WORD
        total += w ^ w >> 32
    return total & WORD


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 20000)], ids=str)
def test_the_digest_is_its_definition(dtype, shape):
    array = (np.random.default_rng(0).standard_normal(shape) * 100).astype(dtype)
    assert digest(array) == twin(np.asarray(array).tobytes())


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_one_bit_changes_it(data, draw):
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    other = bytearray(data)
    other[bit // 8] ^= 1 << bit % 8
    a, b = np.frombuffer(data, np.uint8), np.frombuffer(bytes(other), np.uint8)
    assert digest(a) != digest(b)
    assert digest_all([a, b]) != digest_all([a, a])


@given(hnp.arrays(np.uint64, st.integers(1, 60)), st.randoms())
def test_words_sum_in_any_order(words, random):
    """Each word's part depends on its place alone: parts taken one by one, in any order, sum to the whole."""
    parts = []
    nothing = [digest(np.zeros(n, np.uint64)) for n in range(len(words) + 1)]
    for i, word in enumerate(words):
        alone = np.zeros(i + 1, np.uint64)
        alone[i] = word
        parts.append(digest(alone) - nothing[i])
    random.shuffle(parts)
    assert sum(parts) & WORD == digest(words)


def test_strided_and_transposed_arrays_count_by_their_elements():
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert digest(a.T) == digest(a.T.copy()) != digest(a)
    assert digest(a[:, ::2]) == digest(a[:, ::2].copy())


def test_the_order_of_tensors_and_an_empty_one_count():
    a, b = np.float32([1.0]), np.float32([2.0])
    assert len({digest_all(x) for x in ([a, b], [b, a], [a], [a, a], [], [a, np.zeros(0)])}) == 6


def test_objects_have_no_digest():
    with pytest.raises(TypeError, match="Encode it to bytes"):
        digest(np.array(["a", None], object))
