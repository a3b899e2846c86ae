"""How two runs behaved: until when they were the same, and where BAD first leaves the band in which GOOD moves.

Both are laid on the same columns of steps. GOOD's band around its own course is as wide as its own variation: the
spread of its steps around their running median, and the courses of more good runs where there are any. BAD leaves it
when several columns in a row are outside, on the same side, and far enough for an eye to see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainrt.comparison.difference import BACKWARD, FORWARD, START, UPDATE
from trainrt.findings.series import loss_trend, percentile
from trainrt.record import bits
from trainrt.record.run import Run
from trainrt.record.vocabulary import GRADIENT, WEIGHT
from trainrt.record.vocabulary import UPDATE as UPDATES

STATISTICS = ("gradient_norm", "update_ratio", "clip_scale", "weight_norm", "gradient_zero_share", "unchanged_share")
"""What is followed in each layer, with the loss: from the backward pass to what it leaves."""

SHARES = ("gradient_zero_share", "unchanged_share")
"""Of these the difference counts; of the others the ratio."""

COLUMNS = 400
SPREADS = 4.0
"""Half width of the band, in standard deviations of GOOD's columns around its course."""
VISIBLE = {True: 0.25, False: np.log10(1.5)}
"""Least half width, of a share and of the logarithm of anything else. One good run does not show what another seed
would do: on the digits the share of silent units of another one was 0.18 off."""
IN_A_ROW = 5
LEAST_COLUMNS = 3
EARLIER_OR_LATER = 0.25
"""A run that is as far at a quarter more or fewer steps is not another run: its band is as wide as its course there."""


@dataclasses.dataclass(frozen=True)
class Departure:
    """Where a statistic of BAD leaves GOOD's band.

    Attributes:
      statistic: Its name, or `"loss"`.
      where: Path of the layer; "" for the whole run.
      step: First step.
      good, bad: Values there, medians over the columns that were judged.
      spreads: How far outside, in half widths of the band; over 1.
      columns: Share of the columns from there on that are outside.
    """

    statistic: str
    where: str
    step: int
    good: float
    bad: float
    spreads: float
    columns: float

    def __str__(self) -> str:
        place = f" of {self.where}" if self.where else ""
        lead = f"step {self.step}: {self.statistic}{place} is {self.bad:.3g}, in GOOD {self.good:.3g}"
        if self.statistic in SHARES or not (self.good > 0 and self.bad > 0):
            return lead
        return f"{lead} ({self.bad / self.good:.3g} times that)"


@dataclasses.dataclass(frozen=True)
class Start:
    """Until when the two runs recorded the same bits, and what differed first.

    Attributes:
      weights: Whether they began from the same weights; None: not known.
      until: The first step in which any recorded number differs; None: none does, or nothing can be compared.
      stage: Where it differed first, one of `START`, `FORWARD`, `BACKWARD`, `UPDATE`; None: not known.
      common: Windows that both recorded.
      bits: What the digests of the two prove, a sentence; "" where they recorded none in common.
      batch: Whether the digests tell that the batch itself differs there; None: they do not tell.
    """

    weights: bool | None
    until: int | None
    stage: str | None
    common: int
    bits: str = ""
    batch: bool | None = None

    def __str__(self) -> str:
        if self.bits:
            return self.bits
        if not self.common:
            return "The runs recorded no steps in common."
        began = {True: "They began from the same weights. ", False: "They began from other weights. ", None: ""}
        if self.until is None:
            return f"{began[self.weights]}Every recorded number is the same in all {self.common} common windows."
        what = {
            START: "",
            FORWARD: "the loss, so the batch, the model or the loss function",
            BACKWARD: "a gradient, while the loss was the same",
            UPDATE: "an update, while loss and gradients were the same",
        }
        if self.stage == START or self.stage is None:
            return f"{began[self.weights]}The recorded numbers differ from step {self.until} on."
        same = f"Every recorded number is the same before step {self.until}. " if self.until else ""
        return f"{began[self.weights]}{same}The first to differ, in step {self.until}, is {what[self.stage]}."


STAGES_OF_DIGESTS = {
    **dict.fromkeys(("batch", "random state", "layer output", "loss"), FORWARD),
    "gradient": BACKWARD,
    **dict.fromkeys(("slot", "variable"), UPDATE),
}


def start(good: Run, bad: Run) -> Start:
    """Where two runs part: by their digests where both have some, otherwise by what was recorded."""
    found = _by_moments(good, bad)
    verdict = bits.compare_bits(good, bad)
    if not verdict.digests:
        return found
    said = str(verdict).partition("\n")[0]
    difference = verdict.difference
    if difference is None or difference.by != "digests" or difference.stage not in STAGES_OF_DIGESTS:
        return dataclasses.replace(found, bits=said)
    # A step that was not compared may lie before; what differs first is then not known.
    stage = STAGES_OF_DIGESTS[difference.stage] if difference.exact else None
    batch = difference.stage == "batch" if difference.exact else None
    return Start(found.weights, difference.step, stage, found.common, said, batch)


