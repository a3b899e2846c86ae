"""Where BAD ran otherwise than GOOD: versions, device, flags, the code itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainrt.comparison.difference import Difference, said
from trainrt.record.run import Run

ENVIRONMENT = "environment"

PRIORS = {
    "devices": 0.2,
    "strategy": 0.2,
    "replicas": 0.35,
    "tensorflow.tf32": 0.15,
    "tensorflow.deterministic_ops": 0.1,
    "tensorflow.jit": 0.1,
    "variables": 0.12,
    "versions.tensorflow": 0.2,
    "versions.keras": 0.2,
    "versions.numpy": 0.08,
    "versions": 0.04,
    "trainrt": 0.05,
    "python": 0.05,
    "drivers": 0.05,
    "tensorflow": 0.06,
    "processor": 0.05,
    "command": 0.12,
    "git.commit": 0.2,
    "git.dirty": 0.1,
    "git.changed": 0.15,
    "git.branch": 0.05,
}
"""How likely each is to explain anything, before the runs are looked at; the longest name that fits counts."""

DEFAULT = 0.03
SUMS = tuple(f"determinism.{name}" for name in ("fingerprint", "seed", "changes", "model_config"))
"""Entries that sum up others, or repeat them."""

ELSEWHERE = frozenset(
    """model optimizer compile fit seed precision floatx weights_digest start pid user random_states observed
    unobserved packages updates run_name""".split()  # noqa: SIM905
)
"""Entries of the passport that another examiner speaks of, or that differ between any two runs."""


def examine(good: Run, bad: Run) -> Iterator[Difference]:
    """All differences of the surroundings, in no order."""
    mine, yours = (dict(_flat(run.environment)) for run in (good, bad))
    for name in dict.fromkeys((*mine, *yours)):
        if mine.get(name) != yours.get(name) and name not in SUMS and name.partition(".")[0] not in ELSEWHERE:
            yield Difference(ENVIRONMENT, name, said(mine.get(name)), said(yours.get(name)), _prior(name))
    left, right = (run.environment.get("packages") for run in (good, bad))
    if isinstance(left, Mapping) and isinstance(right, Mapping) and not ("error" in left or "error" in right):
        known = {name.partition(".")[2] for name in (*mine, *yours) if name.startswith("versions.")}
        changed = [
            name
            for name in sorted({*left, *right}, key=str.lower)
            if left.get(name) != right.get(name) and name not in known and name != "trainrt"
        ]
        if changed:
            words = [", ".join(f"{n} {each.get(n, '-')}" for n in changed[:5]) for each in (left, right)]
            yield Difference(
                ENVIRONMENT, f"{len(changed)} other packages", words[0], words[1], 0.06, evidence={"packages": changed}
            )


def _prior(name: str) -> float:
    fitting = [known for known in PRIORS if name == known or name.startswith(f"{known}.")]
    return PRIORS[max(fitting, key=len)] if fitting else DEFAULT


def _flat(value: Any, name: str = ""):
    """Leaves by their path; lists are leaves."""
    if isinstance(value, Mapping) and value and "error" not in value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif not (isinstance(value, Mapping) and "error" in value):
        yield name, value
