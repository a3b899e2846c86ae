"""Statistics of an opened run, made to fit a picture: what the map and the lines are drawn from.

A statistic is computed once as a table [T windows, R rows] and kept while the run is looked at; a picture of any part
of it is then a few reductions. Columns of a picture are equal numbers of steps. A column tells the smallest, the mean
and the largest value of its windows, so that no peak is lost, and whether anything in it was not finite.

Legend:  T windows   P weights   R rows (weights, layers or blocks)   C columns
"""

from __future__ import annotations

import copy
import dataclasses
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainrt.record import statistics
from trainrt.record.run import Run
from trainrt.record.vocabulary import Moments

FINE, MISSING, ZERO, NONFINITE = range(4)
"""States of a cell: a number; not measured; exactly zero; something in it was NaN or infinite."""

GROUPS = ("layers", "weights", "blocks")
KEPT_BYTES = 256 << 20
_WINDOWS = 256
_BLOCK = re.compile(r"(.*?(?:block|stage|layer|encoder|decoder)_?\d+[a-z]?)(?=_|$)")


class Table(NamedTuple):
    """A statistic: values [T, R] float32, and their states [T, R] uint8."""

    values: np.ndarray
    states: np.ndarray


def kind(name: str) -> str:
    """How a statistic is shown: "ratio" (log10, with a band that is fine), "log", "share" (0 to 1), "signed".

    >>> kind("update_ratio"), kind("gradient_norm"), kind("update_zero_share"), kind("weight_mean")
    ('ratio', 'log', 'share', 'signed')
    """
    if name == "update_ratio":
        return "ratio"
    if name.endswith("_share") or name == "clip_scale":
        return "share"
    if name.endswith(("_mean", "_cosine")) or name == "predicted_decrease":
        return "signed"
    return "log"


def block(layer: str) -> str:
    """The block that a layer belongs to: the path above it, or its name up to the number of a block.

    >>> block("encoder/dense"), block("conv2_block1_1_conv"), block("block2a_expand"), block("logits")
    ('encoder', 'conv2_block1', 'block2a', 'logits')
    """
    above, _, name = layer.rpartition("/")
    found = _BLOCK.match(name)
    return f"{above}/{found[1]}" if found and above else found[1] if found else above or name


def grouped(run: Run, group: str) -> Run:
    """The run whose weights are weights, layers or blocks."""
    if group == "weights":
        return run
    if group == "blocks":
        renamed = tuple(dataclasses.replace(p, layer=block(p.layer)) for p in run.roster.parameters)
        run = copy.copy(run)
        run.roster = dataclasses.replace(run.roster, parameters=renamed)
    return run.by_layer()


