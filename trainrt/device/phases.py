"""Which phase of a training step an op belongs to, and which layer owns it, told from its name alone.

Keras and the gradient tape leave scopes in the names of ops: `sequential/dense/MatMul` is the layer's forward pass,
`gradient_tape/sequential/dense/...` its backward pass, `adam/...` the optimizer's own `apply`. What trainrt adds to the
step it puts in scopes of its own. Under XLA the same names stand in the metadata of the compiled module.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

PHASES = ("input", "forward", "backward", "clip", "update", "statistics", "host")
"""In the order of a step. Forward includes the loss and the metrics; host is the time in which nothing of the step
ran: Python, callbacks, the call itself."""

INPUT, CLIP, UPDATE, STATISTICS = "trainrt_input", "trainrt_clip", "trainrt_update", "trainrt_statistics"
"""Scopes of what trainrt adds to a step. A fused update clips, updates and measures in one pass: it counts as update.
"""

_OWN = {INPUT: "input", CLIP: "clip", UPDATE: "update", STATISTICS: "statistics"}
_CALLS = re.compile(
    r"^(?:while/body/_\d+/while/|(?:Stateful|Xla)?PartitionedCall(?:_\d+)?/|replica_\d+/"
    r"|cond(?:_\d+)?/(?:then|else)/_\d+/(?:while/)?cond(?:_\d+)?/)+"
)
_SUM_OF_GRADIENTS = re.compile(r"^AddN(?:_\d+)?$")


@dataclasses.dataclass(frozen=True)
class Scopes:
    """What the names of a step's ops are read with.

    Attributes:
      optimizers: Names of the optimizers.
      layers: Scope of a layer's forward pass, such as `"sequential_1/dense_2"` -> the layer.
      eager: Whether the step's ops run one by one, and then they have no names.
    """

    optimizers: tuple[str, ...] = ()
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    eager: bool = False

    def phase(self, name: str) -> str:
        """The phase of an op.

        >>> scopes = Scopes(("adam",))
        >>> [scopes.phase(n) for n in ("net/dense/MatMul", "gradient_tape/net/dense/MatMul", "adam_1/Mul", "AddN_2")]
        ['forward', 'backward', 'update', 'backward']
        """
        parts = bare(name).split("/")
        for part in parts:
            # A scope that was entered twice in one graph has a number the second time.
            own = _OWN.get(part) or _OWN.get(part.rpartition("_")[0])
            if own:
                return own
        if "gradient_tape" in parts or "gradients" in parts or (_SUM_OF_GRADIENTS.match(parts[-1]) and len(parts) == 1):
            return "backward"
        if any(_is(part, optimizer) for part in parts for optimizer in self.optimizers):
            return "update"
        return "input" if parts[0].startswith("Iterator") else "forward"

    def layer(self, name: str) -> str:
        """The layer that an op of the forward or backward pass belongs to; "" for none.

        Of an op that no layer with weights owns it is the outer two scopes, which name a dropout or the loss.

        >>> scopes = Scopes(layers={"net_1/dense_1": "dense"})
        >>> scopes.layer("gradient_tape/net_1/dense_1/MatMul/MatMul"), scopes.layer("net_1/dropout_1/random/Mul")
        ('dense', 'net_1/dropout_1')
        """
        parts = [part for part in bare(name).split("/") if part != "gradient_tape"]
        for length in range(len(parts) - 1, 0, -1):
            known = self.layers.get("/".join(parts[:length]))
            if known is not None:
                return known
        outer = len(parts) > 2 and self.phase(name) in ("forward", "backward")
        return "/".join(parts[:2]) if outer else ""


def bare(name: str) -> str:
    """The name of an op without the calls and loops around the step.

    >>> bare("while/body/_1/while/StatefulPartitionedCall/net/dense/MatMul")
    'net/dense/MatMul'
    >>> bare("while/body/_1/while/cond_1/then/_30/while/cond_1/replica_1/net/dense/MatMul")
    'net/dense/MatMul'
    """
    return _CALLS.sub("", name)


def layers_of(reads: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Scopes of layers, from the ops that read their weights.

    Args:
      reads: Name of an op that reads a weight, path of the weight's layer. TensorFlow numbers scopes that it has seen
        before, so that a scope `dense_1` may be the layer `dense`: which one it is only the weight knows.

    >>> layers_of([("net_1/dense_1/Cast/ReadVariableOp", "net/dense"), ("net_1/dense_1_2/Cast/ReadVariableOp",
    ...            "net/dense_1")])
    {'net_1/dense_1': 'net/dense', 'net_1/dense_1_2': 'net/dense_1'}
    """
    found: dict[str, str] = {}
    for name, layer in reads:
        parts = bare(name).split("/")
        while layer:  # the weights of a cell are read by the loop of the layer around it
            own = layer.rpartition("/")[2]
            at = [i for i, part in enumerate(parts) if _is(part, own)]
            if at:
                found.setdefault("/".join(parts[: at[-1] + 1]), layer)
                break
            layer = layer.rpartition("/")[0]
    return found


def _is(scope: str, name: str) -> bool:
    """Whether a scope is that of `name`, perhaps numbered."""
    return scope == name or (scope.startswith(f"{name}_") and scope[len(name) + 1 :].isdecimal())
