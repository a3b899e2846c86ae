"""What one pass over a data set looks like, from the batches as they go by. NumPy only.

Arrays are looked at whole (those of many gigabytes in evenly spaced blocks), batches of a pipeline as `scheduled`: the
first of a pass, then every sixteenth, and each with something in it that is not finite. Extremes and labels are of
those shown, the share of NaN is of all; how much was shown is told as `seen`. Moments are of a bounded sample of rows.
Rows are known again by a hash, kept for a consistent sample: whether a row is in it depends on the row alone, so the
samples of two data sets can be compared, and what they share is the share that the sets share. Nothing here draws a
random number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from trainrt.passport.relation import Relation
from trainrt.record.digest import GOLDEN, mix

SAMPLE_BATCH = 1 << 14
"""About how many elements of a leaf are sampled from one batch."""

SAMPLE = 1 << 18
"""Most elements of a leaf that are kept: the standard error of a mean is a five-hundredth of the deviation."""

CHANNELS = 32
"""Most channels that are listed one by one."""

ROWS, FEWEST, HASHED_BYTES = 4096, 1024, 8 << 20
"""Most rows whose hash is kept. Of large rows so many as make so many bytes, and at least half of `FEWEST`."""

LABELS = 1 << 20
BATCHES = 4096
"""Most labels, and sizes of batches, that are kept."""

CLASSES = 1000
"""Labels of more classes are described as numbers."""

FIRST, THINNED = 64, 16
"""Batches of a pass of which each is looked at; after them every so many-th. A look takes about 200 microseconds of
processor time at 400 kB a batch (`benchmarks/passport.py`), half of it the call of Python from `tf.data`."""

COMPARED = 512
"""Batches whose order is compared from pass to pass: one that is shuffled anew differs in the first."""

SCAN_BYTES = 4 << 30
"""Most bytes of arrays that are looked at."""

_KEY_ELEMENTS = 32
_SCAN_ROWS, _SCAN_BLOCK = 2048, 1 << 20
_WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WHOLE = 1 << 64


class Leaf(NamedTuple):
    """One tensor of a batch.

    Attributes:
      role: "input", "target" or "weight" (of a sample).
      name: Its path in the structure of the role, e.g. "image"; empty when the tensor is all of it.
    """

    role: str
    name: str


def scheduled(number: Any) -> Any:
    """Whether a batch of that number is looked at; also of an array or tensor of numbers."""
    return (number < FIRST) | (number % THINNED == 0)


class Survey:
    """Takes note of the batches of one pass.

    Args:
      leaves: What the arrays of a batch are, in their order.
      full: Everything; False: only what may differ from pass to pass, the order and what is not finite.
      expected: About how many rows will be shown, if that is known: it saves hashing rows that are not kept.

    Attributes:
      batches, rows: Of the pass, as far as it has gone by; those not shown count as large as the first one.
      seen_batches, seen_rows: Those that were shown.
      sizes: Rows of each batch shown.
      hashes: Of the inputs and of the first target, a pair for each batch from the first one on.
    """

    def __init__(self, leaves: Sequence[Leaf], full: bool = True, expected: int = 0):
        self.leaves = list(leaves)
        self.full = full
        self.batches = 0
        self.rows = 0
        self.seen_batches = 0
        self.seen_rows = 0
        self.sizes: list[int] = []
        self.hashes: list[tuple[int, int]] = []
        self.known = Rows(expected)
        self._columns = [_Column(leaf) for leaf in self.leaves]
        self._labels = {i: _Labels() for i, leaf in enumerate(self.leaves) if leaf.role == "target"}
        self._inputs = [i for i, leaf in enumerate(self.leaves) if leaf.role == "input"]
        self._relation = Relation() if len(self._inputs) == 1 and len(self._labels) == 1 else None
        self._gaps: list[int] = []  # places in `sizes` before which batches were not shown
        self._next = 0

    @property
    def share(self) -> float:
        """Of the rows of the pass, those that were shown."""
        return self.seen_rows / self.rows if self.rows else 1.0

    def see(self, *arrays: np.ndarray, number: int | None = None) -> None:
        """One batch: an array [rows, ...] for each leaf. They may be overwritten once this has returned.

        `number` is that of the batch in the pass; by default the next, of a pass of which each is shown. Where it is
        given and the batch is not `scheduled`, it is shown for what is not finite in it: all else would no longer be
        evenly of the pass.
        """
        rows = len(arrays[0]) if arrays and arrays[0].ndim else 0
        if not rows or any(not a.ndim or len(a) != rows for a in arrays):
            return
        regular = number is None or scheduled(number)
        number = self.batches if number is None else number
        self.passed(number)
        self.batches, self.rows = number + 1, self.rows + rows
        if not regular:
            for column, array in zip(self._columns, arrays, strict=True):
                column.count_nonfinite(array)
            return
        self.seen_batches += 1
        self.seen_rows += rows
        for column, array in zip(self._columns, arrays, strict=True):
            column.see(array, self.full)
        ordered = number == len(self.hashes) < COMPARED
        if self.full or ordered:
            inputs = [arrays[i] for i in self._inputs]
            keys = self.known.see(inputs, keep=self.full)
            if self.full and self._relation is not None:
                self._relation.see(inputs[0], arrays[next(iter(self._labels))])
            if ordered:
                target = next((arrays[i] for i in self._labels), None)
                places = np.arange(1, 2 * rows, 2, dtype=np.uint64)
                self.hashes.append((int((keys * places).sum()), _crc(target) if target is not None else 0))
        if len(self.sizes) < BATCHES:
            if number != self._next:
                self._gaps.append(len(self.sizes))
            self._next = number + 1
            self.sizes.append(rows)
            if self.full:
                for i, labels in self._labels.items():
                    labels.see(arrays[i])

    def passed(self, batches: int) -> None:
        """So many batches of the pass have gone by, shown or not."""
        if batches > self.batches:
            self.rows += (batches - self.batches) * (self.sizes[0] if self.sizes else 0)
            self.batches = batches

    def see_all(
        self, arrays: Sequence[np.ndarray], order: np.ndarray, batch_size: int, dtypes: Sequence[Any] = ()
    ) -> None:
        """A whole pass over arrays at once: batches are rows `order[i * batch_size : (i + 1) * batch_size]`.

        `dtypes` are those of the batches, where the arrays' own are others.
        """
        order = np.asarray(order)
        self.rows = len(order)
        self.batches = self.seen_batches = -(-self.rows // batch_size)
        starts = range(0, min(self.batches, BATCHES) * batch_size, batch_size)
        self.sizes = [min(batch_size, self.rows - start) for start in starts]
        self.hashes = [(_crc(order[start : start + batch_size]),) * 2 for start in starts[:COMPARED]]
        self.seen_rows = self.rows
        if not self.full:
            return
        kinds = list(dtypes) or [a.dtype for a in arrays]
        row_bytes = max(sum(a[:1].nbytes for a in arrays), 1)
        size = min(max(_SCAN_BLOCK // row_bytes, 1), _SCAN_ROWS)
        blocks = range(0, self.rows, size * max(-(-self.rows * row_bytes // SCAN_BYTES), 1))
        self.seen_rows = sum(min(size, self.rows - first) for first in blocks)
        self.known = Rows(self.seen_rows)
        for first in blocks:
            part = [a[first : first + size].astype(kind, copy=False) for a, kind in zip(arrays, kinds, strict=True)]
            for column, array in zip(self._columns, part, strict=True):
                column.see(array, True)
            self.known.see([part[i] for i in self._inputs])
            if self._relation is not None:
                self._relation.see(part[self._inputs[0]], part[next(iter(self._labels))])
        shown = order[: sum(self.sizes)]
        for i, labels in self._labels.items():
            for first in range(0, len(shown), _SCAN_ROWS):
                labels.see(arrays[i][shown[first : first + _SCAN_ROWS]].astype(kinds[i], copy=False))

    def summary(self) -> dict[str, Any]:
        """JSON-able; what is None was not measured."""
        sizes = list(self.sizes)
        result: dict[str, Any] = {
            "batches": self.batches,
            "rows": self.rows,
            "batch_size": [min(sizes), max(sizes)] if sizes else None,
            "seen": {"batches": self.seen_batches, "rows": self.seen_rows, "share": self.share},
        }
        for role in ("input", "target", "weight"):
            result[f"{role}s"] = [c.summary(self.share) for c in self._columns if c.leaf.role == role and c.elements]
        for i, labels in self._labels.items():
            described = next((t for t in result["targets"] if t["name"] == self.leaves[i].name), None)
            if described is not None:
                described["labels"] = labels.summary(sizes, list(self._gaps))
        result["duplicates"] = self.known.summary(self.share)
        if self._relation is not None:
            result["relation"] = self._relation.summary()
        return result


class _Column:
    """The elements of one leaf."""

    def __init__(self, leaf: Leaf):
        self.leaf = leaf
        self.elements = 0
        self.nan = 0
        self.inf = 0
        self._low, self._high = np.inf, -np.inf
        self._shape: tuple[int, ...] = ()
        self._dtype = ""
        self._ragged = False
        self._sample: list[np.ndarray] = []
        self._sampled = 0
        self._seen = 0
        self._stride = 1

    def count_nonfinite(self, a: np.ndarray) -> None:
        if a.dtype.kind not in "fiub":
            a = a.astype(np.float32)
        if a.dtype.kind == "f":
            nan = int(np.isnan(a).sum())
            self.nan += nan
            self.inf += a.size - int(np.isfinite(a).sum()) - nan

    def see(self, a: np.ndarray, sample: bool) -> None:
        if not a.size:
            return
        self._ragged |= bool(self.elements) and a.shape[1:] != self._shape
        self._shape, self._dtype = a.shape[1:], a.dtype.name
        self.elements += a.size
        if a.dtype.kind not in "fiub":  # bfloat16 and its kin
            a = a.astype(np.float32)
        with np.errstate(invalid="ignore"):
            low, high = float(a.min()), float(a.max())  # NaN goes through both
        if not (np.isfinite(low) and np.isfinite(high)):
            self.count_nonfinite(a)
            kept = a[np.isfinite(a)]
            low, high = float(kept.min(initial=np.inf)), float(kept.max(initial=-np.inf))
        self._low, self._high = min(self._low, low), max(self._high, high)
        if sample and self._seen % self._stride == 0:
            self._sample.append(_some(a))
            self._sampled += self._sample[-1].size
            while self._sampled > SAMPLE and len(self._sample) > 1:
                self._sample = self._sample[::2]
                self._sampled = sum(s.size for s in self._sample)
                self._stride *= 2
        self._seen += 1

    def summary(self, share: float) -> dict[str, Any]:
        """`share`: of the pass, what was shown. What is not finite was counted in all of it."""
        found = np.isfinite(self._low)
        elements = self.elements / share
        result = {
            "name": self.leaf.name,
            "shape": [None, *(("?",) if self._ragged else self._shape)],
            "dtype": self._dtype,
            "min": self._low if found else None,
            "max": self._high if found else None,
            "nan_share": self.nan / elements,
            "inf_share": self.inf / elements,
        }
        sample = list(self._sample)
        if sample:
            result |= _moments(sample)
        return result


def _some(a: np.ndarray) -> np.ndarray:
    """A copy of some rows, evenly spaced; of a part of one row where even that is too much."""
    size = max(a[0].size, 1)
    if size > SAMPLE:
        channels = a.shape[-1]
        places = a[:1].reshape(-1, channels)
        return places[:: -(-places.size // SAMPLE)].copy()
    rows = max(1, min(len(a), SAMPLE_BATCH * -(-len(a) // _SCAN_ROWS) // size))
    return a[:: -(-len(a) // rows)].copy()


def _moments(sample: list[np.ndarray]) -> dict[str, Any]:
    """Of sampled rows: moments over the last axis's channels, zeros, and features that never change."""
    channels = sample[0].shape[-1] if sample[0].ndim > 1 else 1
    if any(s.ndim > 1 and s.shape[-1] != channels for s in sample):
        channels = 1
    flat = np.concatenate([s.reshape(-1, channels) for s in sample])
    zero_share = 1 - np.count_nonzero(flat) / flat.size
    wide = np.array(flat.T, np.float64, order="C")  # sums along rows of few channels are slow
    count, mean = np.full(channels, len(flat)), wide.mean(1)
    finite = None if np.isfinite(mean).all() else np.isfinite(wide)
    if finite is not None:
        wide[~finite] = 0.0
        count = np.maximum(finite.sum(1), 1)
        mean = wide.sum(1) / count
    wide -= mean[:, None]
    if finite is not None:
        wide[~finite] = 0.0
    with np.errstate(over="ignore"):
        std = np.sqrt(np.einsum("ij,ij->i", wide, wide) / count)
    result: dict[str, Any] = {"sampled": flat.size, "channels": channels, "zero_share": zero_share}
    if channels <= CHANNELS:
        result |= {"mean": mean.tolist(), "std": std.tolist()}
    else:
        spread: dict[str, Callable] = {"lowest": np.min, "median": np.median, "highest": np.max}
        result["mean"] = {name: float(f(mean)) for name, f in spread.items()}
        result["std"] = {name: float(f(std)) for name, f in spread.items()}
    rows = sum(len(s) for s in sample)
    if sample[0].ndim > 1 and rows >= 32 and all(s.shape[1:] == sample[0].shape[1:] for s in sample):
        first = sample[0][0]
        same = np.logical_and.reduce([(s == first).all(0) for s in sample])
        result["constant_features"] = {"count": int(same.sum()), "of": int(same.size), "rows": rows}
    return result


