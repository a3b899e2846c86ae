"""The fused updates against the Keras optimizers themselves, bit for bit."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from trainrt.record.vocabulary import DEVICE_MOMENTS, GRADIENT, JOINT, UPDATE, WEIGHT, Moments
from trainrt.update import fused, matched, native, native_ops

pytestmark = pytest.mark.skipif(native.load() is None, reason=str(native.status().reason))

VARIANTS = {
    "SGD": ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    "Adam": ({}, {"amsgrad": True}),
    "AdamW": ({}, {"amsgrad": True}),
    "RMSprop": ({}, {"momentum": 0.9}, {"centered": True}, {"centered": True, "momentum": 0.5}),
}
MAKERS = [
    pytest.param(kind, options, id="-".join([kind.__name__, *options]))
    for kind in fused.RULES
    for options in VARIANTS.get(kind.__name__, ({},))
]
SHAPES = [(), (1,), (3,), (7, 5), (8,), (33,), (511,), (40, 50), (1, 1, 1025), (0,), (17, 1031)]
OPTIONS = [
    {"weight_decay": 0.3},
    {"clipnorm": 1.0},
    {"global_clipnorm": 1.0},
    {"clipvalue": 0.01},
    {"loss_scale_factor": 1024.0},
    {"weight_decay": 0.1, "clipnorm": 0.5, "loss_scale_factor": 2.0},
    {"weight_decay": 0.1, "global_clipnorm": 0.5, "loss_scale_factor": 2.0},
]
ORDINARY = 200
"""Steps in which squares of gradients stay finite; then come the whole range of the dtype, Inf and NaN."""

RANGE = {"float32": (-30, 15), "float64": (-30, 15), "bfloat16": (-30, 15), "float16": (-7, 1)}


def narrowed(kind, options, dtype):
    """Options with which the optimizer works in the dtype at all: in bfloat16 Keras's beta_2 of 0.999 is 1."""
    has_beta = issubclass(kind, (keras.optimizers.Adam, keras.optimizers.Nadam))
    return {**options, "beta_2": 0.9} if has_beta and "16" in dtype else options


def weights(dtype, seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return [
        keras.Variable((rng.standard_normal(s) * 0.1).astype("float32"), dtype=dtype, name=f"w{i}")
        for i, s in enumerate(shapes)
    ]


def gradient(rng, shape, dtype, step):
    """Ordinary ones, tiny to huge ones, many zeros, subnormals; after `ORDINARY` steps up to 1e30 and not finite."""
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 1, shape)
    if dtype == "float16":
        x *= 0.01
    low, high = RANGE[dtype]
    if step > ORDINARY:
        high = 30
    if step % 5 == 1:
        x = rng.standard_normal(shape) * 10.0 ** rng.uniform(low, high)
    elif step % 5 == 2:
        x = np.where(rng.random(shape) < 0.5, 0.0, x)
    elif step % 5 == 3:
        x = np.where(rng.random(shape) < 0.1, 1e-42 if low < -7 else 3e-8, x)
    x = np.asarray(x)
    if step > ORDINARY and step % 40 == 7 and x.size > 100:
        for bad in (np.inf, -np.inf, np.nan):
            x.reshape(-1)[rng.integers(x.size)] = bad
    with np.errstate(over="ignore"):
        return tf.cast(tf.constant(x, tf.float64), dtype)


def values(variable):
    return np.asarray(variable.value.numpy())


def same(a, b):
    """Equal to the last bit, except that a NaN is a NaN."""
    integers = f"u{a.dtype.itemsize}"
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return ((a.view(integers) == b.view(integers)) | (np.isnan(wide_a) & np.isnan(wide_b))).all()


