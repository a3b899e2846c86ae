"""What models of users do themselves, with `fit` and with `trainrt.fit`: the same bits, the same model afterwards."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt

layers = keras.layers
ROWS = 48


def vectors(classes=0):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(ROWS, 4)).astype("float32")
    return x, (rng.integers(classes, size=ROWS) if classes else rng.normal(size=(ROWS, 1)).astype("float32"))


def dense(outputs=1, activation=None):
    return keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dense(outputs, activation)])


def class_weight():
    model = dense(3, "softmax")
    model.compile("adam", "sparse_categorical_crossentropy", weighted_metrics=["accuracy"])
    return model, [{"x": vectors(3)[0], "y": vectors(3)[1], "class_weight": {0: 1.0, 1: 5.0, 2: 0.0}, "epochs": 2}]


class Penalised(layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
        return x


def add_loss():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, kernel_regularizer="l2"), Penalised(), layers.Dense(1)]
    )
    model.compile("adam", "mse", metrics=["mae"])
    return model, [{"x": vectors()[0], "y": vectors()[1], "epochs": 2}]


class OwnLoss(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(1)
        self.mean = keras.metrics.Mean(name="own")

    def call(self, x):
        return self.inner(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = keras.ops.mean(keras.ops.abs(y - y_pred)) + 0.01 * keras.ops.sum(keras.ops.square(self.inner.kernel))
        self.mean.update_state(loss)
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {"own": self.mean.result(), "largest": keras.ops.max(y_pred)}

    @property
    def metrics(self):
        return [self.mean]


def compute_loss_and_metrics():
    model = OwnLoss()  # never built before it is fitted
    model.compile("rmsprop")
    return model, [{"x": vectors()[0], "y": vectors()[1], "epochs": 3}]


class OwnStep(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(1)

    def call(self, x):
        return self.inner(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(y - self(x, training=True)))
        pairs = zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True)
        self.optimizer.apply_gradients(pairs)
        return {"squares": loss}


def train_step():
    model = OwnStep()
    model.compile("adam", loss="mse")
    return model, [{"x": vectors()[0], "y": vectors()[1], "epochs": 3}]


class Gan(keras.Model):
    """Two optimizers in one step."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = dense(4), dense(1)

    def compile(self):
        super().compile(loss="mse")
        self.of_generator, self.of_critic = keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1, momentum=0.9)

    def call(self, x):
        return self.critic(self.generator(x))

    def train_step(self, x):
        with tf.GradientTape(persistent=True) as tape:
            made = self.generator(x)
            real, fake = self.critic(x), self.critic(made)
            of_critic = tf.reduce_mean(tf.square(real - 1)) + tf.reduce_mean(tf.square(fake))
            of_generator = tf.reduce_mean(tf.square(fake - 1))
        for loss, part, optimizer in (
            (of_critic, self.critic, self.of_critic),
            (of_generator, self.generator, self.of_generator),
        ):
            optimizer.apply(tape.gradient(loss, part.trainable_variables), part.trainable_variables)
        return {"critic": of_critic, "generator": of_generator}


def gan():
    model = Gan()
    model.compile()
    return model, [{"x": vectors()[0], "epochs": 3}]


class Overwritten(layers.Layer):
    """Its scale is what its gradient says, as in float8 training."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.scale.overwrite_with_gradient = True

    def call(self, x):
        @tf.custom_gradient
        def scaled(x, scale):
            return x * scale, lambda up: (up * scale, tf.reduce_max(tf.abs(x)))

        return scaled(x, tf.convert_to_tensor(self.scale))


def overwrite_with_gradient():
    model = keras.Sequential([keras.Input((4,)), Overwritten(), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model, [{"x": vectors()[0], "y": vectors()[1], "epochs": 2}]


def fitted_twice():
    model = dense()
    model.compile("adam", "mse")
    x, y = vectors()
    return model, [{"x": x, "y": y}, {"x": x, "y": y, "epochs": 3, "initial_epoch": 1}]


def compiled_anew():
    model, calls = fitted_twice()
    calls[1]["before"] = lambda: model.compile(keras.optimizers.SGD(0.05, nesterov=True, momentum=0.5), "mae")
    return model, calls


def frozen_between():
    model, calls = fitted_twice()

    def freeze():
        model.layers[0].trainable = False
        model.compile("adam", "mse")

    calls[1]["before"] = freeze
    return model, calls


def nested_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    x = layers.Concatenate()([a, b])
    model = keras.Model(
        {"a": a, "b": b}, {"one": layers.Dense(1, name="one")(x), "two": layers.Dense(1, name="two")(x)}
    )
    model.compile("adam", {"one": "mse", "two": "mae"}, loss_weights={"one": 1.0, "two": 0.5}, metrics={"one": ["mae"]})
    x, y = vectors()
    return model, [{"x": {"a": x, "b": x[:, :2]}, "y": {"one": y, "two": y}, "epochs": 2}]


def distributed_dataset():
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope():
        model = dense()
        model.compile("adam", "mse")
    dataset = tf.data.Dataset.from_tensor_slices(vectors()).batch(16)
    return model, [{"x": strategy.experimental_distribute_dataset(dataset), "epochs": 2, "steps_per_epoch": 3}]


def torch_loader():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    tensors = torch.utils.data.TensorDataset(*map(torch.from_numpy, vectors()))
    model = dense()
    model.compile("adam", "mse")
    return model, [{"x": torch.utils.data.DataLoader(tensors, batch_size=16), "epochs": 2}]


CASES = [
    class_weight, add_loss, compute_loss_and_metrics, train_step, gan, overwrite_with_gradient, fitted_twice,
    compiled_anew, frozen_between, nested_inputs, distributed_dataset, torch_loader,
]  # fmt: skip


def fitted(case, fit):
    keras.utils.set_random_seed(3)
    model, calls = case()
    told = []
    for call in calls:
        call.pop("before", lambda: None)()
        history = fit(model, verbose=0, batch_size=None if "steps_per_epoch" in call else 16, **call)
        told.append(history.history)
    x = calls[0]["x"]
    arrays = isinstance(x, (np.ndarray, dict))
    state = [v.numpy().tobytes() for v in (*model.variables, *(model.optimizer.variables if model.optimizer else ()))]
    after = [np.asarray(t).tobytes() for t in keras.tree.flatten(model.predict(x, verbose=0))] if arrays else []
    judged = (
        model.evaluate(x, calls[0]["y"], verbose=0) if arrays and "y" in calls[0] and case is not train_step else None
    )
    return told, state, after, judged


@pytest.mark.filterwarnings("ignore:.*shuffle=True.*")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_a_model_does_itself_it_does_as_under_keras(case):
    want = fitted(case, lambda model, **k: model.fit(**k))
    got = fitted(case, trainrt.fit)
    assert got == want
    assert all(np.isfinite(v).all() for logs in want[0] for v in logs.values())