def _by_moments(good: Run, bad: Run) -> Start:
    """Compares the recorded numbers bit by bit, in the order in which a step makes them."""
    mine, yours = good.environment.get("weights_digest"), bad.environment.get("weights_digest")
    weights = mine == yours if mine and yours else None
    left, right = _common(good, bad)
    if not len(left):
        return Start(weights, None, None, 0)
    alike = alike_models(good, bad)
    stages, seen = [], False
    for stage, subjects in ((FORWARD, ("loss",)), (BACKWARD, (GRADIENT,)), (UPDATE, (UPDATES, WEIGHT))):
        for subject in subjects:
            values = _bits(good, subject, left), _bits(bad, subject, right)
            if values[0] is None or values[1] is None or (subject != "loss" and not alike):
                continue
            seen = True
            differs = np.flatnonzero((values[0] != values[1]).any(axis=1))
            if len(differs):
                stages.append((int(differs[0]), stage))
    if not stages:
        return Start(weights, None, None, len(left) if seen else 0)
    window, stage = min(stages, key=lambda item: item[0])  # min keeps the first of a step, which is the earliest stage
    until = int(good.steps[left[window], 0])
    single = good.steps[left[window], 1] == until
    stage = START if weights is False else stage
    # Weights and batch decide the first loss; who began from weights that are not known may differ in them.
    return Start(weights, until, stage if single and weights is not None else None, len(left))


def alike_models(one: Run, other: Run) -> bool:
    """Whether their weights are the same, one by one. Names do not tell: Keras counts layers a process through, so that
    the second model of a notebook has a `dense_2` where the first has a `dense`."""
    left, right = (
        [(p.path.rpartition("/")[2], p.shape, layers[p.layer]) for p in run.roster.parameters]
        for run in (one, other)
        for layers in [{name: i for i, name in enumerate(dict.fromkeys(p.layer for p in run.roster.parameters))}]
    )
    return left == right


