"""How BAD's data differs from GOOD's, as their data passports tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from trainrt.comparison.difference import FORWARD, NOWHERE, Difference, said, saturating
from trainrt.record.run import Run

DATA = "data"
NOISE = 0.1
"""Half a distance that two samples of the same data have: shifts and scales under it are not told."""


def examine(good: Run, bad: Run) -> Iterator[Difference]:
    """All differences of the data, in no order."""
    for split in ("train", "validation"):
        mine, yours = (_mapping(run.data.get(split)) for run in (good, bad))
        if not mine or not yours:
            if bool(mine) != bool(yours) and good.data and bad.data:
                words = ["given" if each else "none" for each in (mine, yours)]
                yield Difference(DATA, split, words[0], words[1], 0.1, "", (), (NOWHERE,))
            continue
        acts = (FORWARD,) if split == "train" else (NOWHERE,)
        for role, causes in (("inputs", "inputs_unnormalised"), ("targets", "targets_unnormalised")):
            yield from _values(split, role, causes, mine, yours, acts)
        yield from _labels(split, mine, yours, acts)
        yield from _rows(split, mine, yours, acts)
        if split == "train":
            yield from _order(good, bad, mine, yours)
    yield from _overlap(good, bad)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _values(split: str, role: str, cause: str, mine, yours, acts) -> Iterator[Difference]:
    left, right = ([_mapping(v) for v in each.get(role) or []] for each in (mine, yours))
    if len(left) != len(right):
        yield Difference(
            DATA, f"{split}.{role}", f"{len(left)} arrays", f"{len(right)} arrays", 0.7, "", ("nan_in_data",), acts
        )
        return
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        name = f"{split}.{role}" + (f"[{a.get('name') or index}]" if len(left) > 1 else "")
        for what in ("shape", "dtype"):
            if a.get(what) != b.get(what):
                likelihood = 0.5 if what == "shape" else 0.1
                yield Difference(DATA, f"{name}.{what}", said(a.get(what)), said(b.get(what)), likelihood, "", (), acts)
        bad_share = (b.get("nan_share") or 0) + (b.get("inf_share") or 0)
        good_share = (a.get("nan_share") or 0) + (a.get("inf_share") or 0)
        if bad_share != good_share:
            yield Difference(
                DATA,
                f"{name} that are not finite",
                f"{good_share:.2%}",
                f"{bad_share:.2%}",
                0.97 if bad_share > good_share else 0.3,
                "One NaN in a batch makes the loss NaN, and the weights from then on.",
                ("nan_in_data",),
                acts,
            )
        if role == "targets" and _mapping(a.get("labels")).get("counts") is not None:
            continue  # classes have no scale
        yield from _scale(name, cause, a, b, acts)


def _scale(name: str, cause: str, a: Mapping, b: Mapping, acts) -> Iterator[Difference]:
    means, stds = (_array(each.get("mean")) for each in (a, b)), (_array(each.get("std")) for each in (a, b))
    mean_a, mean_b = means
    std_a, std_b = stds
    if mean_a is None or mean_b is None or std_a is None or std_b is None or mean_a.shape != mean_b.shape:
        return
    size = np.maximum(std_a, 1e-12 + 1e-6 * np.abs(mean_a))
    shift = float(np.mean(np.minimum(np.abs(mean_b - mean_a) / size, 5.0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.log10(std_b / std_a)
    decades = np.where(np.isfinite(decades), decades, np.where(std_a == std_b, 0.0, 3.0))
    scale = float(np.mean(np.abs(decades)))
    if shift < NOISE and scale < NOISE / 2:
        return
    factor = 10 ** float(np.median(decades))
    yield Difference(
        DATA,
        f"{name} normalised differently",
        _range(a),
        _range(b),
        max(saturating(shift - NOISE, 1.5), saturating(scale - NOISE / 2, 3.0)),
        f"BAD's values are {factor:.3g} times as spread as GOOD's, and their mean lies {shift:.2g} of GOOD's standard "
        "deviations off.",
        (cause, "inputs_too_small") if factor < 1 and cause.startswith("inputs") else (cause,),
        acts,
        ("Feed what GOOD was fed: the same scaling, computed on the training data, once.",),
        evidence={"shift_in_stds": shift, "scale_in_decades": scale},
    )


def _array(value: Any) -> np.ndarray | None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list) or not value or any(v is None for v in value):
        return None
    return np.asarray(value, np.float64)


def _range(leaf: Mapping) -> str:
    mean, std = (_array(leaf.get(name)) for name in ("mean", "std"))
    middle = f"mean {np.median(mean):.3g}, std {np.median(std):.3g}" if mean is not None and std is not None else ""
    return f"{middle}, {said(leaf.get('min'))} to {said(leaf.get('max'))}"


def _labels(split: str, mine, yours, acts) -> Iterator[Difference]:
    left, right = ([_mapping(_mapping(t).get("labels")) for t in each.get("targets") or []] for each in (mine, yours))
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        name = f"{split}.labels" + (f"[{index}]" if len(left) > 1 else "")
        if a.get("kind") != b.get("kind"):
            yield Difference(
                DATA, f"{name}.kind", said(a.get("kind")), said(b.get("kind")), 0.5, "", ("label_range",), acts
            )
        counts = [_mapping(each.get("counts")) for each in (a, b)]
        totals = [sum(each.values()) for each in counts]
        if not all(totals):
            continue
        classes = set(counts[0]) | set(counts[1])
        shares = [{c: each.get(c, 0) / total for c in classes} for each, total in zip(counts, totals, strict=True)]
        distance = 0.5 * sum(abs(shares[0][c] - shares[1][c]) for c in classes)
        # What two samples of the same distribution differ by: each share by about sqrt(p (1 - p) / n).
        noise = 0.5 * sum(
            math.sqrt(shares[0][c] * (1 - shares[0][c]) * (1 / totals[0] + 1 / totals[1])) for c in classes
        )
        if distance <= 2 * noise:
            continue
        new = sorted(set(counts[1]) - set(counts[0]))
        # A class that only one of them has is another task, however few its rows.
        alone = max((max(s[c] for s in shares) for c in set(counts[0]) ^ set(counts[1])), default=0.0) * 5
        worst = max(classes, key=lambda c: abs(shares[0][c] - shares[1][c]))
        yield Difference(
            DATA,
            f"{name} distribution",
            f"{len(counts[0])} classes, {worst!r} {shares[0][worst]:.0%}",
            f"{len(counts[1])} classes, {worst!r} {shares[1][worst]:.0%}",
            saturating(distance - 2 * noise + alone, 3.0),
            f"{distance:.0%} of the labels would have to change for the same distribution."
            + (f" New: {', '.join(new[:5])}." if new else ""),
            ("labels_wrong", "label_range") if alone else ("class_imbalance", "labels_wrong"),
            acts,
            evidence={"total_variation": distance, "noise": noise},
        )


def _rows(split: str, mine, yours, acts) -> Iterator[Difference]:
    rows = [each.get("rows") for each in (mine, yours)]
    if all(isinstance(r, int) and r > 0 for r in rows) and rows[0] != rows[1]:
        yield Difference(
            DATA,
            f"{split}.rows",
            f"{rows[0]:,}",
            f"{rows[1]:,}",
            saturating(abs(math.log2(rows[1] / rows[0])), 0.5 if split == "train" else 0.1),
            f"BAD has {rows[1] / rows[0]:.2f} times as many rows.",
            ("overfitting",) if rows[1] < rows[0] else (),
            acts,
        )
    copies = _numbers(_mapping(each.get("duplicates")).get("share") for each in (mine, yours))
    if copies and abs(copies[1] - copies[0]) > 0.02:
        yield Difference(
            DATA,
            f"{split}.duplicates",
            f"{copies[0]:.0%}",
            f"{copies[1]:.0%}",
            min(0.6 * abs(copies[1] - copies[0]), 0.6),
            "Rows that are there more than once count more than once.",
            ("train_val_overlap", "class_imbalance"),
            acts,
        )


def _order(good: Run, bad: Run, mine, yours) -> Iterator[Difference]:
    mixed = [share for each in (mine, yours) if (share := _mixed(each)) is not None]
    asked = [_shuffles(each) for each in (mine, yours)]
    if len(mixed) == 2:
        apart = abs(mixed[1] - mixed[0])
        if apart > 0.05 or asked[0] != asked[1]:
            words = [f"{w}; batches hold {m:.0%} of the labels' variety" for w, m in zip(asked, mixed, strict=True)]
            yield Difference(
                DATA,
                "order of the rows",
                words[0],
                words[1],
                max(min(0.98, 1.2 * (apart - 0.05)), 0.12),
                f"A batch of BAD holds {mixed[1]:.0%} of the entropy of labels that a shuffled one would, one of GOOD "
                f"{mixed[0]:.0%}.",
                ("unshuffled_data",),
                (FORWARD,),
                ("Shuffle before batching: fit(..., shuffle=True) for arrays, dataset.shuffle(rows) for a dataset.",),
                evidence={"mixed": mixed},
            )
        return
    if asked[0] != asked[1]:
        worse = asked[1].startswith("not shuffled")
        yield Difference(
            DATA, "order of the rows", asked[0], asked[1], 0.6 if worse else 0.3, "", ("unshuffled_data",), (FORWARD,),
            ("Shuffle before batching: fit(..., shuffle=True) for arrays, dataset.shuffle(rows) for a dataset.",),
        )  # fmt: skip


def _numbers(values: Iterable[Any]) -> list[float]:
    """The values, or nothing if one of them is no number."""
    known = list(values)
    return known if all(isinstance(v, (int, float)) for v in known) else []


def _mixed(split: Mapping) -> float | None:
    """How mixed the labels are: the entropy within a batch over that of a shuffled batch; 1 is as good as shuffled."""
    for target in split.get("targets") or []:
        labels = _mapping(_mapping(target).get("labels"))
        own, ideal = labels.get("batch_entropy"), labels.get("batch_entropy_shuffled")
        if isinstance(own, (int, float)) and isinstance(ideal, (int, float)) and ideal > 0:
            return min(own / ideal, 1.0)
    return None


def _shuffles(split: Mapping) -> str:
    pipeline = _mapping(split.get("pipeline"))
    found = [_mapping(s) for s in pipeline.get("shuffles") or []]
    if found:
        sizes = [
            f"shuffled in a buffer of {s.get('buffer')}"
            + (f" of {s['cardinality']}" if isinstance(s.get("cardinality"), int) else "")
            + (" after batching" if s.get("before_batch") is False else "")
            for s in found
        ]
        return ", ".join(sizes)
    if split.get("source") == "arrays":
        return f"shuffle={split.get('shuffle')}"
    return "not shuffled by the pipeline" if pipeline.get("complete") else "not known to be shuffled"


def _overlap(good: Run, bad: Run) -> Iterator[Difference]:
    told = [_mapping(run.data.get("overlap")) for run in (good, bad)]
    shares = _numbers(each.get("share") for each in told)
    if not shares or abs(shares[1] - shares[0]) <= max(0.01, *map(_luck, told)):
        return
    leaks = "BAD" if shares[1] > shares[0] else "GOOD"
    yield Difference(
        DATA,
        "validation rows in the training data",
        f"{shares[0]:.0%}",
        f"{shares[1]:.0%}",
        min(0.96, 0.5 + abs(shares[1] - shares[0])),
        f"{leaks} was trained on {max(shares):.0%} of its validation rows: its validation metrics tell how much it "
        "remembers, not what it will do with new rows.",
        ("train_val_overlap",),
        (FORWARD, NOWHERE),
        ("Split before anything is shuffled, repeated or augmented, by group where rows belong together.",),
        evidence={"share": {"good": shares[0], "bad": shares[1]}},
    )


def _luck(overlap: Mapping) -> float:
    """Three standard errors of the share, where not all training rows were looked at; else it is exact."""
    shown, rows, share = overlap.get("shown", 1.0), overlap.get("sampled_rows") or 1, overlap.get("share") or 0.0
    if not isinstance(shown, (int, float)) or not 0 < shown < 1:
        return 0.0
    return 3 * math.sqrt(max(share * (1 - share * shown), 0.0) / (rows * shown))