class _Labels:
    """Labels in the order in which they came."""

    def __init__(self):
        self._parts: list[np.ndarray] = []
        self._count = 0
        self._one_hot: bool | None = None
        self._classes = 0
        self._other = False

    def see(self, a: np.ndarray) -> None:
        if self._other or self._count >= LABELS:
            return
        if a.dtype.kind not in "fiub":
            a = a.astype(np.float32)
        if a.size == len(a):
            self._parts.append(a.reshape(-1).copy())
        elif a.ndim == 2 and self._one_hot is not False and _is_one_hot(a):
            self._one_hot, self._classes = True, a.shape[1]
            self._parts.append(a.argmax(1))
        else:
            self._other = True  # a map of classes, several labels a row, or several numbers
        self._count += len(a)

    def summary(self, sizes: Sequence[int], gaps: Sequence[int]) -> dict[str, Any] | None:
        if self._other or not self._parts:
            return None
        values = np.concatenate(list(self._parts))[:LABELS]
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        classes, counts = np.unique(finite, return_counts=True)
        whole = finite.dtype.kind in "iub" or bool((classes == np.floor(classes)).all())
        if not len(finite) or not whole or len(classes) > CLASSES:
            if not len(finite):
                return None
            steps = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
            quantiles = np.quantile(finite.astype(np.float64), steps).tolist()
            known = {"kind": "continuous", "quantiles": dict(zip(map(str, steps), quantiles, strict=True))}
            return known | (_order_of_numbers(values, sizes) if len(finite) == len(values) else {})
        kind = "one_hot" if self._one_hot else "binary" if set(classes.tolist()) <= {0, 1} else "integer"
        largest = np.argsort(-counts, kind="stable")[:100]
        result = {
            "kind": kind,
            "classes": self._classes if self._one_hot else len(classes),
            "counts": {str(int(classes[i])): int(counts[i]) for i in largest},
        }
        if len(finite) == len(values):
            result |= _order_of_labels(np.searchsorted(classes, values), counts, sizes, gaps)
        return result


