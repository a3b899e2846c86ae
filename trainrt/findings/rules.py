"""A rule is a pure function of a run. This module runs them, folds consequences under their cause, and ranks."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from trainrt.findings.finding import SEVERITIES, TIME_CAUSES, Finding
from trainrt.record.run import Run

Rule = Callable[[Run], Iterator[Finding]]

_DEATHS = ("dying_relu", "saturated_activation", "exploding_gradient", "vanishing_gradient", "unstable_loss")
_STEPS = ("lr_too_high", "lr_too_low", "too_few_updates")
_WRONG = (*_DEATHS, *_STEPS, "bad_init", "labels_wrong", "capacity")

EXPLAINS: dict[str, tuple[str, ...]] = {
    "nan_in_data": (*_WRONG, "wrong_output_activation", "output_units", "label_range"),
    "sample_weights_zero": (*_WRONG, "wrong_loss"),
    "inputs_constant": (*_WRONG, "inputs_too_small", "inputs_unnormalised"),
    "inputs_too_small": ("vanishing_gradient", "lr_too_low", "dying_relu", "inputs_constant"),
    "inputs_unnormalised": (*_DEATHS, "bad_init", "inputs_constant"),
    "targets_unnormalised": (*_DEATHS, "lr_too_low", "bad_init"),
    "bad_init": (*_DEATHS, "inputs_constant", "lr_too_high"),
    "lr_too_high": (*_DEATHS, "bad_init", "inputs_constant"),
    "momentum_too_high": (*_DEATHS, "lr_too_high"),
    "clip_too_tight": ("lr_too_low", "vanishing_gradient", "update_rounding", "too_few_updates"),
    "epsilon_dominates": ("lr_too_low", "vanishing_gradient", "update_rounding", "too_few_updates"),
    "wrong_optimizer": ("lr_too_low", "too_few_updates", "update_rounding"),
    "lr_schedule": ("lr_too_low", "too_few_updates", "update_rounding"),
    "weight_decay_too_high": ("over_regularised", "vanishing_gradient", "dying_relu", "lr_too_high", "lr_too_low"),
    "over_regularised": ("weight_decay_too_high", "vanishing_gradient", "dying_relu", "lr_too_low"),
    "dropout_too_high": ("lr_too_high", "lr_too_low", "capacity", "too_few_updates"),
    "constraint_binds": (*_STEPS, "vanishing_gradient", "capacity", "update_rounding"),
    "unshuffled_data": ("lr_too_high", "unstable_loss", "train_val_mismatch", "overfitting"),
    "train_val_mismatch": ("overfitting", "labels_wrong", "batchnorm_statistics"),
    "vanishing_gradient": ("update_rounding", "lr_too_low", "dying_relu", "too_few_updates"),
    "hidden_activation": _DEATHS,
    "saturated_activation": ("vanishing_gradient", "inputs_constant", "dying_relu"),
    "graph_cut": ("frozen_layers", "capacity", "dying_relu"),
    "frozen_layers": ("graph_cut", "capacity"),
    "flipped_sign": _WRONG,
    "labels_wrong": ("overfitting",),
    "batchnorm_statistics": ("overfitting", "labels_wrong", "train_val_mismatch"),
    **dict.fromkeys(
        (
            *("wrong_output_activation", "missing_softmax", "double_softmax", "wrong_softmax_axis", "wrong_loss"),
            *("label_range", "output_units"),
        ),
        (*_WRONG, "inputs_constant", "flipped_sign", "sample_weights_zero", "wrong_loss", "output_units"),
    ),
}
"""Root cause -> what it brings about, and what therefore needs no explanation of its own. A cause that explains another
does so only when its finding ranks higher."""

DYNAMICS = (
    "dead_update",
    "learning_rate",
    "stagnation",
    "vanishing",
    "exploding",
    "crawling",
    "unfinished",
    "nonfinite",
)
"""Rules about what the steps did: from the first number on that is not finite, they say nothing new."""

MINUTE_S = 60.0
ADVICE = 3
"""Lines of advice to a cause that several rules found."""
LIKELY = 0.65
"""Confidence from which on a cause takes the symptoms that it explains, however certain they are."""


def rule(function: Rule) -> Rule:
    """Marks a generator of findings about steps that ran as a rule. Its name finishes the sentence "this run has a
    ...", its docstring is its help page: a first line, then Means, Matters, Try and Source, and doctests of a run that
    fires it and one that does not. A rule in a module of this package is found by itself; one elsewhere is handed to
    `diagnose`."""

    @functools.wraps(function)
    def judged(run: Run) -> Iterator[Finding]:
        if len(run.steps):
            yield from function(run)

    return rule_of_program(judged)


def rule_of_program(function: Rule) -> Rule:
    """Marks a rule that needs no step: what was asked for and the data say enough, even if the first step failed."""
    function.is_rule = True  # type: ignore[attr-defined]
    return function


def collect(module) -> list[Rule]:
    """The rules defined in a module, in the order of its source."""
    members = [
        member
        for member in vars(module).values()
        if getattr(member, "is_rule", False) and member.__module__ == module.__name__
    ]
    return sorted(members, key=lambda member: inspect.unwrap(member).__code__.co_firstlineno)


def diagnose(run: Run, rules: Iterable[Rule] | None = None) -> list[Finding]:
    """What is wrong with a run, the likeliest root cause first, its consequences folded under it.

    Args:
      run: A run, finished or not.
      rules: The rules to ask. None is `trainrt.findings.ALL`.

    Returns:
      Findings, most severe and most certain first. Of several findings that one cause explains there is one, whose
      `evidence["consequences"]` tells the others. A rule that raises becomes an info that names the rule and the
      error, and the others go on.
    """
    if rules is None:
        from trainrt.findings import ALL

        rules = ALL
    found: list[Finding] = []
    # Rules compute on NaN rows, which are "not measured", and divide by norms that may be zero.
    with np.errstate(all="ignore"), run.keeping():
        for each in rules:
            try:
                found.extend(each(run))
            except Exception as error:
                found.append(_broken(each, error, run))
    return sorted(fold(_by_length(run, finding) for finding in found), key=_rank)


def _by_length(run: Run, finding: Finding) -> Finding:
    """The finding; of time lost in a run that is over in a minute an info: it may be the doing of another program."""
    seconds = float(run.wall_time[-1] - run.wall_time[0]) if len(run.steps) else 0.0
    if finding.severity == "warning" and finding.causes[0] in TIME_CAUSES and seconds < MINUTE_S:
        return dataclasses.replace(finding, severity="info")
    return finding


def fold(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for each root cause: the others that name it become its consequences.

    What begins at or after the first non-finite number follows from it, whatever else it looks like.
    """
    findings = list(findings)
    origin = min((f for f in findings if f.rule == "nonfinite" and f.severity == "error"), key=_start, default=None)
    if origin is not None:
        later = [f for f in findings if f is not origin and f.rule in DYNAMICS and f.steps[0] >= origin.steps[0]]
        findings = [f for f in findings if f is not origin and f not in later]
        for finding in sorted(later, key=_rank):
            origin = _absorb(origin, finding)
        findings.append(origin)
    heads: list[Finding] = []
    for finding in sorted(findings, key=lambda f: (_is_symptom_of_another(f, findings), _rank(f))):
        head = next((i for i, other in enumerate(heads) if _explains(other, finding)), None)
        if head is None:
            heads.append(finding)
        else:
            heads[head] = _absorb(heads[head], finding)
    return heads


