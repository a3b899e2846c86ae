"""Layers that rest though they should learn: frozen, or handed to no optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from trainrt.findings import program
from trainrt.findings.finding import Finding, shorten
from trainrt.findings.outcome import outcome
from trainrt.findings.rules import about, rule
from trainrt.record.run import Run

POOR = 0.75


@rule
def frozen(run: Run) -> Iterator[Finding]:
    """Layers that were left frozen.

    Means:   layers with weights are not trainable, and the model learnt little.
    Matters: what is frozen must have learnt before; frozen at a random start it only scatters the inputs.
    Try:     layer.trainable = True, then compile again; freeze only what has loaded weights.
    Source:  exact; frozen layers of a model that learns well are transfer learning, and nobody's business.

    >>> from trainrt.findings.examples import learning, stuck
    >>> layers = [{"name": "a", "class": "Dense", "parameters": 900, "trainable": False, "config": {"units": 9}}]
    >>> [finding.causes[0] for finding in frozen(stuck(layers=layers))]
    ['frozen_layers']
    >>> list(frozen(learning(layers=layers)))
    []
    """
    with_weights = [layer for layer in program.layers(run) if layer.get("parameters")]
    with_weights = [
        layer for layer in with_weights if layer["class"] not in ("Functional", "Sequential", "Normalization")
    ]
    still = [layer for layer in with_weights if layer.get("trainable") is False]
    if not still or not outcome(run).poor(POOR):
        return
    names = tuple(layer["name"] for layer in still)
    share = sum(layer["parameters"] for layer in still) / max(sum(layer["parameters"] for layer in with_weights), 1)
    yield about(
        run,
        "frozen",
        "error",
        0.9,
        ("frozen_layers", "capacity"),
        f"{len(still)} of {len(with_weights)} layers with weights are frozen ({share:.0%} of the "
        "parameters), and the model "
        f"learnt little (skill {outcome(run).skill:.2f}).",
        {"share": share, "skill": outcome(run).skill},
        (f"model.get_layer({names[0].rpartition('/')[2]!r}).trainable = True, then model.compile(...) again.",),
        where=names,
    )


@rule
def left_out(run: Run) -> Iterator[Finding]:
    """Layers whose weights no optimizer is given.

    Means:   a layer is trainable, no step hands a weight of it to an optimizer, and the model learnt little. Where it
             is not known what was learnt it is not told: a target network, or a teacher's, is meant to be left out.
    Matters: the layer stays at its random start; in a train step of one's own nothing warns of it.
    Try:     self.trainable_variables in gradient and apply, not those of one part; layer.trainable = False if it is
             meant to rest.
    Source:  exact: the weights of all calls of `apply` were seen.

    >>> from trainrt.findings.examples import learning, stuck
    >>> names = ("encoder", "first", "middle", "last")
    >>> dense = {"class": "Dense", "parameters": 9, "trainable": True, "config": {"units": 9}}
    >>> layers = [{"name": name, **dense} for name in names]
    >>> [(finding.causes[0], finding.where) for finding in left_out(stuck(layers=layers))]
    [('graph_cut', ('encoder',))]
    >>> list(left_out(learning(layers=layers)))
    []
    """
    ended = outcome(run)
    if not ended.poor(POOR):
        return
    # Of a model within, and of a layer's own layers, the weights are told at the layers that own them.
    owners = [
        layer["name"]
        for layer in program.layers(run)
        if layer.get("parameters") and layer.get("trainable") and layer["config"]
    ]
    owners = [name for name in owners if not any(other.startswith(f"{name}/") for other in owners)]
    held = [f"/{parameter.path}" for parameter in run.roster.parameters]
    without = tuple(name for name in owners if not any(f"/{name}/" in path for path in held))
    if not without or len(without) == len(owners):
        return  # none is known by its name
    yield about(
        run,
        "left_out",
        "error",
        0.85,
        ("graph_cut", "frozen_layers"),
        f"{shorten(without)}: trainable, but no step hands {'its' if len(without) == 1 else 'their'} weights to an "
        f"optimizer, and the model learnt little (skill {ended.skill:.2f}).",
        {"layers": list(without), "skill": ended.skill},
        (
            "In the train step: gradients = tape.gradient(loss, self.trainable_variables); "
            "self.optimizer.apply(gradients, self.trainable_variables).",
            "layer.trainable = False, if they are meant to rest.",
        ),
        where=without,
    )
