"""Intervals of time: pairs of begin and end, as whole picoseconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

Interval = tuple[int, int]


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that neither overlap nor touch, the first one first.

    >>> merge([(5, 7), (0, 2), (2, 4), (6, 9)])
    [(0, 4), (5, 9)]
    """
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


def cut(intervals: Iterable[Interval], windows: Sequence[Interval]) -> Iterator[Interval]:
    """What of the intervals lies in the windows, which do not overlap, the first one first.

    >>> list(cut([(0, 10)], [(2, 4), (8, 12)]))
    [(2, 4), (8, 10)]
    """
    begins = np.array([w[0] for w in windows], np.int64)
    for begin, end in intervals:
        i = max(int(np.searchsorted(begins, begin, side="right")) - 1, 0)
        while i < len(windows) and windows[i][0] < end:
            a, b = max(begin, windows[i][0]), min(end, windows[i][1])
            if a < b:
                yield a, b
            i += 1


def without(intervals: Iterable[Interval], holes: Iterable[Interval]) -> list[Interval]:
    """The intervals that do not begin in a hole.

    >>> without([(0, 2), (5, 9), (7, 8)], [(4, 6)])
    [(0, 2), (7, 8)]
    """
    merged = merge(holes)
    begins = np.array([h[0] for h in merged], np.int64)
    kept = []
    for begin, end in intervals:
        i = int(np.searchsorted(begins, begin, side="right")) - 1
        if i < 0 or begin >= merged[i][1]:
            kept.append((begin, end))
    return kept


def length(intervals: Iterable[Interval]) -> int:
    """Their lengths added up."""
    return sum(end - begin for begin, end in intervals)
