"""Which single change moves the loss of a model that is stuck.

`explain` replays the same few batches from the same state, once as it is and once under each single change, several
times over in the same orders, and compares the losses that come out.

`trainrt explain RULE` on the command line is another thing: the help page of a rule.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from trainrt.experiment import changes as known
from trainrt.experiment.changes import CHANGES, Change
from trainrt.experiment.replay import Replay, assert_counts, loss_of
from trainrt.findings import Finding

MOVES = 0.005
"""Share of the loss that a change has to take off, compared with the steps without it and with where they began."""
HALVES = 0.5
"""...and more than the steps take off without it, so that a model that learns is not called stuck; or this share."""
ERRORS = 2.0
"""...and in standard errors of its gain over the replays."""

SURE = 0.8
"""A finding of this confidence needs no experiment."""

CONFIRMED, DROPPED = 0.95, 0.2
"""Confidence of a finding whose cause an experiment took away with effect, and without."""


@dataclasses.dataclass(frozen=True)
class Effect:
    """What one change did.

    Attributes:
      change: Its name.
      losses: The loss after the steps, a value a replay.
      gain: Mean over the replays of the loss without the change less that with it: positive is better.
      spread: Standard deviation of that gain over the replays.
      moves: Whether the change moves the loss, beyond the spread.
      causes: What it speaks for, if it does.
      advice: What to do then.
    """

    change: str
    losses: tuple[float, ...]
    gain: float
    spread: float
    moves: bool
    causes: tuple[str, ...]
    advice: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which single change moves the loss of a model, and by how much.

    Attributes:
      before: The loss before the steps.
      unchanged: The loss after the steps as the model is, a value a replay.
      effects: Of every change that was tried, those that move the loss first, by their gain; another optimizer, which
        is several changes at once, behind what does it alone.
      untried: Change -> why it was not tried: there was nothing to change, or the budget was spent.
      steps: Steps of a replay.
      seconds: How long it took.
    """

    before: float
    unchanged: tuple[float, ...]
    effects: tuple[Effect, ...]
    untried: dict[str, str]
    steps: int
    seconds: float

    @property
    def cause(self) -> str | None:
        """The likeliest cause, an id of `findings.CAUSES`; None when no single change moves the loss."""
        best = next((effect for effect in self.effects if effect.moves), None)
        return best.causes[0] if best else None

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        as_is = _mean(self.unchanged)
        best = next((effect for effect in self.effects if effect.moves), None)
        came = f"from {self.before:.4g} to {as_is:.4g} in {self.steps} steps"
        if best is None:
            return f"No single change moves the loss, which goes {came}."
        return f"{best.change} moves the loss to {_mean(best.losses):.4g}; as it is it goes {came}."

    def judge(self, findings: Sequence[Finding]) -> list[Finding]:
        """Findings with what the experiment says of them: what it confirms is near certain and comes first, what it
        speaks against loses its confidence. A finding about whose causes no change says anything stays as it is."""
        tested = {cause: effect for effect in self.effects for cause in effect.causes[:1]}
        judged = []
        for finding in findings:
            hits = [effect for effect in self.effects if effect.moves and set(effect.causes) & set(finding.causes)]
            first = tested.get(finding.causes[0]) if finding.causes else None
            if hits:
                best = max(hits, key=lambda effect: effect.gain)
                causes = (*(c for c in finding.causes if c in best.causes), *finding.causes)
                told = dataclasses.asdict(best)
                finding = dataclasses.replace(
                    finding,
                    confidence=max(finding.confidence, CONFIRMED),
                    causes=tuple(dict.fromkeys(causes)),
                    evidence={**finding.evidence, "experiment": told},
                    advice=tuple(dict.fromkeys((*finding.advice, best.advice))),
                )
            elif first is not None:
                told = dataclasses.asdict(first)
                finding = dataclasses.replace(
                    finding,
                    confidence=min(finding.confidence, DROPPED),
                    evidence={**finding.evidence, "experiment": told},
                )
            judged.append(finding)
        return sorted(judged, key=lambda f: -f.confidence)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        from trainrt.comparison.difference import plain

        return plain({**dataclasses.asdict(self), "verdict": self.verdict, "cause": self.cause})

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # in a notebook

    def __str__(self) -> str:
        lines = [self.verdict, ""]
        width = max([len(e.change) for e in self.effects] + [len("as it is")], default=0)
        lines.append(f"  {'as it is':{width}}  {_values(self.unchanged)}")
        lines += [
            f"{'* ' if e.moves else '  '}{e.change:{width}}  {_values(e.losses)}  gain {e.gain:+.3g} +- {e.spread:.2g}"
            for e in self.effects
        ]
        lines += [f"  {name:{width}}  not tried: {why}" for name, why in self.untried.items()]
        best = next((e for e in self.effects if e.moves), None)
        if best:
            lines += ["", f"Try: {best.advice}"]
        return "\n".join(lines)


def _values(losses: Sequence[float]) -> str:
    return f"{_mean(losses):9.4g} +- {float(np.std(losses)):.2g}"


