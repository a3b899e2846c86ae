"""A model with a train step of its own: trainrt stands where its optimizer applies gradients, and changes nothing."""

import keras
import tensorflow as tf

import trainrt

(x, y), _ = trainrt.digits.load()


class Autoencoder(keras.Model):
    """Learns to take the noise out of digits."""

    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(16, "relu")], name="encoder")
        self.decoder = keras.Sequential(
            [keras.layers.Dense(64, "sigmoid"), keras.layers.Reshape((8, 8, 1))], name="decoder"
        )
        self.loss_metric = keras.metrics.Mean(name="loss")

    @property
    def metrics(self):
        return [self.loss_metric]

    def call(self, x):
        return self.decoder(self.encoder(x))

    def train_step(self, data):
        x, _ = data
        noisy = x + tf.random.normal(tf.shape(x), stddev=0.1)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(noisy, training=True) - x))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        self.loss_metric.update_state(loss)
        return {"loss": self.loss_metric.result()}


keras.utils.set_random_seed(1)
model = Autoencoder()
model.compile(keras.optimizers.Adam(1e-3))
history = trainrt.fit(model, x, y, epochs=5, verbose=0)
run = history.run
print(f"loss {history.history['loss'][0]:.4f} -> {history.history['loss'][-1]:.4f}, {len(run)} steps observed")
for path, ratio in zip(run.roster.paths, run["update_ratio"][-1], strict=True):
    print(f"{path:40} moved by {ratio:.1e} of its size in the last step")