def compare(make, dtype, steps, eager=False, shapes=SHAPES, given=lambda rng, t: None, missing=(), alter=None):
    """Runs Keras and the fused pass side by side."""
    keras_weights, our_weights = weights(dtype, shapes=shapes), weights(dtype, shapes=shapes)
    reference, optimizer = make(), make()
    for each, its in ((reference, keras_weights), (optimizer, our_weights)):
        if alter:
            alter(each, its)
        each.build(its)
    update = fused.plan(optimizer, our_weights)
    assert isinstance(update, fused.Fused), update

    def keras_step(gradients):
        reference.apply([None if i in missing else g for i, g in enumerate(gradients)], keras_weights)

    def our_step(gradients, scale):
        update.apply([None if i in missing else g for i, g in enumerate(gradients)], scale)

    if not eager:
        keras_step, our_step = tf.function(keras_step), tf.function(our_step)
    rng = np.random.default_rng(1)
    start = [values(w) for w in our_weights]
    for t in range(steps):
        gradients = [gradient(rng, s, dtype, t) for s in shapes]
        scale = given(rng, t)
        if scale is None:
            keras_step(gradients)
        else:
            keras_step([g * tf.cast(scale[i], dtype) for i, g in enumerate(gradients)])
        our_step(gradients, scale)
        if t >= 10 and t % 7 and t != steps - 1:
            continue
        for theirs, ours in zip(
            [*reference.variables, *keras_weights], [*optimizer.variables, *our_weights], strict=True
        ):
            a, b = values(theirs), values(ours)
            assert same(a, b), f"step {t}: {ours.path}: {(a != b).sum()} of {a.size} elements differ"
        if t <= ORDINARY:
            everything = np.concatenate([values(w).astype(np.float64).reshape(-1) for w in our_weights])
            assert np.isfinite(everything).mean() > 0.5, f"step {t}: this test compares NaN with NaN"
    for i, (before, weight) in enumerate(zip(start, our_weights, strict=True)):
        moved = not np.array_equal(before, values(weight))
        assert moved if before.size > 100 and i not in missing else not moved or i not in missing


@pytest.mark.parametrize(("kind", "options"), MAKERS)
def test_a_fused_update_is_the_optimizer_bit_for_bit(kind, options):
    compare(lambda: kind(learning_rate=0.01, **options), "float32", steps=300)


@pytest.mark.parametrize("dtype", fused.DTYPES[1:])
@pytest.mark.parametrize(("kind", "options"), MAKERS)
def test_a_fused_update_is_the_optimizer_in_other_dtypes(kind, options, dtype):
    options = narrowed(kind, options, dtype)
    compare(lambda: kind(learning_rate=0.1, **options), dtype, steps=25)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", fused.DTYPES[1:])
@pytest.mark.parametrize(("kind", "options"), MAKERS)
def test_a_fused_update_is_the_optimizer_in_other_dtypes_for_long(kind, options, dtype):
    options = narrowed(kind, options, dtype)
    compare(lambda: kind(learning_rate=0.1, **options), dtype, steps=300)


SURROUNDED = [
    pytest.param(*maker.values, extra, id="-".join([maker.id, *extra]), marks=[pytest.mark.slow] if repeats else [])
    for maker in MAKERS
    for extra in OPTIONS
    for repeats in [
        bool(maker.values[1])
        and len(extra) == 1
        and "clipvalue" not in extra
        and maker.values[0] not in fused.MULTIPLIES_GRADIENT
    ]
]
"""Each optimizer with each option; variants of an optimizer with options together, as one alone repeats these."""


@pytest.mark.parametrize(("kind", "options", "extra"), SURROUNDED)
def test_what_surrounds_the_update_is_keras_s_bit_for_bit(kind, options, extra):
    if "loss_scale_factor" in extra and kind in fused.MULTIPLIES_GRADIENT:
        optimizer = kind(**options, **extra)
        optimizer.build(weights("float32"))
        assert fused.plan(optimizer, weights("float32")).startswith(f"{kind.__name__} with loss_scale_factor")
        return
    compare(lambda: kind(learning_rate=0.05, **options, **extra), "float32", steps=25)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("extra", OPTIONS, ids=lambda extra: "-".join(extra))
def test_what_surrounds_the_update_is_keras_s_in_other_dtypes(dtype, extra):
    options = narrowed(keras.optimizers.Adam, extra, dtype)
    compare(lambda: keras.optimizers.Adam(0.1, **options), dtype, steps=10, shapes=SHAPES[:8])


@pytest.mark.parametrize(("kind", "options"), MAKERS)
def test_an_eager_update_is_the_optimizer_bit_for_bit(kind, options):
    compare(lambda: kind(learning_rate=0.01, weight_decay=0.1, **options), "float32", steps=3, eager=True)


@pytest.mark.parametrize(("kind", "options"), MAKERS)
def test_a_scale_multiplies_each_gradient_before_keras_clips(kind, options):
    def given(rng, t):
        return tf.constant(rng.uniform(0, 1, len(SHAPES)).astype("float32"))

    compare(lambda: kind(learning_rate=0.05, **options), "float32", steps=10, given=given)
    compare(lambda: kind(learning_rate=0.05, clipnorm=0.5, **options), "float32", steps=10, given=given)


def test_a_learning_rate_may_be_a_schedule():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 20, warmup_steps=5, warmup_target=0.2)
    for kind in (keras.optimizers.AdamW, keras.optimizers.SGD):
        compare(lambda kind=kind: kind(schedule, weight_decay=0.1), "float32", steps=25)