class Tables:
    """The tables of one run, computed when asked for, grown as the run grows, the least used forgotten.

    Attributes:
      run: The run. Hold `lock` while reading it.
    """

    def __init__(self, run: Run):
        self.run = run
        self.lock = threading.RLock()
        self._kept: OrderedDict[tuple, Table] = OrderedDict()
        self._steps = run.steps

    def refresh(self) -> None:
        """Reads what was written since; a resumed run took some of its windows back."""
        with self.lock:
            before = self.run.steps
            self.run.refresh()
            now = self.run.steps
            if len(now) < len(before) or not np.array_equal(now[: len(before)], before):
                self._kept.clear()

    def rows(self, group: str) -> tuple:
        """The parameters that a picture of that group has a row for."""
        with self.lock:
            return grouped(self.run, group).roster.parameters

    def get(self, group: str, names: list[str], rows: Sequence[int] | None = None) -> list[Table]:
        """Tables of several statistics, which share one reading of the moments.

        Args:
          group: One of `GROUPS`.
          names: The statistics.
          rows: Only these rows of the group, which is many times faster than all of them; None: all.

        Raises:
          KeyError: A statistic is not known, or the run did not record what it needs.
        """
        with self.lock:
            windows, chosen = len(self.run), None if rows is None else tuple(rows)
            wanted: list[Table | None] = [None] * len(names)
            if chosen is not None:
                self.get(group, [name for name in names if not _of_one_row(name)])
                for i, whole in enumerate(self._kept.get((group, None, name)) for name in names):
                    if whole is not None and len(whole.values) == windows:
                        wanted[i] = Table(whole.values[:, list(chosen)], whole.states[:, list(chosen)])
            keys = [(group, chosen, name) for name, table in zip(names, wanted, strict=True) if table is None]
            behind = {key: len(self._kept[key].values) if key in self._kept else 0 for key in keys}
            for start in sorted({at for at in behind.values() if at < windows}):
                part = grouped(self.run[start:], group)
                asked = [key for key, at in behind.items() if at == start]
                fresh = _compute(part if chosen is None else part.select(chosen), [name for *_, name in asked])
                for key, new in zip(asked, fresh, strict=True):
                    old = self._kept.get(key)
                    self._kept[key] = new if old is None else Table(*map(np.concatenate, zip(old, new, strict=True)))
            for key in keys:
                if key in self._kept:
                    self._kept.move_to_end(key)
            found = {name: self._kept.get((group, chosen, name)) for *_, name in keys}
            tables = [
                found[name] or _empty(self.run, group, chosen) if table is None else table
                for name, table in zip(names, wanted, strict=True)
            ]
            self._forget(len(keys))
            return tables

    def _forget(self, least: int) -> None:
        size = sum(table.values.nbytes + table.states.nbytes for table in self._kept.values())
        while size > KEPT_BYTES and len(self._kept) > least:
            _, table = self._kept.popitem(last=False)
            size -= table.values.nbytes + table.states.nbytes


def _of_one_row(name: str) -> bool:
    """Whether no other row enters into a row of the statistic; of a user's own nobody knows."""
    own = name not in statistics.STATISTICS or statistics.STATISTICS[name].function.__module__ == statistics.__name__
    return own and name != "norm_share"


def _empty(run: Run, group: str, chosen: tuple[int, ...] | None) -> Table:
    rows = len(grouped(run, group).roster.parameters if chosen is None else chosen)
    return Table(np.zeros((0, rows), np.float32), np.zeros((0, rows), np.uint8))


def _compute(run: Run, names: list[str]) -> list[Table]:
    shape = (len(run), len(run.roster.parameters))
    tables = [Table(np.empty(shape, np.float32), np.empty(shape, np.uint8)) for _ in names]
    known = [statistics.find(name, run.roster.subjects) for name in names]
    for first in range(0, len(run), _WINDOWS):
        part, arguments = run[first : first + _WINDOWS], {}
        for table, statistic in zip(tables, known, strict=True):
            for need in statistic.needs:
                if need not in arguments:
                    arguments[need] = _argument(part, need)
            with np.errstate(all="ignore"):
                values = statistic({need: arguments[need] for need in statistic.needs})
                at = slice(first, first + len(part))
                table.values[at] = values
            tensors = [a for a in map(arguments.get, statistic.needs) if isinstance(a, Moments)]
            table.states[at] = _states(table.values[at], tensors, kind(statistic.name) in ("ratio", "log"))
    return tables


def _argument(run: Run, need: str):
    found = statistics.kind(need, run.roster.subjects, run.roster.scalars)
    if found == "subject":
        return run.moments(need)
    if found == "joint":
        return run.joint(need)
    if found == "scalar":
        return run.scalar(need)[:, None]
    raise KeyError(f"This run did not record {need!r}.")


def _states(values: np.ndarray, tensors: list[Moments], logarithmic: bool) -> np.ndarray:
    """[T, R]: what to say of a cell that its number does not."""
    states = np.where(np.isnan(values), MISSING, FINE).astype(np.uint8)
    measured = np.ones(values.shape, bool)
    for tensor in tensors:
        measured &= ~np.isnan(tensor.count)
    if logarithmic:
        # Zero over zero: the weight is zero and stays so. It was measured, and it did not move.
        states[measured & (np.isnan(values) | (values == 0))] = ZERO
    for tensor in tensors:
        states[measured & (tensor.nonfinite > 0)] = NONFINITE
    states[~measured] = MISSING
    return states


