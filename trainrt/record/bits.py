"""Where the bits of two runs part: the first step, and in it the first stage and tensor.

Runs keep exact digests when they are asked to (`trainrt.fit(..., digests=1)`, or `deterministic=True` for the variables
now and then). Of runs without, the recorded moments are compared: a moment that differs proves that the bits do, equal
moments prove nothing, and the verdict says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trainrt.record.run import Run
from trainrt.record.vocabulary import GRADIENT, UPDATE, WEIGHT

STAGES = ("batch", "random state", "layer output", "loss", "gradient", "slot", "variable")
"""What a step reads and writes, in this order: the first that differs is nearest to the cause."""

MEANS = {
    "batch": "the input pipeline gave other data",
    "random state": "a random generator stood elsewhere before the step",
    "layer output": "an op of the forward pass of this layer computed other bits from equal inputs",
    "loss": "the loss computed other bits from equal layer outputs",
    "gradient": "an op of the backward pass computed other bits, at or after this weight's layer",
    "slot": "the optimizer computed another state from equal gradients",
    "variable": "the update computed another value from equal gradients",
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where two runs part.

    Attributes:
      step: The first step that differs.
      stage: The first stage in it, one of `STAGES`; "weights at the start" where they began differently.
      names: The tensors of that stage that differ, the one nearest to the cause first.
      compared: How many tensors of that stage were compared.
      after: The last step before it whose digests were compared and equal; None: there was none.
      by: "digests" or "moments".
    """

    step: int
    stage: str
    names: tuple[str, ...]
    compared: int
    after: int | None
    by: str

    @property
    def exact(self) -> bool:
        """Whether the step before was compared too, so that the difference arose in this very step."""
        return self.step == 0 or self.after == self.step - 1

    def __str__(self) -> str:
        more = f" and {len(self.names) - 1} more of {self.compared}" if len(self.names) > 1 else ""
        since = "" if self.exact else f" (or after step {self.after})" if self.after is not None else " (or before)"
        means = f": {MEANS[self.stage]}" if self.stage in MEANS and self.exact and self.by == "digests" else ""
        return f"step {self.step}{since}, {self.stage}: {self.names[0]}{more}{means}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a comparison of two runs' bits says.

    Attributes:
      difference: Where they part; None: nowhere that was looked at.
      digests: How many digests were compared.
      steps: How many steps had any.
      lengths: How many steps each of the two ran, as far as it recorded them.
      weights: Whether the weights after the last step agree; None: not recorded.
      conditions: What the bits depend on and differs between the passports: name -> (left, right).
    """

    difference: Difference | None
    digests: int
    steps: int
    lengths: tuple[int, int]
    weights: bool | None
    conditions: dict[str, tuple[Any, Any]]

    @property
    def identical(self) -> bool | None:
        """True: all digests and the last weights are, of as many steps; None: nothing differs, which is no proof."""
        if self.difference is not None or self.weights is False:
            return False
        return True if self.weights and self.digests and self.lengths[0] == self.lengths[1] else None

    def __str__(self) -> str:
        if self.difference is not None:
            first = f"The bits differ from {self.difference}."
        elif self.lengths[0] != self.lengths[1]:
            left, right = (f"{steps:,}" for steps in self.lengths)
            common = f"all {self.digests:,} digests agree" if self.digests else "nothing recorded differs"
            first = f"One ran {left} steps, the other {right}; in those that both ran {common}."
        elif self.weights is False:
            first = "The bits differ: the weights at the end do, and nothing recorded tells since when."
        elif self.identical:
            first = f"Bit-identical: {self.digests:,} digests of {self.steps:,} steps, and the weights at the end."
        else:
            first = (
                "Nothing recorded differs, which is no proof: pass digests=1 to trainrt.fit to record exact digests."
                if self.weights is None
                else "The weights at the end are bit-identical; no digests of the steps were recorded."
            )
        rest = [f"  {name}: {left!r} against {right!r}" for name, (left, right) in self.conditions.items()]
        return "\n".join([first, *(["The passports differ in what bits depend on:", *rest] if rest else [])])


def first_difference(left: Run, right: Run) -> Difference | None:
    """Where the bits of two runs part; None: nowhere that was recorded."""
    return compare_bits(left, right).difference


def compare_bits(left: Run, right: Run) -> Verdict:
    """Compares the bits of two runs, by their digests and, where these are missing, by their moments."""
    started = _start(left, right)
    known = digests_of(left), digests_of(right)
    exact, digests, steps = _by_digests(*known)
    rough = _by_moments(left, right)
    difference = started or exact
    if difference is None or (rough is not None and rough.step < difference.step and started is None):
        difference = rough
    ends = [(run.end or {}).get("weights_digest") for run in (left, right)]
    weights: bool | None = None if None in ends else ends[0] == ends[1]
    if weights is None and exact is None and _digested_to_the_end(*known):
        weights = True
    lengths = _length(left, known[0]), _length(right, known[1])
    return Verdict(difference, digests, steps, lengths, weights, conditions(left.environment, right.environment))


def _start(left: Run, right: Run) -> Difference | None:
    a, b = (run.environment.get("weights_digest") for run in (left, right))
    if a is None or b is None or a == b:
        return None
    return Difference(0, "weights at the start", ("the initial weights",), 1, None, "digests")


Known = dict[tuple[int, int], dict[tuple[str, str], str]]
"""The digests of a run, as `digests_of` returns them."""


def digests_of(run: Run) -> Known:
    """(step, 0 inside it or 1 after it) -> (stage, name) -> 16 hexadecimal digits, in the order of the step."""
    names: dict[str, list[tuple[str, str]]] = {}
    found: Known = {}
    for document in run.documents:
        if document.kind != "digests":
            continue
        content = document.content
        of = str(content.get("of"))
        if content.get("names"):
            names[of] = [(str(stage), str(name)) for stage, name in content["names"]]
        for step, text in zip(content.get("steps", ()), content.get("values", ()), strict=False):
            parts = [text[i : i + 16] for i in range(0, len(text), 16)]
            found[int(step), int(of == "variables")] = dict(zip(names.get(of, ()), parts, strict=False))
    return found


def _length(run: Run, digests: Known) -> int:
    """How many steps it ran, as far as it says."""
    digested = max((step for step, _ in digests), default=-1)
    return 1 + max(digested, int(run.steps[-1, 1]) if len(run) else -1)


def _digested_to_the_end(left: Known, right: Known) -> bool:
    """Whether the last digests of both runs are of all variables after the same last step."""
    lasts = [max(digests, default=None) for digests in (left, right)]
    return lasts[0] is not None and lasts[0][1] == 1 and lasts[0] == lasts[1]


def _by_digests(a: Known, b: Known) -> tuple[Difference | None, int, int]:
    """(where they part, digests compared, steps compared)."""
    places = sorted(a.keys() & b.keys())
    count, after = 0, None
    for place in places:
        mine, other = a[place], _renamed(b[place], a[place])
        names = [name for name in mine if name in other]
        count += len(names)
        differing = [name for name in names if mine[name] != other[name]]
        if differing:
            stage = min((stage for stage, _ in differing), key=STAGES.index)
            hit = [name for s, name in differing if s == stage]
            if stage == "gradient":  # the backward pass comes to the last weights first
                hit.reverse()
            compared = sum(s == stage for s, _ in names)
            return Difference(place[0], stage, tuple(hit), compared, after, "digests"), count, len(places)
        if place[1] or (place[0], 1) not in a:
            after = place[0]
    return None, count, len({step for step, _ in places})


def _renamed(digests: dict[tuple[str, str], str], like: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    """By the other run's names where names are all that differs: a second model in a process is `sequential_1`."""
    if digests.keys() == like.keys() or [stage for stage, _ in digests] != [stage for stage, _ in like]:
        return digests
    return dict(zip(like, digests.values(), strict=True))


