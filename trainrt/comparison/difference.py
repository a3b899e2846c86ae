"""What a comparison of two runs says: one difference, with how likely it is that it explains what happened."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainrt.record.run import Run

CONFIGURATION = "configuration"
KINDS = (CONFIGURATION, "data", "environment")

EARLY = 50
"""Steps over which the beginnings of two runs are compared: later they are elsewhere."""

START, FORWARD, BACKWARD, UPDATE, NOWHERE = "start", "forward", "backward", "update", "nowhere"
"""Where in a step a difference acts first: on the weights before the first one, on the loss (the batch, the model, the
loss function), on the gradients, on what becomes of them; nowhere in the training (the validation data)."""

MOST = 0.99
"""No passport alone makes certain."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One way in which BAD was made otherwise than GOOD.

    Attributes:
      kind: One of `KINDS`.
      name: What differs, e.g. `"optimizer.learning_rate"`.
      good: GOOD's value, in words.
      bad: BAD's.
      likelihood: 0 to 1: how likely it is that this explains the difference in behaviour.
      message: What it does, with the numbers.
      causes: Ids of `findings.CAUSES` that it may be behind, likeliest first.
      acts: Where in a step it can act first.
      advice: What to try.
      support: What else in the two runs speaks for or against it, a sentence each.
      evidence: Numbers, JSON-able.
    """

    kind: str
    name: str
    good: str
    bad: str
    likelihood: float
    message: str = ""
    causes: tuple[str, ...] = ()
    acts: tuple[str, ...] = (START, FORWARD, BACKWARD, UPDATE)
    advice: tuple[str, ...] = ()
    support: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def weighed(self, odds: float, why: str = "") -> Difference:
        """The same with its odds multiplied, and the reason.

        >>> Difference("data", "rows", "1", "2", 0.5).weighed(3.0, "because").likelihood
        0.75
        """
        before = min(self.likelihood, MOST)
        after = before * odds / (1 - before + before * odds)
        support = (*self.support, why) if why else self.support
        return dataclasses.replace(self, likelihood=min(after, MOST), support=support)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return plain(dataclasses.asdict(self))


def saturating(effect: float, rate: float = 1.0) -> float:
    """How likely an effect of a size explains anything: 0 for none, towards `MOST` for a large one; NaN is none.

    >>> saturating(0.0), round(saturating(1.0, 2.0), 3)
    (0.0, 0.865)
    """
    return 0.0 if not effect > 0 else min(1 - math.exp(-rate * effect), MOST)


def plain(value: Any) -> Any:
    """As JSON can hold it: tuples as lists, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def said(value: Any) -> str:
    """A value of a passport in a few words.

    >>> said(0.05000000074505806), said(None), said({"class": "L2", "l2": 0.01})
    ('0.05', 'none', 'L2(l2=0.01)')
    """
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        head = str(value.get("class") or value.get("class_name") or "")
        config = value.get("config")
        inner = config if isinstance(config, Mapping) else value
        rest = ", ".join(
            f"{k}={said(v)}" for k, v in inner.items() if k not in ("class", "class_name", "name", "module", "dtype")
        )
        return f"{head}({rest})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(said, value)) + "]"
    return str(value)


def entry(run: Run, *path: str) -> Any:
    """What the passport says at a path of names, None where it says nothing."""
    value: Any = run.environment
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def far_apart(mine: Any, yours: Any, name: str) -> float:
    """How much two values of an option differ: of what remembers the past, by how long it does."""
    if isinstance(mine, bool) or isinstance(yours, bool) or not all(isinstance(v, (int, float)) for v in (mine, yours)):
        return 0.3
    a, b = float(mine), float(yours)
    if name in ("momentum", "beta_1", "beta_2", "rho", "ema_momentum"):
        a, b = 1 / max(1 - a, 1e-6), 1 / max(1 - b, 1e-6)
    return saturating(abs(math.log10(b / a)), 0.8) if a > 0 and b > 0 else 0.4
