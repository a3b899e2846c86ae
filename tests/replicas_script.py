"""What tests/test_distribute.py runs in processes of its own: one tf.distribute strategy lives in a process.

    python replicas_script.py DEVICES CASE...

Under TF_CONFIG or Slurm the strategy is a MultiWorkerMirroredStrategy, else a MirroredStrategy over so many logical
CPUs; 1 is no strategy at all. Prints one line of JSON for each case: {"case": ..., ...}.
"""

import json
import os
import signal
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import tensorflow as tf

import trainrt

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.01),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "own_clip": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.3),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=8.0, dynamic_growth_steps=5
    ),
    "averaged": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=3),
}


def strategy(devices: int) -> tf.distribute.Strategy:
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if "SLURM_PROCID" in os.environ:
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
            port_base=int(os.environ["PORT"]), gpus_per_node=2, gpus_per_task=1, auto_set_gpu=False
        )
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
    if devices == 1:
        return tf.distribute.get_strategy()
    host = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(host, [tf.config.LogicalDeviceConfiguration()] * devices)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)])


def data(samples=240):
    x = np.random.default_rng(0).normal(size=(samples, 16)).astype(np.float32)
    return x, x[:, :4].argmax(axis=1)


def classifier(scope, optimizer, *layers, **compiled):
    keras.utils.set_random_seed(1)
    with scope.scope():
        model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(24, "relu", name="hidden")])
        for layer in layers:
            model.add(layer())
        model.add(keras.layers.Dense(4, kernel_regularizer="l2"))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(OPTIMIZERS[optimizer](), loss, metrics=["accuracy"], **compiled)
    return model


def trained(model, **arguments) -> dict:
    x, y = data()
    given = {"x": x, "y": y, "batch_size": 24, "epochs": 3, "verbose": 0, "validation_data": (x[:48], y[:48])}
    history = trainrt.fit(model, **{**given, **arguments})
    run = history.run
    return {
        "weights": np.concatenate([np.ravel(w) for w in model.get_weights()]).tolist(),
        "history": {name: [float(v) for v in values] for name, values in history.history.items()},
        "gradient_norm": run.scalar("gradient_norm").tolist(),
        "clipped_gradient_norm": run.scalar("clipped_gradient_norm").tolist(),
        "loss": run.scalar("loss").tolist(),
        "steps": [int(s) for s in run.steps[:, 0]],
        "replicas": run.document("replicas"),
        "findings": [finding.to_dict() for finding in history.findings],
        "path": None if run.path is None else str(run.path),
        "end": run.end,
    }


def equal(scope, optimizer, clip, logdir=None):
    return trained(classifier(scope, optimizer), clip=float(clip) or None, logdir=logdir)


def traced(scope, logdir):
    """What the trace of four steps says, and whether the training is that without one."""
    plain, model = classifier(scope, "adam"), classifier(scope, "adam")
    given = {"epochs": 1, "validation_data": None, "clip": 0.3}
    without = trained(plain, **given)
    x, y = data()
    history = trainrt.fit(model, x, y, batch_size=24, verbose=0, clip=0.3, logdir=logdir, trace=(4, 8))
    weights = np.concatenate([np.ravel(w) for w in model.get_weights()])
    told = [dict(d.content) for d in history.run.documents if d.kind == "trace"]
    return {"told": told, "apart": float(np.abs(weights - without["weights"]).max())}


def masks(scope):
    """One row of ones a replica, through dropout: an element of the gradient is zero where every mask is."""
    n = scope.num_replicas_in_sync
    keras.utils.set_random_seed(1)
    with scope.scope():
        model = keras.Sequential(
            [keras.Input((4096,)), keras.layers.Dropout(0.5), keras.layers.Dense(1, use_bias=False)]
        )
        model.compile("sgd", lambda y, p: tf.reduce_mean(p, axis=-1))
    ones = np.ones((n * 4, 4096), np.float32)
    run = trainrt.fit(model, ones, ones[:, 0], batch_size=n, shuffle=False, verbose=0).run
    return {"zero_share": run["gradient_zero_share"][:, 0].tolist()}


