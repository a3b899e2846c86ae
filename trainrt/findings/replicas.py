"""Replicas that train together: copies that are not the same any more, and statistics that each keeps to itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainrt.findings.finding import Finding, shorten
from trainrt.findings.rules import rule
from trainrt.record import Document  # noqa: F401 - the examples use it
from trainrt.run import Run


@rule
def replicas(run: Run) -> Iterator[Finding]:
    """A replica that has drifted: its copy of a variable is not the others' any more.

    Means:   every replica holds a copy of the weights, the optimizer's state and the seeds. They are digested at chunk
             ends, and from some step on one copy has other bits. Whoever has other bits than most is named; where as
             many have these as those, it is whoever differs from replica 0.
    Matters: the replicas train different models. The gradient that they share fits none of them, and what is saved is
             that of one.
    Try:     a callback or layer that changes something on one worker or replica alone: let all of them do it. A
             variable that a layer assigns in its call: `aggregation="mean"`. Otherwise: faulty memory, a faulty link.
    Source:  data-parallel training is one training only while the copies are equal; TensorFlow copies the first values
             and never looks again.

    >>> drift = {"step": 40, "identical_until": 20, "count": 1, "variables": [{"path": "bn/mean", "replicas": [1]}]}
    >>> together = {"replicas": 2, "workers": 1, "comparisons": 3, "drift": drift, "batch_statistics": []}
    >>> run = Run.synthetic(steps=64)
    >>> run.documents.append(Document("replicas", 40, together))
    >>> [(finding.causes[0], finding.where, finding.steps) for finding in replicas(run)]
    [('replica_drift', ('bn/mean',), (21, 40))]
    >>> run = Run.synthetic(steps=64)
    >>> run.documents.append(Document("replicas", 40, {**together, "drift": None}))
    >>> list(replicas(run))
    []
    """
    content = run.document("replicas")
    drift = content.get("drift")
    if drift:
        yield _drifted(content, drift)
    own = content.get("batch_statistics")
    if own:
        yield _apart(content, own, run)


def _drifted(content: Mapping[str, Any], drift: Mapping[str, Any]) -> Finding:
    variables = drift["variables"]
    paths = tuple(variable["path"] for variable in variables)
    odd = sorted({replica for variable in variables for replica in variable["replicas"]})
    workers, count = content.get("workers", 1), content["replicas"]
    names = " and ".join(_named(replica, count, workers) for replica in odd)
    first = drift["identical_until"] + 1
    since = "were never identical" if not first else f"were identical until step {first - 1}"
    return Finding(
        rule="replicas",
        severity="error",
        confidence=0.95,
        causes=("replica_drift",),
        where=paths,
        steps=(first, drift["step"]),
        message=(
            f"{names} of {count} {'has' if len(odd) == 1 else 'have'} other bits than the rest in {shorten(paths)}"
            f"{'' if drift['count'] <= len(paths) else ' and more'}, {drift['count']} variables in all: seen after "
            f"step {drift['step']}; the replicas {since}."
        ),
        evidence={**drift, "replicas": odd},
        advice=(
            "Look for what changes a variable on one replica or worker alone, such as a callback that runs on one "
            "worker only.",
            'Give a variable that a layer assigns in its call aggregation="mean" (self.add_weight(..., '
            'aggregation="mean")).',
        ),
    )


def _apart(content: Mapping[str, Any], layers: Sequence[str], run: Run) -> Finding:
    return Finding(
        rule="replicas",
        severity="info",
        confidence=1.0,
        causes=(),
        where=tuple(layers),
        steps=(0, int(run.steps[-1, 1]) if len(run.steps) else 0),
        message=(
            f"{shorten(list(layers))} normalises by the statistics of each replica's own share of the batch, 1/"
            f"{content['replicas']} of it, and keeps moving averages of that: this run differs from one on a single "
            "device with the whole batch, and what is saved are the averages of replica 0."
        ),
        advice=("keras.layers.BatchNormalization(synchronized=True) takes them over the whole batch.",),
    )


def _named(replica: int, count: int, workers: int) -> str:
    """A replica, and where it is.

    >>> _named(3, count=4, workers=2)
    'Replica 3 (worker 1)'
    """
    return f"Replica {replica}" + (f" (worker {replica * workers // count})" if workers > 1 else "")
