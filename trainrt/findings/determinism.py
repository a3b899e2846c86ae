"""Bits that do not come out the same, and habits of Keras that make two runs more alike or less than they should be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.rules import about, rule
from trainrt.record.run import CERTIFICATE, Run

NONLINEAR = frozenset({"Adam", "AdamW", "Nadam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "Adafactor", "Ftrl"})
"""Optimizers whose step is no linear function of the gradient: steps of its parts do not add up to the step of it."""


@rule
def bits_differ(run: Run) -> Iterator[Finding]:
    """A run whose bits were compared with those of other processes, and differ.

    Means:   `trainrt determinism prove` ran the script in fresh processes and found other bits in one of them.
    Matters: the result cannot be had again, and a change of the program cannot be told from chance.
    Try:     what the first stage that differs points to: the input pipeline for a batch, an op of the layer for its
             output, of the backward pass for a gradient, of the optimizer for a variable.
    Source:  the exact digests in the record of the run.

    >>> from trainrt.findings.examples import learning
    >>> run = learning()
    >>> proof = {"identical": False, "processes": 3, "mode": "fast", "result": "The bits differ from step 4"}
    >>> run.environment["certificate"] = proof
    >>> [finding.causes[0] for finding in bits_differ(run)]
    ['nondeterminism']
    >>> run.environment["certificate"] = {**proof, "identical": True}
    >>> list(bits_differ(run))
    []
    """
    proof = run.environment.get(CERTIFICATE)
    if not isinstance(proof, Mapping) or proof.get("identical") is not False:
        return
    parted = proof.get("difference")
    known: dict[str, Any] = dict(parted) if isinstance(parted, Mapping) else {}
    step = known.get("step")
    last = int(run.steps[-1, 1])
    first = min(max(step, 0), last) if isinstance(step, int) else 0
    fast = proof.get("mode") == "fast"
    yield about(
        run,
        "bits_differ",
        "warning",
        0.95,
        ("nondeterminism",),
        f"{proof.get('processes')} processes of the same script gave different bits: {proof.get('result')}",
        {"stage": known.get("stage"), "mode": proof.get("mode")},
        (
            "trainrt.fit(..., deterministic=True, seed=1), then prove it again."
            if fast
            else "trainrt determinism check SCRIPT lists the ops that stay non-deterministic.",
        ),
        where=tuple(map(str, known.get("names") or ())),
        steps=(first, last),
    )


@rule
def varying_op(run: Run) -> Iterator[Finding]:
    """An op that gives other bits from time to time, though determinism is on.

    Means:   the step holds an op that TensorFlow's determinism neither fixes nor refuses on this device.
    Matters: the training is not reproducible, and nothing says so: `tf.math.bincount` with float weights gave 7 results
             in 300 calls on two cores.
    Try:     the way round that is named with the op.
    Source:  measured on TensorFlow 2.21; the preflight's table of ops.

    >>> from trainrt.findings.examples import learning
    >>> from trainrt.record.vocabulary import Document
    >>> issue = {"op": "DenseBincount", "effect": "varies", "where": "CPU", "layer": "count", "why": "threads race",
    ...          "remedy": "use unsorted_segment_sum"}
    >>> run = learning()
    >>> run.documents.append(Document("preflight", 0, {"gpu": False, "issues": [issue]}))
    >>> [finding.where for finding in varying_op(run)]
    [('count',)]
    >>> run.documents.append(Document("preflight", 0, {"gpu": True, "issues": [issue]}))
    >>> list(varying_op(run))
    []
    """
    for issue, gpu in _issues(run):
        if issue.get("effect") != "varies" or issue.get("where") not in ("all", "GPU" if gpu else "CPU"):
            continue
        yield about(
            run,
            "varying_op",
            "warning",
            0.9,
            ("nondeterminism",),
            f"{issue.get('op')} is not deterministic here, though determinism is on: {issue.get('why')}.",
            {"op": issue.get("op")},
            (str(issue.get("remedy")),),
            where=_place(issue),
        )


@rule
def through_the_host(run: Run) -> Iterator[Finding]:
    """A table that travels to the host and back in every step, for the sake of determinism.

    Means:   on a GPU, an op of the step has its deterministic kernel on the CPU: TensorFlow copies the whole tensor.
    Matters: an embedding of 200,000 rows of 100 is 160 MB a step, and the device waits for it.
    Try:     an optimizer with dense updates, or trainrt.fit(..., sum_duplicates=True), which updates on the device.
    Source:  TensorFlow 2.21, `DoScatterOnCpu`; the preflight's table of ops. Read there, not measured on a GPU.

    >>> from trainrt.findings.examples import learning
    >>> from trainrt.record.vocabulary import Document
    >>> issue = {"op": "ResourceScatterSub", "effect": "host copy", "where": "GPU", "layer": "words/embeddings",
    ...          "bytes": 160000000, "why": "the whole table is copied", "remedy": "sum_duplicates=True"}
    >>> run = learning()
    >>> run.documents.append(Document("preflight", 0, {"gpu": True, "issues": [issue]}))
    >>> [finding.severity for finding in through_the_host(run)]
    ['info']
    >>> run.documents.append(Document("preflight", 0, {"gpu": False, "issues": [issue]}))
    >>> list(through_the_host(run))
    []
    """
    for issue, gpu in _issues(run):
        if not gpu or issue.get("effect") != "host copy":
            continue
        size = issue.get("bytes")
        told = f", {size:,} bytes" if isinstance(size, int) else ""
        yield about(
            run,
            "through_the_host",
            "info",
            0.8,
            (),
            f"{issue.get('op')} goes through the host in every step{told}: {issue.get('why')}.",
            {"op": issue.get("op"), "bytes": size},
            (str(issue.get("remedy")),),
            where=_place(issue),
        )


@rule
def unsummed_duplicates(run: Run) -> Iterator[Finding]:
    """An embedding whose repeated ids are updated one by one, by an optimizer for which that is not the same.

    Means:   a batch holds more ids than the table has rows, so ids repeat, and Keras 3 hands each occurrence to the
             optimizer without adding them up first.
    Matters: Adam's step of a sum is not the sum of its steps. Against the same model with one-hot inputs, three steps
             of Adam moved an embedding by 0.15 and ended 0.29 apart.
    Try:     trainrt.fit(..., sum_duplicates=True), which is the mathematics; without it trainrt does what Keras does.
    Source:  measured on Keras 3.15; Keras 2 added duplicates up.

    >>> from trainrt.findings.examples import learning
    >>> table = [{"name": "words", "class": "Embedding", "config": {"input_dim": 50}, "parameters": 800}]
    >>> [finding.where for finding in unsummed_duplicates(learning(layers=table, inputs={"shape": [None, 64]}))]
    [('words',)]
    >>> list(unsummed_duplicates(learning(layers=table, fit={"sum_duplicates": True})))
    []
    """
    config, fit = program.optimizer(run), run.environment.get("fit") or {}
    if config.get("class") not in NONLINEAR:
        return
    train = program.side(run)
    rows, batches = program.number(train.get("rows")), program.number(train.get("batches"))
    inputs = program.leaves(run, "inputs")
    if fit.get("sum_duplicates") or not batches > 0 or len(inputs) != 1:
        return
    shape = list(inputs[0].get("shape") or [])[1:]
    if not all(isinstance(size, int) for size in shape):
        return
    ids = math.prod(shape) * rows / batches
    tables = [layer for layer in program.layers(run) if layer["class"] == "Embedding"]
    hit = [layer for layer in tables if ids > program.number(layer["config"].get("input_dim"))]
    if len(tables) == 1 and hit:
        yield about(
            run,
            "unsummed_duplicates",
            "info",
            0.7,
            (),
            f"A batch holds {ids:,.0f} ids for {hit[0]['config']['input_dim']:,} rows of {hit[0]['name']}: Keras "
            f"updates repeated ids one by one, and {config['class']}'s step of a sum is not the sum of its steps.",
            {"ids_per_batch": ids},
            ("trainrt.fit(..., sum_duplicates=True) adds them up first.",),
            where=(str(hit[0]["name"]),),
        )


@rule
def repeated_order(run: Run) -> Iterator[Finding]:
    """Rows that come in the same order in every epoch, though they are shuffled.

    Means:   shuffle=True, `fit` was given a seed, and the passes that were watched had the same order.
    Matters: with a global seed Keras draws the same permutation in each epoch, so each batch holds the same rows for
             ever: a little of what shuffling is for is lost.
    Try:     a tf.data pipeline with shuffle(..., reshuffle_each_iteration=True), where each epoch has its own order
             and the seed still fixes all of them.
    Source:  the order that the data passport saw; Keras 3.15 behaves so for arrays.

    >>> from trainrt.findings.examples import learning
    >>> order = {"inputs_repeat": True, "targets_repeat": True, "batches": 50}
    >>> again = {"train": {"order": order, "shuffle": True}}
    >>> [finding.severity for finding in repeated_order(learning(**again, fit={"seed": 1}))]
    ['info']
    >>> list(repeated_order(learning(**again)))
    []
    >>> list(repeated_order(learning(train={"order": order, "shuffle": False})))
    []
    """
    if (run.environment.get("fit") or {}).get("seed") is None:  # what was not asked for is Keras's own affair
        return
    train = program.side(run)
    order = train.get("order") or {}
    shuffled = train.get("source") == "arrays" and train.get("shuffle") is True
    if not (shuffled and order.get("inputs_repeat") and order.get("targets_repeat")) or order.get("batches", 0) < 2:
        return
    yield about(
        run,
        "repeated_order",
        "info",
        0.9,
        (),
        "Every epoch had the same order of rows, though shuffle=True: with a global seed Keras draws the same "
        "permutation again.",
        {"batches": order["batches"]},
        (
            "x = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), reshuffle_each_iteration=True)"
            ".batch(batch_size)",
        ),
    )


def _issues(run: Run) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """(issue of the preflight, whether the run was on a GPU)."""
    told = run.document("preflight")
    for issue in told.get("issues") or ():
        if isinstance(issue, Mapping):
            yield issue, bool(told.get("gpu"))


def _place(issue: Mapping[str, Any]) -> tuple[str, ...]:
    layer = issue.get("layer")
    return (str(layer),) if layer else ()