def confirmed(
    findings: Sequence[Finding], model: keras.Model, budget_s: float, verbose: bool, **data: Any
) -> list[Finding]:
    """What `fit(..., experiment=True)` makes of its findings: where none of them is sure, an experiment judges them.

    Args:
      findings: Of the run that has just ended.
      model: As it was left by the training.
      budget_s: Seconds that it may take.
      verbose: Whether to print what came of it.
      **data: `x`, `y`, `sample_weight`, `batch_size`, `shuffle` and `clip`, as for `explain`.
    """
    asked = [f for f in findings if f.severity != "info"]
    if not asked or max(f.confidence for f in asked) >= SURE:
        return list(findings)
    try:
        explanation = explain(model, budget_s=budget_s, **data)
    except Exception as error:  # the training is done, and what was found stays
        warnings.warn(
            "trainrt: the experiment could not be made, the findings stay as they are. "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return list(findings)
    if verbose:
        print(explanation)
    return explanation.judge(findings)


def explain(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    batch_size: int | None = None,
    shuffle: bool = True,
    clip: Any = None,
    steps: int = 32,
    replays: int = 3,
    batches: int = 8,
    budget_s: float = 60.0,
    changes: Sequence[str] | None = None,
    verbose: int = 0,
) -> Explanation:
    """Says which single change moves the loss of a model that is stuck. The model is left as it is, bit for bit.

    Args:
      model: A compiled model, in the state in which it does not learn.
      x, y, sample_weight, batch_size, shuffle, clip: As they are given to `trainrt.fit`. The data must be such as can
        be read again: arrays, a `tf.data.Dataset` (whose own shuffle goes on by one pass), or a `PyDataset`.
      steps: Steps of a replay.
      replays: How often each change is tried, in other orders of the batches and with other seeds; the same ones for
        every change.
      batches: How many batches are replayed.
      budget_s: Seconds that it may take. A change that was begun is finished.
      changes: Names of the changes to try; None: all that apply, see `trainrt.experiment.changes.CHANGES`.
      verbose: 1 prints each effect as it is known.

    Returns:
      The `Explanation`; printed, it is a table.

    Raises:
      TypeError: Not a model, an argument of another type, or data that can be read only once.
      ValueError: A model that is not compiled, an unknown change, no data, or numbers of steps, replays or batches
        under 1.
    """
    begun = time.monotonic()
    assert_counts(steps=steps, replays=replays, batches=batches, batch_size=32 if batch_size is None else batch_size)
    if isinstance(changes, str):
        raise TypeError(f"`changes` must be a list of names. Received: {changes!r}. Pass changes=[{changes!r}].")
    chosen = CHANGES if changes is None else tuple(known.named(name) for name in changes)
    replay = Replay(
        model, x, y, sample_weight,
        batch_size=batch_size, batches=batches, shuffle=shuffle, clip=known.clip_of(clip),
    )  # fmt: skip
    before, unchanged = _tried(replay, None, steps, replays)
    effects, untried = [], {}
    longest = time.monotonic() - begun
    for change in chosen:
        why = change.unless(replay)
        if why is not None:
            untried[change.name] = why
            continue
        if time.monotonic() - begun + longest > budget_s:
            untried[change.name] = f"the budget of {budget_s:g} s was spent"
            continue
        started = time.monotonic()
        _, losses = _tried(replay, change, steps, replays)
        longest = max(longest, time.monotonic() - started)
        effects.append(_effect(change, before, unchanged, losses))
        if verbose:
            print(f"trainrt: {change.name}: {_values(losses)}, as it is {_values(unchanged)}")
    broad = {change.name for change in chosen if change.broad}
    ranked = sorted(effects, key=lambda e: (not e.moves, e.moves and e.change in broad, -e.gain))
    return Explanation(before, unchanged, tuple(ranked), untried, steps, time.monotonic() - begun)


def _tried(replay: Replay, change: Change | None, steps: int, replays: int) -> tuple[float, tuple[float, ...]]:
    """The loss before the steps, and after them in each replay, under a change."""
    losses, before = [], math.nan
    with replay.undone(), change.make(replay) if change else contextlib.nullcontext():
        # Traced once; every replay begins with the values that variables had.
        step, meter = replay.stepper(), replay.meter()
        for number in range(replays):
            with replay.undone():
                replay.draw(number)
                if meter is not None and not number:
                    before = meter()
                logs = [step(replay.batches[i]) for i in replay.order(number, steps)]
                if meter is not None:
                    losses.append(meter())
                else:
                    tail = [loss_of(each) for each in logs[-len(replay.batches) :]]
                    before, after = loss_of(logs[0]), _mean(tail)
                    losses.append(after)
    return before, tuple(losses)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _effect(change: Change, before: float, unchanged: Sequence[float], losses: Sequence[float]) -> Effect:
    gains = [a - b for a, b in zip(unchanged, losses, strict=True)]
    known_gains = [g for g in gains if math.isfinite(g)]
    lost = not all(map(math.isfinite, unchanged)) and all(map(math.isfinite, losses))
    gain = _mean(known_gains) if len(known_gains) == len(gains) else (math.inf if lost else -math.inf)
    spread = float(np.std(known_gains, ddof=1)) if len(known_gains) > 1 else 0.0
    as_is, with_it = _mean(unchanged), _mean(losses)
    enough = MOVES * max(abs(before), abs(as_is)) if math.isfinite(before) else MOVES * abs(as_is)
    learns = before - as_is if math.isfinite(before) else 0.0
    moves = lost or (
        min(gains) > 0
        and gain > max(enough, min(learns, HALVES * abs(as_is)), ERRORS * spread / math.sqrt(len(gains)))
        and not with_it > before - enough
    )
    return Effect(change.name, tuple(losses), gain, spread, bool(moves), change.causes, change.advice)
