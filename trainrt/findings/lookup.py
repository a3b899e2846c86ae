"""Ids that are looked up in a table that does not hold them."""

from __future__ import annotations

from collections.abc import Iterator

from trainrt.findings import program
from trainrt.findings.finding import Finding
from trainrt.findings.rules import about, rule_of_program
from trainrt.record.run import Run


@rule_of_program
def ids_beyond_table(run: Run) -> Iterator[Finding]:
    """Ids for which an embedding has no row.

    Means:   the model begins with one embedding, and the ids that were fed to it reach beyond its `input_dim`, or are
             negative.
    Matters: on a CPU the step fails; on a GPU such an id is looked up as zeros, in silence, and never learns.
    Try:     `input_dim` of the largest id and one more: a vocabulary of n words and a padding has n + 1 ids.
    Source:  exact: the extremes are of every batch that was fed. What `tf.gather` does: its documentation.

    >>> from trainrt.findings.examples import learning
    >>> table = [{"name": "words", "class": "Embedding", "config": {"input_dim": 50}, "parameters": 800}]
    >>> beyond = learning(layers=table, inputs={"shape": [None, 64], "min": 0.0, "max": 50.0})
    >>> [(finding.causes[0], finding.where) for finding in ids_beyond_table(beyond)]
    [('ids_out_of_range', ('words',))]
    >>> list(ids_beyond_table(learning(layers=table, inputs={"shape": [None, 64], "min": 0.0, "max": 49.0})))
    []
    """
    first = next((layer for layer in program.layers(run) if layer["class"] not in program.PASSIVE), None)
    if first is None or first["class"] != "Embedding":
        return
    rows = program.number(first["config"].get("input_dim"))
    for side in ("train", "validation"):
        inputs = program.leaves(run, "inputs", side)
        if len(inputs) != 1:
            continue
        low, high = (program.number(inputs[0].get(which)) for which in ("min", "max"))
        if not (high >= rows or low < 0):
            continue
        what = "training" if side == "train" else side
        yield about(
            run,
            "ids_beyond_table",
            "error",
            0.97,
            ("ids_out_of_range",),
            f"The ids of the {what} data reach from {low:,.0f} to {high:,.0f}, and {first['name']} has rows 0 to "
            f"{rows - 1:,.0f}.",
            {"side": side, "min": low, "max": high, "input_dim": rows},
            (
                f"keras.layers.Embedding({high + 1:.0f}, ...)."
                if low >= 0
                else "Give padding and the unknown an id from 0.",
                "Or give all rare words one id: np.where(x < n, x, unknown).",
            ),
            where=(str(first["name"]),),
        )
        return