class Spoils(keras.callbacks.Callback):
    """Changes one element of a weight on the last replica alone, at the end of the first epoch."""

    def on_epoch_end(self, epoch, logs=None):
        last = self.model.layers[0].kernel.value.values[-1]
        here = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", None)
        if epoch == 0 and here in (None, 1):
            last.scatter_nd_add([[0, 0]], [1e-7])


def drift(scope):
    return trained(classifier(scope, "sgd", lambda: keras.layers.BatchNormalization(name="norm")), callbacks=[Spoils()])


def listening(scope):
    """Every batch has a listener, and the data are of unknown length."""
    seen = []
    x, y = data()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda x, y: True).batch(24)
    listener = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["loss"]))
    model = classifier(scope, "sgd")
    history = trainrt.fit(model, dataset, epochs=2, verbose=0, callbacks=[listener], observe=2)
    return {"batches": len(seen), "steps": [int(s) for s in history.run.steps[:, 0]], "last": float(seen[-1])}


def uneven(scope, samples, *layers):
    """The last batch of an epoch is a small one; every batch has a listener."""
    x, y = data(int(samples))
    heard = []
    listener = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: heard.append(dict(logs)))
    made = {"norm": lambda: keras.layers.BatchNormalization(name="norm")}
    model = classifier(scope, "adam", *(made[name] for name in layers), weighted_metrics=["accuracy"])
    outcome = trained(
        model,
        x=x,
        y=y,
        sample_weight=np.linspace(0.5, 1.5, len(x)),
        shuffle=False,
        clip=0.5,
        validation_data=(x[:53], y[:53]),
        callbacks=[listener],
    )
    copies = [v for w in model.weights for v in getattr(w.value, "values", [w.value])]
    return outcome | {"logs": heard, "finite": all(np.isfinite(v.numpy()).all() for v in copies)}


def uneven_own_step(scope, samples):
    return custom(scope, int(samples))


class Custom(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def call(self, x):
        return self.dense(x)

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=y, y_pred=self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        return {"loss": loss}


def custom(scope, samples=240):
    keras.utils.set_random_seed(1)
    with scope.scope():
        model = Custom()
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), steps_per_execution=4)
    x, y = data(samples)
    run = trainrt.fit(model, x, y, batch_size=24, verbose=0, clip=0.5, shuffle=False).run
    weights = np.concatenate([np.ravel(w) for w in model.get_weights()]).tolist()
    return {"weights": weights, "gradient_norm": run.scalar("gradient_norm").tolist()}


