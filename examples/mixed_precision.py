"""bfloat16: weights that `mixed_bfloat16` keeps in float32 take every step, weights in bfloat16 round most away."""

import keras

import trainrt

(x, y), _ = trainrt.digits.load()

for policy in ("mixed_bfloat16", "bfloat16"):
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(64, "relu"),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )
    keras.config.set_dtype_policy("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.001), loss)
    run = trainrt.fit(model, x, y, epochs=2, verbose=0).run
    kernel = run.roster.paths[0]
    rounded = run.select(kernel)["rounded_share"].mean()
    dtype = run.roster.parameters[0].dtype
    print(f"{policy:15} {kernel} is {dtype}: {rounded:.0%} of its steps were rounded away")
