"""A training that died and goes on ends with the bits of one that never stopped, whatever it reads."""

import warnings

import endurance_child as child
import keras
import numpy as np
import pytest
import tensorflow as tf

import trainrt
from trainrt.endurance.checkpoint import Checkpoint, Store

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`shuffle=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*recycling of the tracker:ResourceWarning"),
]
STEPS = child.ROWS // child.BATCH


class Death(BaseException):
    """Nobody catches it on the way, as nobody catches a signal."""


def dies_after(steps):
    class Dies(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            nonlocal steps
            steps -= 1
            if not steps:
                raise Death

    return Dies()


def killed(monkeypatch, tmp_path, source, after, every):
    """The training, dead after so many steps, and started again."""
    place = str(tmp_path / "checkpoints"), str(tmp_path / "logs")
    fit = trainrt.fit

    def dying(model, *args, callbacks, **keywords):
        return fit(model, *args, callbacks=[*callbacks, dies_after(after)], **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(trainrt, "fit", dying)
        with pytest.raises(Death):
            child.train(source, *place, every=every)
    return child.train(source, *place, every=every)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By source: a training that never stops and keeps no checkpoints."""
    made = {}

    def of(source):
        if source not in made:
            made[source] = child.train(source, None, str(tmp_path_factory.mktemp("whole")))
        return made[source]

    return of


def same(resumed, whole):
    """All but the grouping of steps into windows, which depends on when they were written."""
    return {k: v for k, v in resumed.items() if k != "last"} == {k: v for k, v in whole.items() if k != "last"}


def check_record(outcome, steps):
    covered = [s for a, b in zip(outcome["steps"], outcome["last"], strict=True) for s in range(a, b + 1)]
    assert covered == list(range(steps))


@pytest.mark.parametrize(
    ("source", "after", "every"),
    [
        ("arrays", STEPS + 9, 7),
        ("dataset", STEPS + 12, 11),
        pytest.param("arrays", 2 * STEPS + 3, "epoch", marks=pytest.mark.slow),
        pytest.param("generator", 2 * STEPS + 5, 16, marks=pytest.mark.slow),
        pytest.param("large_arrays", 3 * STEPS - 1, 10, marks=pytest.mark.slow),
        pytest.param("repeated", 31, 10, marks=pytest.mark.slow),
        pytest.param("dataset", 2 * STEPS + 1, "epoch", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_run_that_never_stopped(whole, monkeypatch, tmp_path, source, after, every):
    resumed = killed(monkeypatch, tmp_path, source, after, every)
    check_record(resumed, 4 * 23 if source == "repeated" else 4 * STEPS)
    assert same(resumed, whole(source))


def test_a_training_that_is_over_is_given_back_as_it_ended(whole, tmp_path):
    place = str(tmp_path / "checkpoints"), str(tmp_path / "logs")
    first = child.train("arrays", *place)
    files = sorted((tmp_path / "logs").rglob("*.trainrt"))
    again = child.train("arrays", *place)
    assert first == again
    assert same(first, whole("arrays"))
    assert sorted((tmp_path / "logs").rglob("*.trainrt")) == files


def plain_fit(checkpoint, epochs=2, units=3, callbacks=(), **keywords):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input([4]), keras.layers.Dense(units, name="only"), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    data = {"x": x, "y": x[:, :1], **keywords}
    trainrt.fit(model, **data, epochs=epochs, verbose=0, callbacks=list(callbacks), checkpoint=checkpoint)
    return [np.asarray(v).tobytes() for v in [*model.variables, *model.optimizer.variables]]


def test_more_epochs_go_on_where_fewer_ended(tmp_path):
    plain_fit(tmp_path, epochs=2)
    assert plain_fit(tmp_path, epochs=5) == plain_fit(tmp_path / "whole", epochs=5)


@pytest.mark.parametrize("which", ["data-00000-of-00001", "index"])
def test_a_damaged_checkpoint_is_read_right_or_told_of_and_the_one_before_it_used(tmp_path, which):
    store = Store(tmp_path, keep=3)
    for number in range(3):
        store.save({"number": number, "values": np.full(500, number, np.float32)})
        store.wait()
    newest = tmp_path / f"trainrt-3.{which}"
    data, random, refused = newest.read_bytes(), np.random.default_rng(0), 0
    places = random.integers(0, len(data), 60)
    for number, place in enumerate(places):
        newest.write_bytes(data[:place] if number % 3 else data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            saved = Store(tmp_path, keep=3).newest()
        assert saved.meta["number"] == (1 if told else 2)
        assert (saved.meta["values"] == saved.meta["number"]).all()
        assert not told or "trainrt-3 is damaged" in str(told[0].message)
        refused += bool(told)
    assert refused > len(places) // 2


def test_files_that_are_whole_but_not_what_was_saved_are_refused(tmp_path):
    store = Store(tmp_path, keep=2)
    store.save({"values": np.arange(4)})
    store.wait()
    reader = tf.train.load_checkpoint(str(tmp_path / "trainrt-1"))
    parts = {n: reader.get_tensor(f"{n}/.ATTRIBUTES/VARIABLE_VALUE") for n in ("arrays/0", "meta", "digest")}
    other = tf.train.Checkpoint(
        arrays=[tf.Variable(parts["arrays/0"] + 1)],
        meta=tf.Variable(parts["meta"]),
        digest=tf.Variable(parts["digest"]),
    )
    other.write(str(tmp_path / "trainrt-2"))
    with pytest.warns(UserWarning, match="digest is not that of its content"):
        assert Store(tmp_path, keep=2).newest().path.name == "trainrt-1"


def test_a_list_of_checkpoints_that_is_gone_hides_none(tmp_path):
    plain_fit(tmp_path, epochs=1)
    (tmp_path / "checkpoint").write_text("torn")
    assert Store(tmp_path, 3).newest().meta["epoch"] == 0
    assert plain_fit(tmp_path, epochs=3) == plain_fit(tmp_path / "whole", epochs=3)


def test_a_generator_is_read_again_up_to_where_it_was(tmp_path):
    def batches():
        random = np.random.default_rng(1)
        while True:
            x = random.normal(size=(4, 4)).astype("float32")
            yield x, x[:, :1]

    def fit(directory, epochs):
        data = {"x": batches(), "y": None, "steps_per_epoch": 5}
        return plain_fit(Checkpoint(tmp_path / directory, source="skip"), epochs, **data)

    fit("resumed", 2)
    assert fit("resumed", 3) == fit("whole", 3)


def test_no_more_are_kept_than_asked_for(tmp_path):
    plain_fit(Checkpoint(tmp_path, keep=2), epochs=5)
    assert sorted(p.name for p in tmp_path.glob("*.index")) == ["trainrt-4.index", "trainrt-5.index"]


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    plain_fit(tmp_path)
    with pytest.raises(ValueError, match=r"only/kernel \(4, 3\) is now sequential\S*only/kernel \(4, 5\)"):
        plain_fit(tmp_path, epochs=3, units=5)


def test_other_data_in_the_middle_of_an_epoch_is_refused(tmp_path):
    with pytest.raises(Death):
        plain_fit(Checkpoint(tmp_path, every=3), callbacks=[dies_after(4)], batch_size=4)
    x = np.zeros((31, 4), "float32")
    with pytest.raises(ValueError, match="had 32 rows, now it has 31"):
        plain_fit(Checkpoint(tmp_path, every=3), x=x, y=x[:, :1], batch_size=4)


@pytest.mark.parametrize(
    "keywords",
    [
        {"x": "generator", "y": None, "steps_per_epoch": 2},
        {"x": "stateful map", "y": None},
        {"shuffle": "batch"},
    ],
    ids=["generator", "stateful map", "batch shuffle"],
)
def test_a_source_that_cannot_be_gone_back_into_is_refused_and_the_remedy_named(tmp_path, keywords):
    x = np.ones((8, 4), "float32")
    if keywords.get("x") == "generator":
        keywords = {**keywords, "x": ((x, x[:, :1]) for _ in range(9))}
    elif keywords.get("x"):
        data = tf.data.Dataset.from_tensors((x, x[:, :1])).map(lambda a, b: (a + tf.random.normal([8, 4]), b))
        keywords = {**keywords, "x": data}
    with pytest.raises(ValueError, match='source="skip"'):
        plain_fit(tmp_path, **keywords)


def test_two_that_would_go_back_are_refused(tmp_path):
    with pytest.raises(ValueError, match="BackupAndRestore"):
        plain_fit(tmp_path / "a", callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "b")])


def test_a_callback_that_keeps_its_state_to_itself_is_named(tmp_path):
    class Counts(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.count = 0

    with pytest.warns(UserWarning, match="Counts may remember"):
        plain_fit(tmp_path, callbacks=[Counts()])


def test_what_callbacks_of_keras_remember_goes_on(tmp_path):
    """What the next run's callbacks hold after another epoch is what those of one that never stopped hold."""

    def trained(directory, *epochs):
        for last in epochs:
            kept = [
                keras.callbacks.EarlyStopping("loss", patience=9, min_delta=10.0, restore_best_weights=True),
                keras.callbacks.ReduceLROnPlateau("loss", patience=2, min_delta=10.0, cooldown=3),
                keras.callbacks.ModelCheckpoint(tmp_path / "best.weights.h5", "loss", 0, True, True),
                keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
            ]
            bits = plain_fit(tmp_path / directory, last, callbacks=kept)
        stopping, plateau, best, _ = kept
        told = stopping.wait, stopping.best, stopping.best_epoch, plateau.wait, plateau.cooldown_counter, plateau.best
        return bits, told, best.best, [w.tobytes() for w in stopping.best_weights]

    resumed, whole = trained("resumed", 3, 4), trained("whole", 4)
    assert resumed == whole
    assert resumed[1][0] == 3, "it has waited since the first epoch"


def test_old_random_ops_in_the_step_are_told_of(tmp_path):
    class Noise(keras.layers.Layer):
        def call(self, x):
            return x + tf.random.normal(tf.shape(x))

    model = keras.Sequential([Noise(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((8, 4), "float32")
    with pytest.warns(UserWarning, match="RandomStandardNormal"):
        trainrt.fit(model, x, x[:, :1], verbose=0, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"every": 0}, ValueError),
        ({"every": "step"}, ValueError),
        ({"every": True}, ValueError),
        ({"keep": 0}, ValueError),
        ({"source": "again"}, ValueError),
        ({"directory": ""}, TypeError),
    ],
)
def test_arguments_are_checked(wrong, error):
    with pytest.raises(error, match="Received"):
        Checkpoint(**{"directory": "x", **wrong})


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "own train function"])
def test_what_is_not_traced_goes_on_too(tmp_path, eager):
    class Own(keras.Model):
        def make_train_function(self, force=False):
            self.train_function = lambda iterator: self.train_step(next(iterator))
            return self.train_function

    def fit(checkpoint, epochs):
        keras.utils.set_random_seed(0)
        inputs = keras.Input([4])
        outputs = keras.layers.Dense(1)(keras.layers.Dropout(0.5)(inputs))
        model = (keras.Model if eager else Own)(inputs, outputs)
        model.compile("adam", "mse", run_eagerly=True)
        x = np.ones((8, 4), "float32")
        trainrt.fit(model, x, x[:, :1], epochs=epochs, batch_size=2, verbose=0, observe=eager, checkpoint=checkpoint)
        return [np.asarray(v).tobytes() for v in [*model.variables, *model.optimizer.variables]]

    fit(tmp_path / "a", 1)
    assert fit(tmp_path / "a", 3) == fit(tmp_path / "b", 3)