def _is_symptom_of_another(finding: Finding, findings: list[Finding]) -> bool:
    """Whether a finding is a way to die, however certain, and another one that is likely enough is what kills so."""
    if finding.causes[:1] not in (("dying_relu",), ("exploding_gradient",)):
        return False
    return any(
        other.causes
        and other.confidence >= LIKELY
        and SEVERITIES.index(other.severity) >= SEVERITIES.index(finding.severity)
        and other.causes[0] not in _DEATHS
        and finding.causes[0] in EXPLAINS.get(other.causes[0], ())
        for other in findings
    )


def _start(finding: Finding) -> int:
    return finding.steps[0]


def _explains(head: Finding, finding: Finding) -> bool:
    if not (head.causes and finding.causes):
        return False
    # A symptom with no cause of its own is what any cause that is known brings about.
    if finding.rule == "stagnation" and head.severity != "info":
        return True
    brings = (head.causes[0], *EXPLAINS.get(head.causes[0], ()))
    # A weight at rest has as many possible reasons as it names: one of them is known.
    return any(cause in brings for cause in (finding.causes if finding.rule == "dead_update" else finding.causes[:1]))


def _absorb(head: Finding, finding: Finding) -> Finding:
    consequence = {"rule": finding.rule, "where": list(finding.where), "message": finding.message}
    evidence = {**head.evidence, "consequences": [*head.evidence.get("consequences", []), consequence]}
    steps = (min(head.steps[0], finding.steps[0]), max(head.steps[1], finding.steps[1]))
    if head.causes[0] != finding.causes[0] or head.rule == "nonfinite":
        # Where it began is the point: what followed elsewhere stays with the consequence.
        return dataclasses.replace(head, steps=steps, evidence=evidence)
    # The run as a whole, (), already contains every weight.
    where = _union(head.where, finding.where) if head.where and finding.where else ()
    # Nobody tries more than that, and the first finding's own come first.
    causes, advice = _union(head.causes, finding.causes)[:5], _union(head.advice, finding.advice)[:ADVICE]
    return dataclasses.replace(head, where=where, causes=causes, steps=steps, evidence=evidence, advice=advice)