def test_weights_excluded_from_decay_do_not_decay():
    def alter(optimizer, its):
        optimizer.exclude_from_weight_decay(var_list=its[3:5], var_names=["w7"])

    compare(lambda: keras.optimizers.AdamW(0.1, weight_decay=0.5), "float32", steps=5, alter=alter)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_weights_without_a_gradient_stay_where_they_are():
    for extra in ({}, {"clipnorm": 0.1}, {"global_clipnorm": 0.1}):
        compare(lambda extra=extra: keras.optimizers.AdamW(0.1, **extra), "float32", steps=5, missing=(2, 7))


def test_missing_gradients_warn_as_keras_warns():
    optimizer, its = keras.optimizers.Adam(), weights("float32")
    optimizer.build(its)
    update = fused.plan(optimizer, its)
    some = [None, *(tf.ones(s) for s in SHAPES[1:])]
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        update.apply(some)
    with pytest.raises(ValueError, match="No gradients provided"):
        update.apply([None] * len(SHAPES))


def test_weights_of_several_dtypes_share_an_optimizer():
    def both():
        return [w for dtype in ("float32", "bfloat16", "float32") for w in weights(dtype, shapes=[(40, 50), (7,)])]

    theirs, ours = both(), both()
    reference, optimizer = keras.optimizers.AdamW(0.1), keras.optimizers.AdamW(0.1)
    reference.build(theirs)
    optimizer.build(ours)
    update = fused.plan(optimizer, ours)
    step = tf.function(update.apply)
    keras_step = tf.function(lambda gradients: reference.apply(gradients, theirs))
    for t in range(5):
        gradients = [tf.cast(tf.random.normal(w.shape, seed=t), w.dtype) for w in ours]
        keras_step(gradients)
        seen = step(gradients)
    assert all(same(values(a), values(b)) for a, b in zip(theirs, ours, strict=True))
    for subject, tensors in ((WEIGHT, ours), (GRADIENT, gradients)):
        for row, tensor in zip(rows_of(seen, subject), tensors, strict=True):
            check(row, np.asarray(tensor.numpy()))


def rows_of(seen, subject, slots=()):
    """[P, 6] of one subject. What a `tf.function` returns has tensors for names, so their order is given."""
    return seen.cube.numpy()[:, [GRADIENT, UPDATE, WEIGHT, *slots].index(subject)]


def joint_of(seen, i, name):
    return float(seen.joint[i, JOINT.index(name)])


def check(row, array):
    twin = Moments.of(array).array[: len(DEVICE_MOMENTS)]
    size = np.abs(array.astype(np.float64)[np.isfinite(array.astype(np.float64))])
    for name, got, want in zip(DEVICE_MOMENTS, row, twin, strict=True):
        scale = size.sum() if name == "sum" else want
        assert abs(got - want) <= (1e-6 * scale if name in ("sum", "sumsq") else 0), (name, got, want)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("dtype", fused.DTYPES)
@pytest.mark.parametrize(("kind", "options"), MAKERS)
def test_what_is_observed_is_what_happened(kind, options, dtype):
    missing = 3
    optimizer, its = kind(learning_rate=0.01, **options), weights(dtype)
    optimizer.build(its)
    update = fused.plan(optimizer, its)
    step = tf.function(lambda gradients, scale: update.apply(gradients, scale))
    rng = np.random.default_rng(0)
    scale = tf.constant(rng.uniform(0.5, 1, len(SHAPES)).astype("float32"))
    for t in (0, 2, 3):
        gradients = [gradient(rng, s, dtype, t) for s in SHAPES]
        gradients[missing] = None
        before = [w.value.numpy() for w in its]
        seen = step(gradients, scale)
        for i, w in enumerate(its):
            after = w.value.numpy()
            difference = after - before[i]
            check(rows_of(seen, WEIGHT)[i], after)
            check(rows_of(seen, UPDATE)[i], difference)
            assert joint_of(seen, i, "steps") == 1
            np.testing.assert_allclose(joint_of(seen, i, "scale"), scale[i], rtol=1e-9)
            if i == missing:
                assert np.isnan(rows_of(seen, GRADIENT)[i]).all()
                shared = ("gradient_update", "rounded", "gradient_momentum", "normalized_gradient")
                assert np.isnan([joint_of(seen, i, name) for name in shared]).all()
                continue
            g = gradients[i].numpy()
            check(rows_of(seen, GRADIENT)[i], g)
            product = g.astype(np.float64) * difference.astype(np.float64)
            got, want = joint_of(seen, i, "gradient_update"), product.sum()
            assert np.isnan(got) if np.isnan(want) else abs(got - want) <= 1e-6 * np.abs(product).sum()
            assert joint_of(seen, i, "rounded") == ((g != 0) & (difference == 0)).sum()
        assert [name.numpy().decode() for name in seen.subjects[3:]] == list(update.rule.slots)
        for name, attribute in update.rule.slots.items():
            for i, slot in enumerate(getattr(optimizer, attribute)):
                assert slot.path.endswith(f"_{name}")
                check(rows_of(seen, name, update.rule.slots)[i], slot.value.numpy())


