"""What a step reads, without running one: from the arguments of `fit`, or from a model that was saved compiled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from trainrt import doors


def spec_of_data(arguments: Mapping[str, Any]) -> Any:
    """The spec of a batch of the data that `fit` is given."""
    names = ("x", "y", "sample_weight", "batch_size", "steps_per_epoch", "shuffle", "class_weight")
    given = {name: arguments[name] for name in names if name in arguments}
    spec = doors.data_adapter(**{"x": None, **given}).get_tf_dataset().element_spec
    optional = (tf.experimental.Optional, tf.OptionalSpec)
    return keras.tree.map_structure(lambda item: None if isinstance(item, optional) else item, spec)


def specs_of(path: Path) -> tuple[keras.Model, Any]:
    """A saved model and the spec of a batch for it.

    Raises:
      ValueError: It cannot be loaded, or was not saved compiled.
    """
    try:
        model = keras.saving.load_model(path)
    except Exception as error:  # whatever Keras, h5py, zipfile or the model's own code raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"Keras cannot load {path}: {reason} Give a training script, which ends in .py, or a model that was saved "
            "compiled; one with code of its own is checked by its training script."
        ) from error
    if not getattr(model, "compiled", False) or not getattr(model, "inputs", None):
        raise ValueError(
            f"A model is checked by its training step. Received: {path}, saved without one. "
            "Compile it before it is saved, or check the training script."
        )

    def specs(tensors: Any, dtype: str | None = None, drop: int = 0) -> Any:
        made = [tf.TensorSpec((None, *t.shape[1 : len(t.shape) - drop]), dtype or t.dtype) for t in tensors]
        return made[0] if len(made) == 1 else made

    sparse = "sparse" in str(doors.compiled_loss(model)).lower()
    return model, (specs(model.inputs), specs(model.outputs, "int64", 1) if sparse else specs(model.outputs))