def _by_moments(left: Run, right: Run) -> Difference | None:
    """The first window whose recorded loss or moments differ in any bit."""
    if left.roster.parameters != right.roster.parameters or not len(left) or not len(right):
        return None
    common = [tuple(window) for window in left.steps.tolist()]
    other = {tuple(window): i for i, window in enumerate(right.steps.tolist())}
    pairs = np.array([(i, other[window]) for i, window in enumerate(common) if window in other], int).reshape(-1, 2)
    first: tuple[int, str, tuple[str, ...]] | None = None
    for stage, names, differs in _recorded(left, right, pairs):
        rows = np.flatnonzero(differs.any(1))
        if len(rows) and (first is None or rows[0] < first[0]):
            first = (int(rows[0]), stage, tuple(np.array(names)[differs[rows[0]]].tolist()))
    if first is None:
        return None
    at = pairs[first[0]][0]
    after = int(left.steps[pairs[first[0] - 1][0], 1]) if first[0] else None
    hit = first[2][::-1] if first[1] == "gradient" else first[2]
    return Difference(int(left.steps[at, 0]), first[1], hit, len(left.roster.paths), after, "moments")


def _recorded(left: Run, right: Run, pairs: np.ndarray) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """(stage, names, [windows, names] whether they differ), in the order of the step."""
    i, j = pairs[:, 0], pairs[:, 1]
    if "loss" in left.roster.scalars and "loss" in right.roster.scalars:
        yield "loss", ["loss"], _differ(left.scalar("loss")[i], right.scalar("loss")[j])[:, None]
    subjects = [s for s in left.roster.subjects if s in right.roster.subjects]
    order = {GRADIENT: "gradient", UPDATE: "variable", WEIGHT: "variable"}
    for subject in sorted(subjects, key=lambda s: (STAGES.index(order.get(s, "slot")), s)):
        differs = _differ(left.moments(subject).array[i], right.moments(subject).array[j]).any(-1)
        slot = subject not in order
        names = [f"{path}/{subject}" if slot else path for path in left.roster.paths]
        yield order.get(subject, "slot"), names, np.asarray(differs)


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray((a != b) & ~(np.isnan(a) & np.isnan(b)))


