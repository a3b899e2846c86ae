"""Which learning rate? A range test from the state the model is in; the model is left as it was."""

import sys

import keras

import trainrt

(x, y), _ = trainrt.digits.load()
keras.utils.set_random_seed(1)
model = keras.Sequential(
    [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
)
model.compile(keras.optimizers.Adam(1e-6), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

found = trainrt.lr_range(model, x, y)
print(found)
if len(sys.argv) > 1:
    found.save(sys.argv[1])  # .svg, or .html for a page

model.optimizer.learning_rate = found.suggestion
history = trainrt.fit(model, x, y, epochs=3, verbose=0)
print(f"with it: loss {history.history['loss'][0]:.3f} -> {history.history['loss'][-1]:.3f}")
