"""Diagnosis by experiment: a few steps under a single change, and every one of them taken back, bit for bit.

`explain` says which single change moves the loss of a model that is stuck; `lr_range` which learning rate fits. Both
train from the state that the model is in, on a `Replay` of a few batches, and leave it as they found it: weights,
slots, metrics, seeds, and the generators of Python, NumPy and TensorFlow.
"""

from trainrt.experiment.explanation import Effect, Explanation, confirmed, explain
from trainrt.experiment.rates import Range, lr_range

__all__ = ["Effect", "Explanation", "Range", "confirmed", "explain", "lr_range"]
