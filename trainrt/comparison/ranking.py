"""Weighs each difference between two runs by how the runs behaved, and puts the likeliest explanation first.

Each examiner says how likely a difference is to explain anything, from how much it does in the record. Three things in
the runs then speak for it or against it: where in the first step they part (two runs with the same loss and the same
gradients were not made different by their data), what the rules found in BAD alone, and what BAD came to.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from trainrt.comparison import configuration, data, model, surroundings
from trainrt.comparison.behaviour import Departure, Start, departures, outcome, start
from trainrt.comparison.difference import BACKWARD, FORWARD, KINDS, NOWHERE, START, UPDATE, Difference, plain
from trainrt.findings import Finding, Rule, diagnose
from trainrt.record.run import Run

STAGES = (START, FORWARD, BACKWARD, UPDATE)

FITS, TOO_EARLY, TOO_LATE, IDLE = 4.0, 0.03, 0.3, 0.02
"""Odds of a difference that acts where the runs part; that would have parted them earlier; that acts later only, so
that something else came first; and of any that could act on a training that is the same to its end."""

LIKELY = 0.25
"""A difference less likely than this is told in one line."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """GOOD and BAD, and what likely explains what became of them.

    Attributes:
      good, bad: Their names.
      differences: How they were made, likeliest explanation first.
      start: Until when they recorded the same bits.
      departures: Where BAD leaves GOOD's band, the first step first.
      only_good, only_bad: Findings that only one of them has.
      outcome: What each came to: `name`, `good`, `bad`; the first and the last value where there are two.
    """

    good: str
    bad: str
    differences: tuple[Difference, ...]
    start: Start
    departures: tuple[Departure, ...]
    only_good: tuple[Finding, ...]
    only_bad: tuple[Finding, ...]
    outcome: tuple[dict[str, Any], ...]

    @property
    def likely(self) -> tuple[Difference, ...]:
        """The differences that likely explain something."""
        return tuple(d for d in self.differences if d.likelihood >= LIKELY)

    @property
    def cause(self) -> Difference | None:
        """What most likely explains the difference; None when nothing recorded does."""
        return self.likely[0] if self.likely else None

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        if self.cause is not None:
            return f"{self.cause.name}: {self.cause.good} -> {self.cause.bad}"
        if self.start.common and self.start.until is None:
            return "The two runs recorded the same training."
        if not self.departures:
            return "BAD stays in the band in which GOOD moves."
        return "Nothing that was recorded explains it: look at the code, and at what the data passport cannot see."

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return plain(
            {
                "good": self.good,
                "bad": self.bad,
                "verdict": self.verdict,
                "differences": [each.to_dict() for each in self.differences],
                "start": {**dataclasses.asdict(self.start), "message": str(self.start)},
                "departures": [{**dataclasses.asdict(each), "message": str(each)} for each in self.departures],
                "only_good": [each.to_dict() for each in self.only_good],
                "only_bad": [each.to_dict() for each in self.only_bad],
                "outcome": list(self.outcome),
            }
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # in a notebook

    def __str__(self) -> str:
        from trainrt.comparison.render import text

        return text(self)


def compare(
    good: Any,
    bad: Any,
    rules: Iterable[Rule] | None = None,
) -> Comparison:
    """Says what most likely explains that BAD did not do what GOOD did.

    Args:
      good: A run, the History that `fit` returned, or its log directory. Several are runs that were all well, say with
        other seeds: BAD is compared with the first, and the band in which a good run moves is that of all.
      bad: The run in question, its History, or its log directory.
      rules: The rules to ask, as for `diagnose`.

    Returns:
      A `Comparison`; printed, it is one screen.

    Raises:
      FileNotFoundError, ValueError: A directory holds no run, or one that cannot be read.
      TypeError: Something that is no run.

    >>> def run(rate): return Run.synthetic(64, learning_rate=rate, update_ratio=1e-3 * rate / 0.01, loss=1.0)
    >>> compare(run(0.01), run(1.0)).verdict
    'optimizer.learning_rate: 0.01 -> 1'
    """
    goods = [_opened(each) for each in (good if isinstance(good, (list, tuple)) else [good])]
    if not goods:
        raise ValueError("`good` is a run, a log directory, or several of them. Received: an empty sequence.")
    last = _opened(bad)
    chosen = None if rules is None else list(rules)
    return contrast(goods, last, diagnose(goods[0], chosen), diagnose(last, chosen))


def contrast(goods: Sequence[Run], last: Run, in_good: Iterable[Finding], in_bad: Iterable[Finding]) -> Comparison:
    """`compare` for opened runs whose findings are known."""
    first = goods[0]
    found = [[each for each in findings if each.severity != "info"] for findings in (in_good, in_bad)]
    only_good, only_bad = _only(found[0], found[1]), _only(found[1], found[0])
    with np.errstate(all="ignore"):  # NaN rows are "not measured", and norms may be zero
        began = start(first, last)
        left = departures(goods, last)
        differences = [
            each for examiner in (configuration, model, data, surroundings) for each in examiner.examine(first, last)
        ]
    weighed = [_by_findings(_by_start(each, began), only_bad) for each in differences]
    ranked = sorted(weighed, key=lambda d: (-d.likelihood, KINDS.index(d.kind), d.name))
    return Comparison(
        _name(first, "GOOD"),
        _name(last, "BAD"),
        tuple(ranked),
        began,
        tuple(left),
        tuple(only_good),
        tuple(only_bad),
        tuple(outcome(first, last)),
    )


def _opened(given: Any) -> Run:
    run = getattr(given, "run", given)
    if not isinstance(run, (Run, str, os.PathLike)):
        raise TypeError(
            "Runs are compared: what trainrt.fit returned, its `.run`, or the log directory. "
            f"Received: {given!r} of type {type(given).__name__}."
        )
    opened = run if isinstance(run, Run) else Run.open(run)
    if not opened.environment and not len(opened):
        why = " ".join(map(str, opened.problems)) or "It is empty."
        raise ValueError(f"A run that is compared has a passport or steps. Received: {run!r}, with neither. {why}")
    return opened


def _name(run: Run, otherwise: str) -> str:
    return otherwise if run.path is None else str(run.path.parent)


def _only(mine: Sequence[Finding], yours: Sequence[Finding]) -> list[Finding]:
    """Findings whose rule and likeliest cause the other run does not have."""
    known = {(each.rule, each.causes[:1]) for each in yours}
    return [each for each in mine if (each.rule, each.causes[:1]) not in known]


def _by_start(difference: Difference, began: Start) -> Difference:
    """By where the two runs part. Runs that began from other weights part at once, whatever else differs."""
    if not began.common or difference.kind == "environment":
        return difference
    if began.until is None:
        if NOWHERE in difference.acts:
            return difference.weighed(FITS, "The training itself is the same, so only what is outside of it counts.")
        return difference.weighed(IDLE, "The training is the same to its end, so it did nothing.")
    if began.stage is None or began.stage == START or difference.acts == (NOWHERE,):
        return difference
    acts = [STAGES.index(stage) for stage in difference.acts if stage in STAGES and stage != START]
    parted = STAGES.index(began.stage)
    if not acts:
        return difference.weighed(TOO_EARLY, "The runs began from the same weights.")
    if began.until > 0:
        # What acts in every step would have acted in the first; a schedule and the order of later batches need not.
        return difference
    if difference.kind == "data" and began.batch is False:
        return difference.weighed(TOO_EARLY, "The digests of the first batch are the same.")
    if parted in acts:
        return difference.weighed(FITS, f"The runs part in the first step, where this acts: {_words(began.stage)}.")
    if max(acts) < parted:
        return difference.weighed(TOO_EARLY, f"It acts earlier than where the runs part: {_words(began.stage)}.")
    return difference.weighed(TOO_LATE, f"Something else parts the runs before this acts: {_words(began.stage)}.")


def _words(stage: str) -> str:
    return {FORWARD: "in the loss", BACKWARD: "in the gradients", UPDATE: "in the update, with the same gradients"}[
        stage
    ]


def _by_findings(difference: Difference, only_bad: Sequence[Finding]) -> Difference:
    """By the likeliest cause that the rules name in BAD alone and that this may be behind."""
    best = (0.0, "")
    for finding in only_bad:
        for rank, cause in enumerate(finding.causes):
            if cause in difference.causes:
                best = max(best, (finding.confidence / (1 + rank), f"{finding.rule} finds {cause} in BAD alone."))
    return difference.weighed(1 + 3 * best[0], best[1]) if best[0] else difference
