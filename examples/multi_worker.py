"""Two workers on this machine under MultiWorkerMirroredStrategy: the same script, started once and again by itself."""

import json
import os
import socket
import subprocess
import sys

WORKERS = 2


def work():
    import keras
    import tensorflow as tf

    import trainrt

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    (x, y), _ = trainrt.digits.load()
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(32, "relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss)
    dataset = tf.data.Dataset.from_tensor_slices((x[:1280], y[:1280])).batch(64)
    history = trainrt.fit(model, dataset, shuffle=False, epochs=2, verbose=0)
    weight = float(tf.reduce_sum(model.trainable_variables[0]))
    steps = len(history.run) if history.run is not None else 0
    print(f"loss {history.history['loss'][-1]:.4f}, sum of the first weights {weight:.6f}, {steps} windows observed")


def main():
    ports = []
    for _ in range(WORKERS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    workers = []
    for index in range(WORKERS):
        config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
        environment = {**os.environ, "TF_CONFIG": config, "CUDA_VISIBLE_DEVICES": ""}
        workers.append(subprocess.Popen([sys.executable, __file__], env=environment, stdout=subprocess.PIPE, text=True))
    for index, worker in enumerate(workers):
        out, _ = worker.communicate(timeout=240)
        print(f"worker {index}: {out.strip().splitlines()[-1] if out.strip() else 'said nothing'}")
        if worker.returncode:
            sys.exit(f"worker {index} ended with {worker.returncode}")


if __name__ == "__main__":
    work() if "TF_CONFIG" in os.environ else main()
