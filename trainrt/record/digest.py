"""An exact digest of tensors: equal for equal bits, different for any one bit, and the same in any order of summing.

A tensor's bytes are taken as 64-bit little-endian words w_i, the last one filled up with zeros:

    S = sum over i of mix(w_i + i * GOLDEN)   modulo 2^64

Integer addition modulo 2^64 is exact, associative and commutative, so any order of reduction, on any device with any
number of threads, gives the same S: it can be computed in the training step as well as here. `mix` is a bijection (the
finaliser of SplitMix64 and MurmurHash3 with their constants), so a change in one word always changes S; `i * GOLDEN`
makes it depend on positions.

It tells accidents apart, not attacks: whoever wants to can make two tensors with the same digest.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

GOLDEN, FIRST, SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))
_A, _B, _C = np.uint64(33), np.uint64(29), np.uint64(32)
_BLOCK_WORDS = 1 << 14
"""Words mixed at a time, so that they stay in the cache."""

_STEPS = np.arange(_BLOCK_WORDS, dtype=np.uint64) * GOLDEN


def digest(array: np.ndarray) -> int:
    """The digest of one tensor's bits, from 0 to 2^64 - 1. Neither shape nor dtype is in it, only bytes.

    >>> digest(np.float32([1, 2])) == digest(np.float32([2, 1]))
    False
    >>> digest(np.float32([0.0])) == digest(np.float32([-0.0]))
    False
    """
    data = np.ascontiguousarray(array)
    if data.dtype.hasobject:
        raise TypeError(f"A digest is of numbers. Received: an array of {data.dtype}. Encode it to bytes first.")
    flat = data.reshape(-1).view(np.uint8)
    words = flat[: flat.size // 8 * 8].view("<u8")
    total = 0
    work, spare = np.empty(_BLOCK_WORDS, np.uint64), np.empty(_BLOCK_WORDS, np.uint64)
    for first in range(0, len(words), _BLOCK_WORDS):
        block = words[first : first + _BLOCK_WORDS]
        w = work[: len(block)]
        offset = np.uint64(first * int(GOLDEN) & 0xFFFFFFFFFFFFFFFF)
        np.add(block, _STEPS[: len(block)], out=w)
        w += offset
        total += int(mix(w, spare[: len(block)]).sum(dtype=np.uint64))
    rest = flat[len(words) * 8 :]
    if rest.size:
        last = int.from_bytes(rest.tobytes(), "little") + len(words) * int(GOLDEN) & 0xFFFFFFFFFFFFFFFF
        total += int(mix(np.array([last], np.uint64))[0])
    return total & 0xFFFFFFFFFFFFFFFF


def digest_all(arrays: Iterable[np.ndarray]) -> str:
    """The digest of tensors in their order, as 16 hexadecimal digits: what a record calls `weights_digest`.

    >>> a, b = np.float32([1.0]), np.float32([2.0])
    >>> digest_all([a, b]) == digest_all([a.copy(), b.copy()])
    True
    >>> digest_all([a, b]) == digest_all([b, a])
    False
    """
    each = np.array([digest(array) for array in arrays], np.uint64)
    places = np.arange(1, len(each) + 1, dtype=np.uint64) * GOLDEN
    return f"{int(mix(each + places).sum(dtype=np.uint64)):016x}"


def mix(words: np.ndarray, spare: np.ndarray | None = None) -> np.ndarray:
    """Scrambles each uint64 word in place, as a bijection of its 64 bits; returns the words."""
    spare = np.empty_like(words) if spare is None else spare
    for shift, factor in ((_A, FIRST), (_B, SECOND), (_C, None)):
        np.right_shift(words, shift, out=spare)
        np.bitwise_xor(words, spare, out=words)
        if factor is not None:
            np.multiply(words, factor, out=words)
    return words
