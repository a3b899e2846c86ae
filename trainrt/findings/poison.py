"""Steps that were taken back because they would have poisoned the training."""

from __future__ import annotations

from collections.abc import Iterator

from trainrt.findings.finding import Finding
from trainrt.findings.rules import rule
from trainrt.record.run import Run
from trainrt.record.vocabulary import Document  # noqa: F401 - the examples use it


@rule
def taken_back(run: Run) -> Iterator[Finding]:
    """Steps that `on_nonfinite` or `on_spike` took back: which batches, and whether they ended the training.

    Means:   the loss, a gradient or the update of these batches was not finite, or stood out by six standard
             deviations. The step selected what was before it, so that the training never had these batches.
    Matters: a batch now and then is lost and no harm. Many in a row, or the same ones in each epoch, are a fault that
             skipping hides.
    Try:     look at the rows of the batches named; the same in every epoch are bad data. Different ones: a smaller
             learning rate, a clip, or a formula that divides or takes a logarithm near zero.
    Source:  skipping spikes and rewinding, as in PaLM (Chowdhery et al., 2022); here without a rewind.

    >>> batch = {"step": 7, "epoch": 0, "batch": 7, "why": "nonfinite"}
    >>> run = Run.synthetic(steps=64)
    >>> run.documents.append(Document("poison", 7, {"taken_back": [batch], "count": 1, "ended": False}))
    >>> [(finding.rule, finding.severity, finding.steps) for finding in taken_back(run)]
    [('taken_back', 'warning', (7, 7))]
    >>> list(taken_back(Run.synthetic(steps=64)))
    []
    """
    content = run.document("poison")
    taken = content.get("taken_back")
    if not taken:
        return
    count, ended = content["count"], content["ended"]
    by_epoch: dict[int, set[int]] = {}
    for one in taken:
        by_epoch.setdefault(one["epoch"], set()).add(one["batch"])
    again = set.intersection(*by_epoch.values()) if len(by_epoch) > 1 else set()
    spiked = all(one["why"] != "nonfinite" for one in taken)
    named = ", ".join(f"{one['batch']} of epoch {one['epoch'] + 1} ({one['why']})" for one in taken[:5])
    what = f"{count} {'step was' if count == 1 else 'steps were'} taken back"
    repeated = f" Batch {min(again)} was so in every epoch: its rows are bad." if again else ""
    bad_data = ("nan_in_data", "labels_wrong") if again and not spiked else ()
    yield Finding(
        rule="taken_back",
        severity="error" if ended else "warning",
        confidence=0.9 if again else 0.5,
        causes=bad_data
        or (("lr_too_high", "labels_wrong") if spiked else ("unstable_loss", "nan_in_data", "lr_too_high")),
        where=(),
        steps=(taken[0]["step"], taken[-1]["step"]),
        message=f"{what}: batch {named}{'' if count <= 5 else ' and more'}."
        f"{' That ended the training.' if ended else ''}{repeated}",
        evidence={"taken_back": taken[:50], "count": count},
        advice=(
            "Look at the rows of these batches: an order that is known (shuffle=False) says which they are.",
            "A smaller learning rate, or clip=1.0.",
        ),
    )