def test_what_no_cache_holds_is_updated_and_measured_as_well():
    rng, shape = np.random.default_rng(0), (2049, 1031)  # of so many elements short blocks are folded
    start, grad = (rng.standard_normal(shape).astype("float32") for _ in range(2))
    grad[:, ::97] = 0
    grad[5, 5], grad[6, 6] = np.nan, 1e-30
    pair = [keras.Variable(start) for _ in range(2)]
    ours, theirs = (keras.optimizers.Adam(1e-8) for _ in range(2))  # so small that many updates are rounded away
    for optimizer, weight in zip((ours, theirs), pair, strict=True):
        optimizer.build([weight])
    seen = tf.function(fused.plan(ours, pair[:1]).apply)([tf.constant(grad)])
    tf.function(lambda gradient: theirs.apply([gradient], pair[1:]))(tf.constant(grad))
    after = pair[0].value.numpy()
    assert after.tobytes() == pair[1].value.numpy().tobytes()
    with np.errstate(invalid="ignore"):
        update = after - start
    check(rows_of(seen, GRADIENT)[0], grad)
    check(rows_of(seen, UPDATE)[0], update)
    check(rows_of(seen, WEIGHT)[0], after)
    rounded = ((grad != 0) & (update == 0)).sum()
    assert joint_of(seen, 0, "rounded") == rounded > 1000
    measured = native_ops.measure([tf.constant(grad)])
    check(measured.numpy()[0], grad)
    around, joint = native_ops.observe([tf.constant(start)], [pair[0].value], [tf.constant(grad)])
    check(around.numpy()[0, 1], update)
    assert joint[0, JOINT.index("rounded")] == rounded


def test_observing_does_not_change_what_happens():
    results = []
    measured = tf.constant(np.random.default_rng(0).random((len(SHAPES), 6)))
    for arguments in ({"observe": False}, {"observe": True}, {"observe": True, "measured": measured, "every": 3}):
        optimizer, its = keras.optimizers.Adam(0.1), weights("float32")
        optimizer.build(its)
        seen = tf.function(fused.plan(optimizer, its).apply)([tf.ones(s) for s in SHAPES], **arguments)
        assert (seen is None) == (not arguments["observe"])
        results.append(b"".join(values(v).tobytes() for v in [*its, *optimizer.variables]))
    assert results[0] == results[1] == results[2]
    np.testing.assert_array_equal(rows_of(seen, GRADIENT), measured)


def test_a_fused_update_runs_inside_a_loop_in_a_graph():
    theirs, ours = weights("float32"), weights("float32")
    reference, optimizer = keras.optimizers.AdamW(0.1), keras.optimizers.AdamW(0.1)
    reference.build(theirs)
    optimizer.build(ours)
    update = fused.plan(optimizer, ours)

    @tf.function
    def many(apply, variables):
        for _ in tf.range(4):
            apply([v.value * 0.5 + 1.0 for v in variables()])

    many(lambda g: reference.apply(g, theirs), lambda: theirs)
    many(lambda g: update.apply(g), lambda: ours)
    assert all(same(values(a), values(b)) for a, b in zip(theirs, ours, strict=True))
    assert int(optimizer.iterations) == 4


def test_a_tensor_read_before_the_update_keeps_its_value():
    (weight,) = ours = [keras.Variable(np.zeros(1000, "float32"))]
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(ours)
    update = fused.plan(optimizer, ours)

    @tf.function
    def step():
        before = tf.identity(weight.value)
        update.apply([tf.ones([1000])], observe=False)
        return before, tf.identity(weight.value)

    for t in range(3):
        before, after = step()
        assert (before.numpy() == -t).all()
        assert (after.numpy() == -t - 1).all()