class Stops(keras.callbacks.Callback):
    """Ends the training on one worker alone, in the middle of an epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 3 and json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
            self.model.stop_training = True


def stopping(scope):
    """Unseeded: the workers draw their weights and their order from one seed all the same."""
    with scope.scope():
        model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    outcome = trained(model, callbacks=[Stops()], epochs=2, validation_data=None)
    x, y = data()
    return outcome | {"evaluated": model.evaluate(x, y, batch_size=48, verbose=0)}


class Dies(keras.callbacks.Callback):
    """Kills one worker in the middle of an epoch, in the first attempt of the launcher."""

    def on_train_batch_end(self, batch, logs=None):
        last = int(os.environ.get("TF_CONFIG", "{}") == "{}" or json.loads(os.environ["TF_CONFIG"])["task"]["index"])
        if os.environ.get("TRAINRT_RESTART") == "0" and last and self.model.optimizer.iterations == 17:
            os.kill(os.getpid(), signal.SIGKILL)


def _values(*variables) -> list[float]:
    return [float(v) for variable in variables for v in np.ravel(keras.ops.convert_to_numpy(variable))]


def guarded(scope, on_nonfinite, on_spike, eager="", every="1"):
    """Two batches of ten are bad, on one replica alone; the same without them, on a model of its own."""
    x, y = data()
    bad = x.copy()
    bad[[2 * 24 + 1, 7 * 24 + 23]] = np.nan
    keep = np.repeat([batch not in (2, 7) for batch in range(10)], 24)
    told = {}
    for name, rows in (("bad", (bad, y)), ("healthy", (x[keep], y[keep]))):
        layers = (lambda: keras.layers.BatchNormalization(name="norm"), lambda: keras.layers.Dropout(0.3))
        model = classifier(scope, "adam", *layers, run_eagerly=bool(eager))
        history = trainrt.fit(
            model,
            *rows,
            batch_size=24,
            epochs=2,
            shuffle=False,
            verbose=0,
            clip=1.0,
            on_nonfinite=on_nonfinite,
            on_spike=on_spike if on_spike != "None" else None,
            observe=int(every) or False,
        )
        told[name] = {
            "weights": _values(*model.variables, *model.optimizer.variables),
            "history": history.history,
            "iterations": int(_values(model.optimizer.iterations)[0]),
            "poison": history.run.document("poison"),
            "replicas": history.run.document("replicas"),
        }
    return told


def spiked(scope, own_step=""):
    """One batch of 100 has targets far off."""
    x = np.random.default_rng(0).normal(size=(100 * 24, 16)).astype(np.float32)
    y = x[:, :4].copy()
    y[80 * 24 : 80 * 24 + 3] = 1e4
    keras.utils.set_random_seed(1)
    with scope.scope():
        model = Custom() if own_step else keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
        model.compile("sgd", "mse")
    history = trainrt.fit(model, x, y, batch_size=24, shuffle=False, verbose=0, on_spike="skip")
    return {"poison": history.run.document("poison"), "weights": _values(*model.weights)}


def slow(scope, how):
    """Worker 1 is slow at each step: in the forward pass, or between two steps."""
    here = json.loads(os.environ["TF_CONFIG"])["task"]["index"]

    class Slow(keras.layers.Layer):
        def call(self, x):
            with tf.control_dependencies(
                [tf.numpy_function(lambda: time.sleep(0.03 * here) or np.int64(0), [], "int64")]
            ):
                return tf.identity(x)

    listener = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: time.sleep(0.03 * here))
    model = classifier(scope, "adam", *([Slow] if how == "step" else []))
    return trained(model, epochs=5, validation_data=None, callbacks=[listener] if how == "callback" else [])


class Asked(keras.callbacks.Callback):
    """Another process asks worker 1 alone to end, in the first attempt: at a batch, or in a validation."""

    def __init__(self, number, hook):
        super().__init__()
        self.number, self.left = number, {"on_train_batch_end": 14, "on_test_batch_end": 4}[hook]
        setattr(self, hook, self.called)

    def called(self, batch, logs=None):
        self.left -= 1
        if not self.left and json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
            os.kill(os.getpid(), self.number)


def asked(scope, directory, number="0", hook="on_train_batch_end"):
    model = classifier(scope, "adam", lambda: keras.layers.Dropout(0.3))
    callbacks = [Asked(int(number), hook)] if int(number) else []
    place = {} if directory == "none" else {"checkpoint": f"{directory}/checkpoints", "logdir": f"{directory}/logs"}
    return trained(model, callbacks=callbacks, **place)


def resuming(scope, directory, dies=""):
    model = classifier(scope, "adam", lambda: keras.layers.Dropout(0.3))
    given = {} if directory == "none" else {"checkpoint": trainrt.Checkpoint(directory, every=7)}
    return trained(model, callbacks=[Dies()] if dies else [], clip=1.0, **given)


def main(devices, *cases):
    scope = strategy(int(devices))
    for case in cases:
        name, *arguments = case.split(":")
        print(json.dumps({"case": case, **globals()[name](scope, *arguments)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