def _common(good: Run, bad: Run) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the windows over the same steps."""
    if not (len(good) and len(bad)):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    _, left, right = np.intersect1d(good.steps[:, 0], bad.steps[:, 0], return_indices=True)
    same = good.steps[left, 1] == bad.steps[right, 1]
    return left[same], right[same]


def _bits(run: Run, subject: str, windows: np.ndarray) -> np.ndarray | None:
    """[T, n] uint64; NaN equals itself."""
    if subject == "loss":
        if "loss" not in run.roster.scalars:
            return None
        values = run.scalar("loss")[windows, None]
    else:
        if subject not in run.roster.subjects:
            return None
        values = run.moments(subject).array[windows].reshape(len(windows), -1)
    return np.ascontiguousarray(values, np.float64).view(np.uint64)


def departures(goods: Sequence[Run], bad: Run) -> list[Departure]:
    """Where BAD leaves the band of the good runs, the first step first; of one step the clearest first.

    Args:
      goods: At least one run; the first is the one that BAD is compared with.
      bad: The other.
    """
    good = goods[0]
    if not (len(good) and len(bad)):
        return []
    first = max(int(good.steps[0, 0]), int(bad.steps[0, 0]))
    last = min(int(good.steps[-1, 1]), int(bad.steps[-1, 1]))
    if last < first:
        return []
    runs = [run.between(first, last) for run in (*goods, bad) if len(run.between(first, last))]
    if len(runs) <= len(goods):
        return []
    count = min(COLUMNS, *map(len, runs))
    if count < LEAST_COLUMNS:
        return []
    edges = np.linspace(first, last + 1, count + 1)
    layers = [run.by_layer() for run in runs]
    shared = layers[0].roster.paths
    if not all(alike_models(run, good) for run in runs):
        shared = [path for path in shared if all(path in each.roster.paths for each in layers)]
        layers = [each.select(shared) for each in layers]
    found = []
    if all("loss" in run.roster.scalars for run in runs):
        series = [_columns(run.steps, run.scalar("loss")[:, None], edges, "loss") for run in runs]
        found += _leaves("loss", [""], series, edges)
    for name in STATISTICS:
        if shared and all(name in each.statistics for each in layers):
            series = [_columns(each.steps, each[name], edges, name) for each in layers]
            found += _leaves(name, shared, series, edges)
    order = ("loss", *STATISTICS)
    return sorted(found, key=lambda d: (d.step, -min(d.spreads, 10.0), order.index(d.statistic)))


def _columns(steps: np.ndarray, values: np.ndarray, edges: np.ndarray, name: str) -> np.ndarray:
    """[C, n] medians of the windows whose middle lies in a column, on the scale on which they are judged."""
    if name not in SHARES:
        # The sign of a loss may change; its logarithm is then no scale, and neither is that of zero.
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(values > 0, np.log10(values), np.where(values == 0, -30.0, np.nan))
    at = np.clip(np.searchsorted(edges, steps.mean(axis=1) + 1e-9, side="right") - 1, 0, len(edges) - 2)
    result = np.full((len(edges) - 1, values.shape[1]), np.nan)
    for column in np.unique(at):
        result[column] = _nanmedian(values[at == column])
    return result


def _leaves(name: str, rows: Sequence[str], series: Sequence[np.ndarray], edges: np.ndarray) -> list[Departure]:
    *goods, bad = series
    share = name in SHARES
    width = max(2, len(bad) // 20)
    low, high = np.full(bad.shape, np.inf), np.full(bad.shape, -np.inf)
    for values in goods:
        course = _rolling(values, width)
        spread = 1.4826 * _rolling(np.abs(values - course), 2 * width)
        half = np.fmax(SPREADS * spread / np.sqrt(IN_A_ROW), VISIBLE[share])
        below, above = _reach(course - half, np.fmin), _reach(course + half, np.fmax)
        low, high = np.fmin(low, below), np.fmax(high, above)
    centre, half = (low + high) / 2, (high - low) / 2
    # The middle of a few columns, so that one batch does not count.
    ahead = np.stack([_ahead(bad, k) for k in range(IN_A_ROW)])
    with np.errstate(invalid="ignore"):
        outside = (bad - centre) / half
        smooth = _nanmedian(ahead)
        far = (smooth - centre) / half
    found = []
    for row, path in enumerate(rows):
        beyond = (np.abs(far[:, row]) > 1) & (np.abs(outside[:, row]) > 1)
        if not beyond.any():
            continue
        c = int(np.argmax(beyond))
        tail = outside[c:, row]
        held = float(np.mean(np.abs(tail[np.isfinite(tail)]) > 1)) if np.isfinite(tail).any() else 0.0
        was, became = (_value(values[c, row], share) for values in (centre, smooth))
        found.append(Departure(name, path, int(np.ceil(edges[c])), was, became, float(abs(far[c, row])), held))
    return found


def _value(judged: float, share: bool) -> float:
    return float(judged) if share else float(10**judged) if judged > -29 else 0.0


def _rolling(values: np.ndarray, width: int) -> np.ndarray:
    """[C, n] medians over the columns up to `width` to either side."""
    padded = np.pad(values, ((width, width), (0, 0)), constant_values=np.nan)
    return _nanmedian(np.stack([padded[k : k + len(values)] for k in range(2 * width + 1)]))


def _reach(values: np.ndarray, least_or_most: np.ufunc) -> np.ndarray:
    """[C, n]: the lowest or highest value that is reached somewhat earlier or later."""
    result = np.empty_like(values)
    for c in range(len(values)):
        first, last = int(c * (1 - EARLIER_OR_LATER)), int(c * (1 + EARLIER_OR_LATER)) + 1
        result[c] = least_or_most.reduce(values[max(first - 1, 0) : last + 1], axis=0)
    return result


def _nanmedian(values: np.ndarray) -> np.ndarray:
    """Medians over the first axis, NaN left out; NaN where there is nothing else. NumPy's takes eight times as long."""
    ordered, count = np.sort(values, axis=0), np.sum(~np.isnan(values), axis=0)  # NaN is sorted last
    low, high = (np.take_along_axis(ordered, at[None], axis=0)[0] for at in (np.maximum(count - 1, 0) // 2, count // 2))
    return np.where(count > 0, (low + high) / 2, np.nan)


def _ahead(values: np.ndarray, k: int) -> np.ndarray:
    return np.concatenate([values[k:], np.full((min(k, len(values)), values.shape[1]), np.nan)])


def level(run: Run, name: str, steps: int | None = None) -> float:
    """The median of a scalar, or of a statistic over all windows and kernels, in the first `steps` steps."""
    part = run if steps is None or not len(run) else run.between(int(run.steps[0, 0]), int(run.steps[0, 0]) + steps - 1)
    if not len(part):
        return float("nan")
    if name in part.roster.scalars:
        return percentile(part.scalar(name), 50)
    if name not in part.statistics:
        return float("nan")
    kernels = [i for i, p in enumerate(part.roster.parameters) if len(p.shape) > 1]
    return percentile(part[name][:, kernels].reshape(-1), 50) if kernels else float("nan")


def outcome(good: Run, bad: Run) -> list[dict[str, Any]]:
    """What each run came to: the loss of its steps, and what Keras reported after the last epoch that both have."""
    rows: list[dict[str, Any]] = []
    if all("loss" in run.roster.scalars and len(run) for run in (good, bad)):
        a, b = loss_trend(good), loss_trend(bad)
        rows.append({"name": "loss of the steps", "good": [a.start, a.last], "bad": [b.start, b.last]})
    if good.epochs and bad.epochs:
        last = min(good.epochs[-1].epoch, bad.epochs[-1].epoch)
        mine = next((e.logs for e in good.epochs if e.epoch == last), {})
        yours = next((e.logs for e in bad.epochs if e.epoch == last), {})
        rows += [
            {"name": name, "epoch": last, "good": [mine[name]], "bad": [yours[name]]}
            for name in mine
            if name in yours and name not in ("loss", "learning_rate") and isinstance(mine[name], (int, float))
        ]
    return rows
