"""NaN and infinities: where the first one was, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainrt.findings import program
from trainrt.findings.finding import Finding, shorten
from trainrt.findings.rules import rule
from trainrt.findings.series import percentile, scalar
from trainrt.record.run import Run

GREW = 10.0
"""Growth of a norm over its own median, shortly before, that makes the first NaN the end of a divergence."""
SCALING = 0.1
"""Share of steps that a dynamic loss scale may skip: it finds its ceiling by overflowing."""


@rule
def nonfinite(run: Run) -> Iterator[Finding]:
    """A number that is NaN or infinite: the first tensor and step, and what followed.

    Means:   something became NaN or infinite. Within one step the order is loss, gradients, optimizer slots, updates,
             weights; of several gradients the one next to the loss comes first, since NaN travels backwards.
    Matters: one NaN in a weight makes every later output NaN; the run is lost from that step on.
    Try:     NaN loss at the very first step: look at the data and at the loss's logarithms and divisions. Norms that
             grew before: a smaller learning rate, or a clip. Otherwise: one bad sample, or an unstable formula.
    Source:  SageMaker Debugger's ExplodingTensor, with the order of cause; Keras's TerminateOnNaN sees only the loss.

    >>> run = Run.synthetic(steps=64, gradient_nonfinite=[0.0] * 40 + [1.0] * 24)
    >>> [(finding.rule, finding.steps[0]) for finding in nonfinite(run)]
    [('nonfinite', 40)]
    >>> list(nonfinite(Run.synthetic(steps=64)))
    []
    """
    if not len(run.steps):
        return
    bad = _bad(run)
    ever = {subject: np.asarray(mask.any(axis=1)) for subject, mask in bad.items()}
    any_window = np.asarray(np.stack(list(ever.values())).any(axis=0))
    if not any_window.any() or _only_loss_scaling(run, ever, any_window):
        return
    t = int(np.argmax(any_window))
    subject = next(name for name, windows in ever.items() if windows[t])
    where, others = _origin(run, subject, bad[subject][t])
    first, last = (int(step) for step in run.steps[t])
    causes, confidence, story, advice = _cause(run, t, subject, np.flatnonzero(bad[subject][t]))
    what = subject if subject in ("loss", "gradient", "update", "weight") else f"optimizer slot {subject}"
    place = f" of {where[0]}" if where else ""
    more = f" (and {others} other weights in the same step)" if others else ""
    when = f"at step {first}" if first == last else f"in steps {first} to {last}"
    after, lost = _aftermath(run, ever, t)
    yield Finding(
        rule="nonfinite",
        severity="error" if lost else "warning",
        confidence=confidence,
        causes=causes,
        where=where,
        steps=(first, int(run.steps[-1, 1])),
        message=f"The first NaN or infinity is in the {what}{place}{more}, {when}; {story}. {after}",
        evidence={
            "subject": subject,
            "first_steps": {
                name: int(run.steps[np.argmax(windows), 0]) for name, windows in ever.items() if windows.any()
            },
            "elements": _elements(run, subject, bad[subject][t], t),
            "gradient_norm_before": scalar(run, "gradient_norm")[max(0, t - 20) : t].tolist(),
            "loss_before": scalar(run, "loss")[max(0, t - 20) : t].tolist(),
        },
        advice=advice,
    )


def _bad(run: Run) -> dict[str, np.ndarray]:
    """Subject -> [T, P] bool ([T, 1] for the loss), in the order of cause within a step."""
    subjects = ("gradient", *run.roster.slots, "update", "weight")
    loss = np.stack([scalar(run, "loss", column) for column in ("mean", "min", "max")])
    # A loss that was not recorded is NaN in all columns of all windows; there is nothing to say about it.
    recorded = "loss" in run.roster.scalars
    bad = {"loss": np.logical_and(~np.isfinite(loss).all(axis=0)[:, None], recorded)}
    for subject in subjects:
        bad[subject] = np.nan_to_num(run.moments(subject).nonfinite) > 0
    return bad


def _origin(run: Run, subject: str, bad: np.ndarray) -> tuple[tuple[str, ...], int]:
    """The weight where it began, and how many others went with it."""
    if subject == "loss":
        return (), 0
    hit = np.flatnonzero(bad)
    # The roster is in the order of the layers: the gradient next to the loss is the last one.
    origin = hit[-1] if subject == "gradient" else hit[0]
    return (run.roster.parameters[origin].path,), len(hit) - 1


def _elements(run: Run, subject: str, bad: np.ndarray, t: int) -> dict[str, int]:
    if subject == "loss":
        return {}
    counts = run.moments(subject).nonfinite[t]
    return {run.roster.parameters[p].path: int(counts[p]) for p in np.flatnonzero(bad)}


def _only_loss_scaling(run: Run, ever: dict[str, np.ndarray], any_window: np.ndarray) -> bool:
    """Whether all that happened is a dynamic loss scale that overflowed now and then, as it is meant to."""
    if "loss_scale" not in run.roster.scalars or any(ever[name].any() for name in ever if name != "gradient"):
        return False
    half = len(any_window) // 2
    return bool(any_window.mean() <= SCALING or (any_window[:half].mean() <= 0.5 and not any_window[half:].any()))


def _data_is_finite(run: Run) -> bool:
    """Whether the data passport has seen the data, and nothing in it that is not a number."""
    seen = [leaf for role in ("inputs", "targets") for leaf in program.leaves(run, role)]
    return bool(seen) and not any((leaf.get("nan_share") or 0) + (leaf.get("inf_share") or 0) for leaf in seen)


def _cause(run: Run, t: int, subject: str, hit: np.ndarray) -> tuple[tuple[str, ...], float, str, tuple[str, ...]]:
    causes, confidence, story, advice = _suspects(run, t, subject, hit)
    if _data_is_finite(run) and "nan_in_data" in causes:
        causes = tuple(cause for cause in causes if cause != "nan_in_data")
        advice = tuple(line for line in advice if not line.startswith("Check the data"))
        story, confidence = f"{story} (the data that was fed is finite)", max(confidence, 0.8)
    return causes, confidence, story, advice


def _suspects(run: Run, t: int, subject: str, hit: np.ndarray) -> tuple[tuple[str, ...], float, str, tuple[str, ...]]:
    data = ("Check the data: np.isfinite(x).all() and np.isfinite(y).all().",)
    loss = (
        "Give the loss logits instead of probabilities: from_logits=True, and no activation on the output.",
        "Guard logarithms, divisions and square roots in custom code: tf.math.divide_no_nan, x + 1e-7.",
    )
    rate = scalar(run, "learning_rate")[t] if "learning_rate" in run.roster.scalars else float("nan")
    lower = (
        f"Lower the learning rate: model.optimizer.learning_rate = {rate / 10:.1g}."
        if np.isfinite(rate)
        else ("Lower the learning rate to a tenth.")
    )
    grown, text = _growth(run, t)
    if subject == "gradient" and hit.tolist() == [0] and len(run.roster.parameters) > 1 and not grown:
        # A kernel's gradient is its inputs times what comes from behind, which is finite.
        return ("nan_in_data", "unstable_loss"), 0.85, "only the first kernel's has: it comes from the inputs", data
    if run.steps[t, 0] == 0:
        if subject == "loss":
            return (
                ("nan_in_data", "unstable_loss", "label_range"),
                0.7,
                "the very first loss already is",
                data + loss + ("Check the labels: integer labels must be under the number of the output's units.",),
            )
        return (
            ("unstable_loss", "nan_in_data", "bad_init"),
            0.6,
            ("it happened in the very first step while the loss was finite"),
            loss + data,
        )
    if grown:
        norms = scalar(run, "gradient_norm")[:t]
        clip = percentile(norms, 90)
        advice: tuple[str, ...] = (lower,)
        if np.isfinite(clip) and clip > 0:
            advice += (
                f"Clip what is rare: trainrt.fit(..., clip={clip:.2g}), the 90th percentile of the gradient norms "
                "before.",
            )
        return ("lr_too_high", "exploding_gradient", "inputs_unnormalised"), 0.85, text, advice
    if any(epoch.step < run.steps[t, 0] for epoch in run.epochs):
        # All samples have been seen once without harm.
        return ("unstable_loss", "lr_too_high", "nan_in_data"), 0.6, "no norm had grown before", (*loss, lower)
    return (
        ("nan_in_data", "unstable_loss", "lr_too_high"),
        0.6,
        ("no norm had grown before and the data are in their first pass"),
        (*data, *loss, lower),
    )


def _growth(run: Run, t: int) -> tuple[bool, str]:
    """Whether a norm or the loss ran away in the windows before, and the words for it."""
    update = run.moments("update").array
    series = {
        "gradient norm": scalar(run, "gradient_norm"),
        "loss": np.abs(scalar(run, "loss")),
        "update norm": np.sqrt(np.nansum(update[:, :, 6], axis=1)),
        "weight norm": np.sqrt(np.nansum(run.moments("weight").array[:, :, 6], axis=1)),
    }
    best = ("", 0.0, 0.0, 0.0)
    for name, values in series.items():
        before = values[: t + 1]
        before = before[np.isfinite(before) & (before > 0)]
        if len(before) < 2:
            continue
        # Judged by its own past: a run of two or three steps has little else than its first value.
        usual = min(before[0], float(np.median(before)))
        top = float(before[-5:].max())
        if top > GREW * usual and top / usual > best[1]:
            best = (name, top / usual, usual, top)
    name, factor, usual, top = best
    return bool(name), f"before it, the {name} grew {factor:.3g}-fold, from {usual:.3g} to {top:.3g}"


def _aftermath(run: Run, ever: dict[str, np.ndarray], t: int) -> tuple[str, bool]:
    """What followed, and whether the run is lost."""
    weights = run.moments("weight")
    hit = np.nan_to_num(weights.nonfinite[-1]) > 0
    if hit.any():
        since = int(run.steps[np.argmax(ever["weight"]), 0])
        paths = [each.path for each, bad in zip(run.roster.parameters, hit, strict=True) if bad]
        which = "all weights" if hit.all() else shorten(paths)
        return f"From step {since} on {which} held NaN or infinities: everything after is lost.", True
    windows = np.asarray(np.stack(list(ever.values())).any(axis=0))
    if windows[-1]:
        return "The weights stayed finite, but it had not ended when the run did.", True
    last = int(run.steps[np.flatnonzero(windows)[-1], 1])
    return f"The weights stayed finite and the last one was at step {last}.", False