def _is_one_hot(a: np.ndarray) -> bool:
    return bool((np.count_nonzero(a, axis=1) == 1).all() and (a.max(1) == 1).all())


def _order_of_labels(
    codes: np.ndarray, counts: np.ndarray, sizes: Sequence[int], gaps: Sequence[int]
) -> dict[str, Any]:
    """Was it shuffled? Entropy in bits of the labels, of those of a batch, and of a batch after a shuffle.

    Batches are missing before those at `gaps`: what lies on both sides of one are no neighbours.
    """
    ends = np.cumsum(sizes)
    batches = int(np.searchsorted(ends, len(codes), side="right"))
    batches = min(batches, max(1, (1 << 20) // len(counts)))
    if not batches:
        return {}
    codes = codes[: ends[batches - 1]]
    of_batch = np.repeat(np.arange(batches), sizes[:batches])
    shuffled = np.random.Generator(np.random.PCG64(0)).permutation(codes)

    def mean_entropy(order: np.ndarray) -> float:
        table = np.bincount(of_batch * len(counts) + order, minlength=batches * len(counts))
        return float(_entropy(table.reshape(batches, len(counts))).mean())

    share = counts / counts.sum()
    neighbours = np.ones(max(len(codes) - 1, 0), bool)
    neighbours[[ends[gap - 1] - 1 for gap in gaps if 0 < gap < batches]] = False
    changes = int((codes[1:] != codes[:-1])[neighbours].sum())
    runs = 1 + changes * len(neighbours) / max(int(neighbours.sum()), 1)
    return {
        "entropy": float(_entropy(counts[None])[0]),
        "batch_entropy": mean_entropy(codes),
        "batch_entropy_shuffled": mean_entropy(shuffled),
        "run_length": len(codes) / runs,
        "run_length_shuffled": float(1 / max(1 - np.square(share).sum(), 1 / len(codes))),
    }


def _order_of_numbers(values: np.ndarray, sizes: Sequence[int]) -> dict[str, Any]:
    """Was it shuffled? Variance of the targets within their batches over that of all, as it is and after a shuffle."""
    ends = np.cumsum(sizes)
    batches = int(np.searchsorted(ends, len(values), side="right"))
    values = values[: ends[batches - 1]].astype(np.float64) if batches else values[:0]
    spread = float(values.var()) if len(values) else 0.0
    if not spread > 0:
        return {}
    count = np.asarray(sizes[:batches], np.float64)
    of_batch = np.repeat(np.arange(batches), sizes[:batches])
    centred = values - values.mean()

    def within(order: np.ndarray) -> float:
        means = np.bincount(of_batch, weights=order, minlength=batches) / count
        return float(1 - (count * np.square(means)).sum() / len(order) / spread)

    shuffled = np.random.Generator(np.random.PCG64(0)).permutation(centred)
    return {"batch_variance": within(centred), "batch_variance_shuffled": within(shuffled)}


def _entropy(counts: np.ndarray) -> np.ndarray:
    """[n] bits, of [n, classes] counts."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return -(share * np.log2(np.where(share > 0, share, 1.0))).sum(1)


class Rows:
    """A consistent sample of the rows of a data set, known by their hashes; `expected`: about how many may come."""

    def __init__(self, expected: int = 0):
        self.limit = _WHOLE
        self._expected = expected
        self._most = ROWS
        self.counts: dict[tuple[int, int], int] = {}
        self._widths: list[int] = []
        self._places: list[tuple[np.ndarray, np.ndarray]] = []

    def _limit(self, row_bytes: int) -> None:
        """Fixes how many rows of that size are kept."""
        self._most = int(np.clip(HASHED_BYTES // max(row_bytes, 1), FEWEST, ROWS))
        while self._expected > self._most:
            self.limit, self._expected = self.limit // 2, self._expected // 2

    def see(self, inputs: Sequence[np.ndarray], keep: bool = True) -> np.ndarray:
        """Rows of all inputs together; returns [rows] uint64 keys, made of some elements of each row."""
        bits = [_bits(a) for a in inputs]
        widths = [b.shape[1] for b in bits]
        if self._widths != widths:
            self._widths, self._places = widths, [_places(i, width) for i, width in enumerate(widths)]
            self._limit(sum(b[:1].nbytes for b in bits))
        keys = np.zeros(len(inputs[0]) if inputs else 0, np.uint64)
        for b, (places, factors) in zip(bits, self._places, strict=True):
            keys += b[:, places].astype(np.uint64) @ factors
        mix(keys)
        if keep:
            chosen = range(len(keys)) if self.limit == _WHOLE else np.flatnonzero(keys < np.uint64(self.limit))
            for row in chosen:
                crc = 0
                for b in bits:
                    crc = google_crc32c.extend(crc, b[row].tobytes())
                identity = (int(keys[row]), crc)
                self.counts[identity] = self.counts.get(identity, 0) + 1
            while len(self.counts) > self._most:
                self.limit //= 2
                self.counts = {row: n for row, n in self.counts.items() if row[0] < self.limit}
        return keys

    def summary(self, shown: float) -> dict[str, Any] | None:
        """`share`: of the rows, those that have been there before; where not all were `shown`, about so many."""
        counts = dict(self.counts)
        total = sum(counts.values())
        if not total:
            return None
        share = min((1 - len(counts) / total) / shown, 1.0)
        return {"sampled_rows": total, "share": share, "sampling": self.limit / _WHOLE}


def overlap(train: Rows, other: Rows, shown: float = 1.0) -> dict[str, Any] | None:
    """How many rows of `other` are rows of `train`: leakage, when it is the validation data.

    `shown` is the share of the training rows that were shown; where it is not all, `share` is about right.
    """
    limit = min(train.limit, other.limit)
    known = set(dict(train.counts))
    rows = {row: n for row, n in dict(other.counts).items() if row[0] < limit}
    total = sum(rows.values())
    if not total or not known:
        return None
    shared = sum(n for row, n in rows.items() if row in known)
    return {"sampled_rows": total, "shared": shared, "share": min(shared / total / shown, 1.0), "shown": shown}


def _bits(a: np.ndarray) -> np.ndarray:
    """[rows, n] unsigned integers: the bits of a row's elements."""
    flat = np.ascontiguousarray(a).reshape(len(a), -1)
    return flat.view(_WIDTHS.get(a.dtype.itemsize, np.uint8))


def _places(leaf: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Which elements of a row make its key, spread over it unevenly, and an odd factor for each."""
    count = min(width, _KEY_ELEMENTS)
    if not count:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    strata = np.linspace(0, width, count + 1).astype(np.int64)
    scrambled = mix(np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)
    places = strata[:-1] + (scrambled % np.maximum(np.diff(strata), 1).astype(np.uint64)).astype(np.int64)
    numbers = np.arange(count, dtype=np.uint64) + np.uint64(leaf * _KEY_ELEMENTS + 1)
    factors = mix(numbers * GOLDEN) | np.uint64(1)
    return places, factors


def _crc(a: np.ndarray) -> int:
    return google_crc32c.value(a.tobytes())
