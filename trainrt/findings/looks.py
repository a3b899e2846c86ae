"""What the probes of a run saw, as rules read it; see `trainrt.looks.probe` for the content of a look."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainrt.record.run import Run
from trainrt.record.vocabulary import Document


def looks(run: Run) -> list[dict[str, Any]]:
    """The looks into the model, oldest first; those that were skipped are left out."""
    found = [dict(document.content) for document in run.documents if document.kind == "probe"]
    return [look for look in found if not look.get("skipped") and look.get("layers")]


def value(part: Any, name: str) -> float:
    """A number of a part of a look, infinite ones too; NaN where there is none.

    >>> value({"after": "inf"}, "after"), value(None, "after")
    (inf, nan)
    """
    known = part.get(name) if isinstance(part, Mapping) else None
    if isinstance(known, str) and known in ("inf", "-inf"):
        return float(known)
    return float(known) if isinstance(known, (int, float)) and not isinstance(known, bool) else math.nan


def layers(look: Mapping[str, Any], *activations: str) -> list[dict[str, Any]]:
    """The layers of a look with one of the activations, the model's output layer left out; all of them without."""
    known = [layer for layer in look.get("layers") or [] if "units" in layer]
    hidden = known[:-1] if len(known) > 1 else []
    return [layer for layer in hidden if not activations or layer.get("activation") in activations]


def span(seen: list[dict[str, Any]]) -> tuple[int, int]:
    """First and last step of some looks."""
    steps = [int(look.get("step", 0)) for look in seen]
    return (min(steps), max(steps))


def example(step: int = 0, **content: Any) -> Document:
    """The document of a look, for the help pages of rules: a healthy one but for what is given."""
    known: dict[str, Any] = {
        "step": step,
        "when": "start" if not step else "end",
        "rows": 256,
        "source": "arrays",
        "layers": [layer("first"), layer("middle"), layer("last", activation="sigmoid", units=1)],
        "outputs": [{"shape": [256, 1], "spread": 0.5, "sums_to_one": [], "units": 1}],
        "loss": {"total": 0.69, "data": 0.69, "regularization": 0.0, "inference": None},
        "reference": {"constant": 0.69, "perfect": 0.01, "opposite": 4.6, "exact": 0.0},
        "inference": None,
        "gradient": {"norm": 1.0, "unreached": [], "zero": [], "nonfinite": [], "regularised": {}},
        "advance": {"steps": 1, "predicted": -0.01, "actual": -0.009, "before": 0.69, "after": 0.681},
        "errors": {},
    }
    return Document("probe", step, known | content)


def layer(path: str, **numbers: Any) -> dict[str, Any]:
    """A layer of a look, for the help pages of rules: a healthy one but for what is given."""
    known = {"path": path, "class": "Dense", "activation": "relu", "shape": [256, 16], "units": 16, "spread": 0.8}
    known |= {"zero_units": 0.05, "constant_units": 0.05, "equal_units": 0.05, "saturated_units": None}
    return known | {"saturated_share": None, "mean": 0.4, "std": 0.6, "min": 0.0, "max": 3.0} | numbers