class Columns(NamedTuple):
    """The columns of a picture.

    Attributes:
      edges: [C + 1] float64: column i is from step edges[i] to before edges[i + 1].
      low, stop: [C] int64: its windows are low[i] to before stop[i].
      extents: [C, 2] int64: first and last step of those windows.
      width: [T] int64: steps of each window.
      inside: [C] bool: whether anything was recorded there; columns may lie outside of the run.
    """

    edges: np.ndarray
    low: np.ndarray
    stop: np.ndarray
    extents: np.ndarray
    width: np.ndarray
    inside: np.ndarray


def columns(steps: np.ndarray, first: int, last: int, count: int) -> Columns:
    """Up to `count` columns of equal numbers of steps from `first` to `last`.

    A window stands for the steps up to the next one: where every tenth step was observed, it stands for ten.
    """
    count = max(1, min(count, last - first + 1))
    edges = np.linspace(first, last + 1, count + 1)
    begin = steps[:, 0]
    low = np.maximum(np.searchsorted(begin, edges[:-1], side="right") - 1, 0)
    stop = np.maximum(np.searchsorted(begin, edges[1:], side="left"), low + 1)
    inside = (edges[:-1] <= steps[-1, 1]) & (edges[1:] > steps[0, 0])
    extents = np.stack([steps[low, 0], steps[stop - 1, 1]], axis=1)
    return Columns(edges, low, stop, extents, steps[:, 1] - steps[:, 0] + 1, inside)


def reduce(table: Table, cut: Columns, logarithmic: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A table on the columns of a picture.

    Returns:
      Minimum, mean and maximum [C, R] float64, of log10 of the values where `logarithmic`, with -inf for zero; and
      states [C, R]. The mean is over the windows by their steps and leaves out what is not finite.
    """
    start, end = int(cut.low[0]), int(cut.stop[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        values = table.values[start:end].astype(np.float64)
        states = table.states[start:end]
        if logarithmic:
            values = np.where(states == ZERO, -np.inf, np.log10(values))
    at = np.stack([cut.low - start, cut.stop - start], axis=1).reshape(-1)
    width = cut.width[start:end, None]

    def reduced(ufunc, array, fill):
        padded = np.concatenate([array, np.full((1, array.shape[1]), fill, array.dtype)])
        return ufunc.reduceat(padded, at, axis=0)[::2]

    finite = np.isfinite(values)
    weight = reduced(np.add, finite * width, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = reduced(np.add, np.where(finite, values, 0.0) * width, 0.0) / weight
    low, high = reduced(np.fmin, values, np.nan), reduced(np.fmax, values, np.nan)
    mean = np.where(weight > 0, mean, np.where(np.isposinf(high), high, low))
    present = {state: reduced(np.maximum, (states == state).astype(np.uint8), 0) > 0 for state in range(4)}
    result = np.where(present[FINE], FINE, np.where(present[ZERO], ZERO, MISSING))
    result = np.where(present[NONFINITE], NONFINITE, result)
    return low, mean, high, np.where(cut.inside[:, None], result, MISSING).astype(np.uint8)


def mean_over_rows(values: np.ndarray) -> np.ndarray:
    """[T, R] -> [T]: the mean of the rows that were measured, NaN where none was."""
    measured = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(measured, values, 0.0).sum(1) / measured.sum(1)


def reduce_scalar(values: np.ndarray, cut: Columns) -> np.ndarray:
    """A scalar's [T, 3] mean, minimum and maximum on the columns of a picture: [C, 3]."""
    start, end = int(cut.low[0]), int(cut.stop[-1])
    at = np.stack([cut.low - start, cut.stop - start], axis=1).reshape(-1)
    part = np.concatenate([values[start:end], np.full((1, 3), np.nan)])
    weight = np.append(cut.width[start:end], 0).astype(np.float64)
    known = ~np.isnan(part[:, 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        total = np.add.reduceat(np.where(known, part[:, 0], 0.0) * weight, at)[::2]
        mean = total / np.add.reduceat(known * weight, at)[::2]
    return np.stack([mean, np.fmin.reduceat(part[:, 1], at)[::2], np.fmax.reduceat(part[:, 2], at)[::2]], axis=1)
