"""The Keras sources that the fused updates were matched against.

Each function that decides what `optimizer.apply` does is known by a digest of its source text. An optimizer with a
function that is unknown gets no fused update; `python -m trainrt.update.matched` prints the digests of the installed
Keras, to be added here once the parity tests have passed on it.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from typing import Any

from keras.src.optimizers import base_optimizer

_OWN = ("build", "update_step")
_SHARED = (
    "apply",
    "_backend_apply_gradients",
    "_backend_update_step",
    "_distributed_tf_update_step",
    "_all_reduce_sum_gradients",
    "_filter_empty_gradients",
    "_overwrite_variables_directly_with_gradients",
    "_clip_gradients",
    "_clip_by_norm",
    "_apply_weight_decay",
    "_use_weight_decay",
    "_get_current_learning_rate",
    "_get_variable_index",
    "_var_key",
    "add_optimizer_variables",
    "assign",
    "assign_add",
    "assign_sub",
)
_FREE = ("clip_by_global_norm", "global_norm")
METHODS = frozenset((*_OWN, *_SHARED)) - {"apply"}
"""What an instance may not replace: `apply` it may, since that is where observers stand."""


def digests(kind: Any) -> dict[str, str]:
    """Qualified name of each function that matters to an optimizer class -> digest of its source."""
    functions = [getattr(kind, name) for name in (*_OWN, *_SHARED)] + [kind.iterations.fget]
    functions += [getattr(base_optimizer, name) for name in _FREE]
    return {f.__qualname__: _digest(f) for f in functions}


@functools.cache
def stranger(kind: Any) -> str | None:
    """The first function of the class that is not one of those matched; None if all are."""
    try:
        found = digests(kind)
    except (AttributeError, OSError, TypeError):
        return f"source of {kind.__name__}"
    return next((name for name, digest in found.items() if digest not in MATCHED.get(name, ())), None)


def _digest(function) -> str:
    lines = [line.strip() for line in inspect.getsource(function).splitlines()]
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()[:12]


MATCHED: dict[str, tuple[str, ...]] = {
    "Adadelta.build": ("b923ea5d4f74",),
    "Adadelta.update_step": ("b841861cf92f",),
    "Adagrad.build": ("76bedac96d5e",),
    "Adagrad.update_step": ("c1ef00050c4f",),
    "Adam.build": ("169c6cf8dfde",),
    "Adam.update_step": ("dd7a1ed69e76",),
    "Adamax.build": ("611ac254b50e",),
    "Adamax.update_step": ("dbf157fd6e1b",),
    "BaseOptimizer._backend_apply_gradients": ("4c07a312650e",),
    "BaseOptimizer._clip_gradients": ("2ccc5c6cade0",),
    "BaseOptimizer._filter_empty_gradients": ("6eed790b0d92",),
    "BaseOptimizer._get_current_learning_rate": ("0cfbe47f66fb",),
    "BaseOptimizer._get_variable_index": ("58667dea1534",),
    "BaseOptimizer._overwrite_variables_directly_with_gradients": ("352398fa6c78",),
    "BaseOptimizer._use_weight_decay": ("faa75f6762e2",),
    "BaseOptimizer.add_optimizer_variables": ("311aa6f253d4",),
    "BaseOptimizer.apply": ("82b7ac44a3ed",),
    "BaseOptimizer.iterations": ("1dccfb72694d",),
    "Lion.build": ("a5d5c8a81acc",),
    "Lion.update_step": ("b8d797647844",),
    "Nadam._backend_update_step": ("781aaab21e4e",),
    "Nadam.build": ("fd7046503b33",),
    "Nadam.update_step": ("e5f16445794c",),
    "RMSprop.build": ("ec8dad82f63a",),
    "RMSprop.update_step": ("411803077d9e",),
    "SGD.build": ("d3c8b5a22d19",),
    "SGD.update_step": ("ae01fc667177",),
    "TFOptimizer._all_reduce_sum_gradients": ("29721b127c43", "afbb54259608"),
    "TFOptimizer._apply_weight_decay": ("ed63917b5ae0",),
    "TFOptimizer._backend_update_step": ("1470a565129c",),
    "TFOptimizer._clip_by_norm": ("714f83eb729b",),
    "TFOptimizer._distributed_tf_update_step": ("211191603aaf",),
    "TFOptimizer._var_key": ("fbe5a752bb87",),
    "TFOptimizer.assign": ("041725dbfaf8",),
    "TFOptimizer.assign_add": ("d694176c75e1",),
    "TFOptimizer.assign_sub": ("db8018594443",),
    "clip_by_global_norm": ("a9fa3e525423",),
    "global_norm": ("b42c96909e10",),
}

if __name__ == "__main__":
    from trainrt.update.fused import RULES

    for _kind in RULES:
        for _name, _found in digests(_kind).items():
            print(f'"{_name}": ("{_found}",),')
