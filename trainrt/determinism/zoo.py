"""Small models of the kinds that people train, with data, for proofs and for pricing.

Sizes are those at which the ops in question show what they do: an embedding whose SGD update really varies on two cores
needs thousands of ids a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model to be compiled and its data.

    Attributes:
      build: Makes the model; its weights are drawn then.
      data: (rng, rows) -> x and y.
      batch: Rows a batch.
      optimizer: Name of the optimizer.
      loss: Name of the loss.
    """

    build: Callable[[], keras.Model]
    data: Callable[[np.random.Generator, int], tuple[Any, Any]]
    batch: int = 32
    optimizer: str = "adam"
    loss: str = "sparse_categorical_crossentropy"

    def make(self, steps: int, seed: int = 0) -> tuple[keras.Model, Any, Any]:
        """A compiled model and data for that many steps; nothing is drawn from a global generator but the weights."""
        x, y = self.data(np.random.default_rng(seed), self.batch * steps)
        model = self.build()
        model.compile(self.optimizer, self.loss)
        return model, x, y


def _vectors(size: int):
    return lambda rng, n: (rng.standard_normal((n, size), np.float32), rng.integers(0, 10, n))


def _images(size: int, channels: int = 3):
    return lambda rng, n: (rng.standard_normal((n, size, size, channels), np.float32), rng.integers(0, 10, n))


def _tokens(vocabulary: int, length: int):
    return lambda rng, n: (rng.integers(0, vocabulary, (n, length)).astype(np.int32), rng.integers(0, 10, n))


def _sequences(length: int, size: int):
    return lambda rng, n: (rng.standard_normal((n, length, size), np.float32), rng.integers(0, 10, n))


def _masks(size: int):
    return lambda rng, n: (
        rng.standard_normal((n, size, size, 3), np.float32),
        rng.integers(0, 2, (n, size, size, 1)).astype(np.float32),
    )


def _stack(shape: tuple[int, ...], *middle: Callable[[], keras.layers.Layer], dtype: str = "float32"):
    def build():
        return keras.Sequential(
            [keras.Input(shape, dtype=dtype), *(make() for make in middle), layers.Dense(10, "softmax")]
        )

    return build


def _conv(filters: int, **options):
    return lambda: layers.Conv2D(filters, 3, padding="same", activation="relu", **options)


def _dense(units: int):
    return lambda: layers.Dense(units, "relu")


def _embedding(vocabulary: int, size: int):
    return lambda: layers.Embedding(vocabulary, size)


def _transformer():
    inputs = keras.Input((32,), dtype="int32")
    x = layers.Embedding(1000, 32)(inputs)
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 8)(x, x))
        x = layers.LayerNormalization()(x + layers.Dense(32)(layers.Dense(64, "gelu")(x)))
    return keras.Model(inputs, layers.Dense(10, "softmax")(layers.GlobalAveragePooling1D()(x)))


def _attention():
    inputs = keras.Input((16, 16))
    x = layers.LayerNormalization()(inputs + layers.MultiHeadAttention(2, 8)(inputs, inputs))
    return keras.Model(inputs, layers.Dense(10, "softmax")(layers.GlobalAveragePooling1D()(x)))


def _unet():
    inputs = keras.Input((32, 32, 3))
    kept, x = [], inputs
    for filters in (8, 16):
        x = layers.BatchNormalization()(_conv(filters)()(x))
        kept.append(x)
        x = layers.MaxPooling2D()(x)
    x = _conv(32)()(x)
    for filters in (16, 8):
        x = layers.Concatenate()([layers.UpSampling2D()(x), kept.pop()])
        x = _conv(filters)()(x)
    return keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(x))


ZOO: dict[str, Workload] = {
    "mlp": Workload(_stack((256,), _dense(512), _dense(256)), _vectors(256), 64),
    "cnn": Workload(
        _stack((32, 32, 3), _conv(16), layers.MaxPooling2D, _conv(32), layers.MaxPooling2D, layers.Flatten, _dense(64)),
        _images(32),
    ),
    # 64 rows of 256 ids: 16,384 updates a batch, whose sums of duplicates vary in every third step on two cores.
    "embedding_sgd": Workload(
        _stack((256,), _embedding(50, 64), layers.GlobalAveragePooling1D, dtype="int32"), _tokens(50, 256), 64, "sgd"
    ),
    "lstm": Workload(_stack((32,), _embedding(1000, 32), lambda: layers.LSTM(32), dtype="int32"), _tokens(1000, 32)),
    "transformer": Workload(_transformer, _tokens(1000, 32)),
    "unet": Workload(_unet, _masks(32), 8, "adam", "binary_crossentropy"),
}
"""What `trainrt determinism bench` prices."""

FAMILIES: dict[str, Workload] = {
    "dense": Workload(_stack((32,), _dense(64)), _vectors(32)),
    "dense_big": Workload(_stack((256,), _dense(2048)), _vectors(256)),
    "conv": Workload(_stack((16, 16, 3), _conv(16), layers.Flatten), _images(16)),
    "depthwise": Workload(_stack((16, 16, 3), lambda: layers.DepthwiseConv2D(3), layers.Flatten), _images(16)),
    "separable": Workload(
        _stack((16, 16, 3), lambda: layers.SeparableConv2D(8, 3), layers.BatchNormalization, layers.Flatten),
        _images(16),
    ),
    "embedding": Workload(
        _stack((64,), _embedding(50, 16), layers.GlobalAveragePooling1D, dtype="int32"), _tokens(50, 64), 64
    ),
    "embedding_lstm": Workload(
        _stack((16,), _embedding(100, 16), lambda: layers.LSTM(16), dtype="int32"), _tokens(100, 16)
    ),
    "lstm": Workload(_stack((16, 8), lambda: layers.LSTM(32)), _sequences(16, 8)),
    "gru": Workload(_stack((16, 8), lambda: layers.GRU(32)), _sequences(16, 8)),
    "batch_norm": Workload(_stack((32,), _dense(64), layers.BatchNormalization), _vectors(32)),
    "attention": Workload(_attention, _sequences(16, 16)),
    "dropout": Workload(_stack((64,), _dense(128), lambda: layers.Dropout(0.3), _dense(64)), _vectors(64)),
    "upsample": Workload(
        _stack((8, 8, 3), layers.UpSampling2D, _conv(8), lambda: layers.UpSampling2D(interpolation="bilinear"),
               layers.GlobalAveragePooling2D), _images(8)
    ),
    "augmentation": Workload(
        _stack((16, 16, 3), lambda: layers.RandomFlip("horizontal"), lambda: layers.RandomRotation(0.1),
               lambda: layers.RandomContrast(0.2), _conv(8), layers.Flatten), _images(16)
    ),
    "embedding_sgd": ZOO["embedding_sgd"],
}  # fmt: skip
"""What the tests train: 14 that are reproducible on a CPU in any mode, and one that is not in the fast one."""
