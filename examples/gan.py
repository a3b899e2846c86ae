"""A generative adversarial network: two networks, two optimizers, one record."""

import keras
import tensorflow as tf

import trainrt

(x, _), _ = trainrt.digits.load()
NOISE = 16


class Gan(keras.Model):
    def __init__(self):
        super().__init__()
        layers = keras.layers
        self.generator = keras.Sequential(
            [keras.Input((NOISE,)), layers.Dense(64, "relu"), layers.Dense(64, "sigmoid"), layers.Reshape((8, 8, 1))],
            name="generator",
        )
        self.critic = keras.Sequential(
            [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(64, "leaky_relu"), layers.Dense(1)], name="critic"
        )
        self.generator_optimizer = keras.optimizers.Adam(1e-3, beta_1=0.5)
        self.critic_optimizer = keras.optimizers.Adam(1e-3, beta_1=0.5)
        self.judge = keras.losses.BinaryCrossentropy(from_logits=True)

    def train_step(self, real):
        count = tf.shape(real)[0]
        noise = tf.random.normal([count, NOISE])
        with tf.GradientTape() as tape:
            fake = self.generator(noise, training=True)
            said = self.critic(tf.concat([real, fake], 0), training=True)
            truth = tf.concat([tf.ones([count, 1]), tf.zeros([count, 1])], 0)
            critic_loss = self.judge(truth, said)
        weights = self.critic.trainable_variables
        self.critic_optimizer.apply(tape.gradient(critic_loss, weights), weights)
        with tf.GradientTape() as tape:
            generator_loss = self.judge(tf.ones([count, 1]), self.critic(self.generator(noise, training=True)))
        weights = self.generator.trainable_variables
        self.generator_optimizer.apply(tape.gradient(generator_loss, weights), weights)
        return {"critic_loss": critic_loss, "generator_loss": generator_loss}

    def call(self, noise):
        return self.generator(noise)


keras.utils.set_random_seed(1)
model = Gan()
model.compile()
history = trainrt.fit(
    model, tf.data.Dataset.from_tensor_slices(x).shuffle(len(x)).batch(64), shuffle=False, epochs=4, verbose=0
)
run = history.run
print(f"{len(run)} steps of both networks, {len(run.roster.parameters)} weights")
for network in ("generator", "critic"):
    paths = [path for path in run.roster.paths if path.startswith(network)]
    norms = run.select(paths)["gradient_norm"]
    print(f"{network:10} median gradient norm of a weight {sorted(norms.reshape(-1))[norms.size // 2]:.2e}")