def _union(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*left, *right)))


def _rank(finding: Finding):
    of_time = finding.causes[:1] != () and finding.causes[0] in TIME_CAUSES
    return (
        -SEVERITIES.index(finding.severity),
        of_time,
        -finding.confidence,
        finding.steps[0],
        finding.rule,
        finding.where,
    )


def about(
    run: Run,
    rule: str,
    severity: str,
    confidence: float,
    causes: tuple[str, ...],
    message: str,
    evidence: dict,
    advice: tuple[str, ...],
    where: tuple[str, ...] = (),
    steps: tuple[int, int] | None = None,
) -> Finding:
    """A finding about all steps of a run, unless told which. A look after the last step is of that step."""
    first, last = _span(run)
    steps = (first, last) if steps is None else (min(steps[0], last), min(steps[1], last))
    return Finding(rule, severity, confidence, causes, where, steps, message, evidence, advice)


def _span(run: Run) -> tuple[int, int]:
    return (int(run.steps[0, 0]), int(run.steps[-1, 1])) if len(run.steps) else (0, 0)


def _broken(each: Rule, error: Exception, run: Run) -> Finding:
    name = getattr(each, "__name__", repr(each))
    return Finding(
        rule=name,
        severity="info",
        confidence=0.0,
        causes=(),
        where=(),
        steps=_span(run),
        message=f"The rule {name} could not judge this run: {type(error).__name__}: {error}",
        evidence={"error": type(error).__name__},
        advice=("Please report it with the log directory; the other rules are not affected.",),
    )


def explain(each: Rule) -> str:
    """The help page of a rule: its docstring without the doctests' markup of module paths."""
    return inspect.getdoc(each) or f"{each.__name__} has no docstring."


def _code(function: Callable, seen: set[Callable]) -> str:
    """Source of a function, and of those of its file that it calls and that are no rules of their own."""
    seen.add(function)
    source = inspect.getsource(function)
    known = vars(inspect.getmodule(function))
    called = [known[word] for word in dict.fromkeys(re.findall(r"\w+", source)) if inspect.isfunction(known.get(word))]
    helpers = [each for each in called if each.__module__ == function.__module__ and not hasattr(each, "is_rule")]
    return "".join([source, *(_code(each, seen) for each in helpers if each not in seen)])


def naming(cause: str, rules: Sequence[Rule]) -> list[Rule]:
    """The rules that may name a cause: those whose code does, helpers of its file with it, or, where none does, all of
    the file that does."""
    word = re.compile(rf"\b{re.escape(cause)}\b")
    own = [each for each in rules if word.search(_code(inspect.unwrap(each), set()))]
    return own or [each for each in rules if word.search(Path(inspect.getfile(inspect.unwrap(each))).read_text())]
