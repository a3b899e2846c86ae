"""What a rule says: a symptom with its root causes, where, since when, on what evidence, and what to try."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SEVERITIES = ("info", "warning", "error")

TIME_CAUSES = frozenset(
    """
    input_bound host_bound launch_bound slow_callback retracing slow_down stragglers straggler throttled
    memory_nearly_full shared_device ecc_errors idle_device
    """.split()  # noqa: SIM905 - as below
)
"""Root causes of time that is lost: they come after those of a model that does not learn."""

CAUSES = TIME_CAUSES | frozenset(
    """
    lr_too_high lr_too_low lr_schedule too_few_updates batch_size_too_small batch_size_too_large wrong_optimizer
    momentum_too_high epsilon_dominates clip_too_tight weight_decay_too_high over_regularised dropout_too_high
    wrong_loss unstable_loss flipped_sign wrong_output_activation missing_activation hidden_activation missing_softmax
    double_softmax wrong_softmax_axis bad_init inputs_unnormalised inputs_too_small inputs_constant
    targets_unnormalised nan_in_data labels_wrong label_range ids_out_of_range unshuffled_data label_leakage
    train_val_overlap train_val_mismatch class_imbalance sample_weights_zero frozen_layers graph_cut constraint_binds
    update_rounding capacity output_units output_shape batchnorm_statistics overfitting replica_drift
    nondeterminism
    vanishing_gradient exploding_gradient dying_relu saturated_activation
    """.split()  # noqa: SIM905 - fifty lines of quotes say no more
)
"""The vocabulary of root causes; the last four are symptoms that may be named where no cause behind them is seen."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run.

    Attributes:
      rule: Name of the rule that found it.
      severity: "info", "warning" or "error".
      confidence: 0 to 1, that the first cause is the root cause.
      causes: Ids of `CAUSES`, likeliest first. Empty only for an info.
      where: Paths of weights or layers; () is the run as a whole.
      steps: First and last step of the evidence, counted from 0.
      message: Plain words with the numbers.
      evidence: Series, thresholds and consequences; JSON-able.
      advice: What to try, likeliest first, a line of code where possible.
    """

    rule: str
    severity: str
    confidence: float
    causes: tuple[str, ...]
    where: tuple[str, ...]
    steps: tuple[int, int]
    message: str
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)
    advice: tuple[str, ...] = ()

    def __post_init__(self):
        if self.severity not in SEVERITIES:
            raise ValueError(f"`severity` is one of {SEVERITIES}. Received: {self.severity!r}.")
        if not 0 <= self.confidence <= 1:
            raise ValueError(f"`confidence` is between 0 and 1. Received: {self.confidence!r}.")
        unknown = [cause for cause in self.causes if cause not in CAUSES]
        if unknown or not (self.causes or self.severity == "info"):
            raise ValueError(
                "`causes` are ids of `findings.CAUSES`, at least one for a warning or an error. "
                f"Received: {self.causes!r}" + (f", of which {unknown} are unknown." if unknown else ".")
            )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # in a notebook

    def __str__(self) -> str:
        """One line: severity, rule, causes, where, since when, message."""
        place = f" at {shorten(self.where)}" if self.where else ""
        since = f"step {self.steps[0]}" if self.steps[0] == self.steps[1] else f"steps {self.steps[0]}-{self.steps[1]}"
        cause = f" ({self.causes[0]})" if self.causes else ""
        return f"{self.severity}: {self.rule}{cause}{place}, {since}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON can hold it; NaN and infinities become strings, since JSON has none."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Finding:
        """The finding that `to_dict` wrote. Fields that a newer version added are left out."""
        known = {field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}
        for name in ("causes", "where", "steps", "advice"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)


def findings_of_time(findings: Sequence[Finding]) -> list[Finding]:
    """Those whose root cause only costs time."""
    return [finding for finding in findings if finding.causes and finding.causes[0] in TIME_CAUSES]


def shorten(names: Sequence[str], limit: int = 3) -> str:
    """The names in one phrase, a count in place of those past the limit.

    >>> shorten(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    if len(names) <= limit + 1:
        return ", ".join(names)
    return f"{', '.join(names[:limit])} and {len(names) - limit} more"


def _plain(value):
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
