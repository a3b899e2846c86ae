"""trainrt: the training runtime that tells you why your TensorFlow model does not learn.

    import trainrt
    history = trainrt.fit(model, x, y, epochs=5, logdir="runs")    # instead of model.fit(x, y, epochs=5)
    history.findings                                               # what is wrong, where, since when, what to try

Names load on first use, so that reading a record never imports TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what `__getattr__` finds, for editors and type checkers
    from trainrt import clip as clip
    from trainrt import determinism as determinism
    from trainrt import digits as digits
    from trainrt.comparison import compare as compare
    from trainrt.endurance.checkpoint import Checkpoint as Checkpoint
    from trainrt.experiment import explain as explain
    from trainrt.experiment import lr_range as lr_range
    from trainrt.findings import Finding as Finding
    from trainrt.findings import diagnose as diagnose
    from trainrt.loop.fit import fit as fit
    from trainrt.record.run import Run as Run
    from trainrt.record.statistics import statistic as statistic

__version__ = "0.1.0"

_HOME = {
    "fit": "trainrt.loop.fit",
    "clip": "trainrt.clip",
    "Checkpoint": "trainrt.endurance.checkpoint",
    "determinism": "trainrt.determinism",
    "digits": "trainrt.digits",
    "Run": "trainrt.record.run",
    "Finding": "trainrt.findings",
    "diagnose": "trainrt.findings",
    "compare": "trainrt.comparison",
    "explain": "trainrt.experiment",
    "lr_range": "trainrt.experiment",
    "statistic": "trainrt.record.statistics",
}

__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'trainrt' has no attribute {name!r}; it has {', '.join(__all__)}.")
    module = importlib.import_module(_HOME[name])
    value = module if _HOME[name] == f"trainrt.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
