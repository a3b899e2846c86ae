"""Replicas that train together: copies that are not the same any more, statistics of one alone, a slow worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainrt.findings.finding import Finding, shorten
from trainrt.findings.rules import rule
from trainrt.record.run import Run
from trainrt.record.vocabulary import Document  # noqa: F401 - the examples use it


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


SLOWED, ENOUGH = 0.2, 20
"""The share of the time that the others wait for one, and the steps seen, from which on it is told."""


@rule
def slow_worker(run: Run) -> Iterator[Finding]:
    """A worker that all the others wait for.

    Means:   workers meet in every step, where the gradients are summed, and between the calls. Each takes its own time
             from its gradients to the sum; one hardly waits and every other waits for it, for a fifth of the time.
             A worker whose batches come late is not told apart: TensorFlow lets all wait for them, as for input.
    Matters: the training is as slow as its slowest worker, and the rest of the machines idle.
    Try:     look at its machine: another program on it, fewer cores, heat; a callback that works on one worker only.
    Source:  synchronous data-parallel training has no step before everybody's gradient is there.

    >>> told = {"step": 99, "steps": [90.0, 90.0], "wall_s": [9.0, 9.0], "waited_s": [4.0, 0.5]}
    >>> run = Run.synthetic(steps=100)
    >>> run.documents.append(Document("workers", 99, told))
    >>> [(finding.causes, finding.evidence["worker"]) for finding in slow_worker(run)]
    [(('straggler',), 1)]
    >>> run = Run.synthetic(steps=100)
    >>> run.documents.append(Document("workers", 99, {**told, "waited_s": [0.7, 0.5]}))
    >>> list(slow_worker(run))
    []
    """
    told = run.document("workers")
    columns = [told.get(name) or () for name in ("steps", "wall_s", "waited_s")]
    if min(map(len, columns)) < 2 or min(columns[0]) < ENOUGH or min(columns[1]) <= 0:
        return
    shares = [waited / wall for waited, wall in zip(columns[2], columns[1], strict=True)]
    slow = min(range(len(shares)), key=shares.__getitem__)
    least = min(share for i, share in enumerate(shares) if i != slow)
    if least - shares[slow] < SLOWED:
        return
    yield Finding(
        rule="slow_worker",
        severity="warning",
        confidence=0.9,
        causes=("straggler",),
        where=(),
        steps=(0, int(told["step"])),
        message=(
            f"Every other worker waits for worker {slow}: they spend {least:.0%} of their time or more on sums that "
            f"are not there yet, it spends {shares[slow]:.0%}."
        ),
        evidence={"worker": slow, "waited_share": shares, "wall_s": columns[1], "steps": columns[0]},
        advice=(f"Look at the machine of worker {slow}: other programs, fewer cores, heat, a callback of its own.",),
    )


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