def conditions(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What bits depend on and differs between two passports: name -> (left, right)."""
    a, b = (flat(depends_on(environment)) for environment in (left, right))
    return {name: (a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by their path.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    if not isinstance(value, Mapping):
        return {name: value}
    return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}" if name else str(key)).items()}


PARTS = (
    *("trainrt", "versions", "processor", "devices", "drivers", "variables", "tensorflow", "strategy", "replicas"),
    *("precision", "floatx", "model", "optimizer", "compile", "updates", "random_states", "weights_digest"),
)
"""Parts of a passport that the bits depend on. Threads and oneDNN's switch are among them: one thread instead of two
changed 6 of 14 models, `TF_ENABLE_ONEDNN_OPTS=0` changed 7."""

FIT = (
    *("x", "y", "batch_size", "epochs", "validation_split", "shuffle", "class_weight", "sample_weight"),
    *("initial_epoch", "steps_per_epoch", "clip", "observe", "sum_duplicates"),
)
"""Arguments of `fit` that the bits depend on; of `observe` under XLA alone."""


def depends_on(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a passport that the bits depend on."""
    fit, mode = environment.get("fit") or {}, environment.get("determinism") or {}
    names = ("enforced", "xla", "seed", "cores", "onednn", "data_digest", "model_config")
    variables, model = environment.get("variables") or {}, environment.get("model") or {}
    return {
        **{name: environment.get(name) for name in PARTS},
        # The layers' configurations are there only as far as time allowed; `model_config` is a digest of all.
        "model": {k: v for k, v in model.items() if k != "layers"} if isinstance(model, Mapping) else model,
        "variables": {k: v for k, v in variables.items() if k not in ("SLURM_JOB_ID", "PYTHONHASHSEED")},
        "fit": {name: fit.get(name) for name in FIT if name in fit},
        "determinism": {name: mode.get(name) for name in names},
    }