def test_a_training_step_updates_weights_where_they_lie():
    weight = keras.Variable(np.ones((300, 300), "float32"))
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build([weight])
    update = fused.plan(optimizer, [weight])
    held = [weight, *update_slots(optimizer, update)]

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(tf.matmul(tf.ones((4, 300)), weight.value)))
        update.apply(tape.gradient(loss, [weight.value]))

    def addresses():
        return [np.asarray(memoryview(v.value.read_value())).__array_interface__["data"][0] for v in held]

    step()
    before = addresses()
    for _ in range(3):
        step()
        assert addresses() == before


def update_slots(optimizer, update):
    return [slot for attribute in update.rule.slots.values() for slot in getattr(optimizer, attribute)]


def test_one_op_updates_all_weights_of_a_dtype():
    optimizer, its = keras.optimizers.Adam(), weights("float32")
    optimizer.build(its)
    update = fused.plan(optimizer, its)
    graph = tf.function(update.apply).get_concrete_function([tf.zeros(s) for s in SHAPES]).graph
    assert [op.type for op in graph.get_operations()].count("TrainrtUpdate") == 1


class Mine(keras.optimizers.Adam):
    pass


def refusals():
    optimizers = keras.optimizers
    its = [keras.Variable(np.zeros(3, "float32"), name="w")]
    yield "has no fused update", optimizers.Lamb(), its, {}
    yield "Mine has no fused update", Mine(), its, {}
    yield "XLA compiles the step", optimizers.Adam(), its, {"jit_compile": True}
    yield "Adam with use_ema", optimizers.Adam(use_ema=True), its, {}
    yield "Adam with gradient_accumulation_steps", optimizers.Adam(gradient_accumulation_steps=2), its, {}
    yield "learning rate is a function", optimizers.SGD(lambda: 0.1), its, {}
    yield "loss_scale_factor=3.0", optimizers.SGD(loss_scale_factor=3.0), its, {}
    constrained = [keras.Variable(np.zeros(3, "float32"), name="c")]
    constrained[0].constraint = keras.constraints.NonNeg()
    yield "has a constraint", optimizers.SGD(), constrained, {}
    sparse = [tf.IndexedSlices(tf.ones([1]), tf.constant([0]), tf.constant([3]))]
    yield "w has a sparse gradient", optimizers.SGD(global_clipnorm=1.0), its, {"gradients": sparse}
    yield "w is float32 and its gradient float64", optimizers.SGD(), its, {"gradients": [tf.zeros(3, tf.float64)]}


@pytest.mark.parametrize("case", range(len(list(refusals()))))
def test_what_is_not_claimed_is_refused_with_a_reason(case):
    reason, optimizer, its, arguments = list(refusals())[case]
    optimizer.build(its)
    assert reason in fused.plan(optimizer, its, **arguments)


def test_an_optimizer_that_is_not_built_or_not_of_these_weights_is_refused():
    optimizer = keras.optimizers.Adam()
    assert fused.plan(optimizer, weights("float32")) == "Adam is not built"
    optimizer.build(weights("float32"))
    assert "is not among the weights" in fused.plan(optimizer, weights("float32"))


def test_an_unknown_source_of_keras_is_refused(monkeypatch):
    its = weights("float32")
    optimizer = keras.optimizers.Adam()
    optimizer.build(its)
    monkeypatch.setitem(matched.MATCHED, "Adam.update_step", ("0" * 12,))
    matched.stranger.cache_clear()
    try:
        assert "Adam.update_step is not the one that was matched" in fused.plan(optimizer, its)
    finally:
        matched.stranger.cache_clear()


def test_a_step_of_the_instance_s_own_is_refused():
    its = weights("float32")
    optimizer = keras.optimizers.Adam()
    optimizer.build(its)
    optimizer.__dict__["update_step"] = lambda *arguments: None
    assert fused.plan(optimizer, its) == "Adam with its own update_step"


def test_every_rule_of_the_library_belongs_to_an_optimizer():
    used = {fused.RULES[p.values[0]](p.values[0](**p.values[1])).name for p in MAKERS}
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        native_ops.update(
            rule="none", weights=[tf.Variable(0.0).handle], slots=[], gradients=[tf.zeros([])], factors=[], prepare=[],
            scalars=[], decay=[0], graph=True, observe=False,
            measured=None, scale=None, iterations=tf.constant(0, tf.int64), learning_rate=tf.constant(0.0, tf.float64),
            constants=tf.zeros([6], tf.float64), every=1, own_clip="", divides="", momentum=-1, second=-1,
        )  # fmt: skip
    known = str(caught.value).split("rules ")[1].split(". Received")[0].split(", ")
    assert used == set(known)
