"""A run that stagnates from the first epoch: what trainrt finds, what an experiment says, and the cure."""

import keras

import trainrt

(x, y), test = trainrt.digits.load()


def build():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    )
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


model = build()
history = trainrt.fit(model, x, y, epochs=3, validation_data=test, clip=1e-4, verbose=0)
print(f"accuracy {history.history['val_accuracy'][-1]:.2f}")
for finding in history.findings:
    print(finding)

explanation = trainrt.explain(model, x, y, clip=1e-4)
print(explanation)

history = trainrt.fit(build(), x, y, epochs=3, validation_data=test, clip=1.0, verbose=0)
print(f"cured: accuracy {history.history['val_accuracy'][-1]:.2f}, {len(history.findings)} findings")
