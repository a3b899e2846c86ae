"""Fresh processes of a script are compared bit by bit; what varies is located, and what is proven is signed."""

import json
import subprocess
import sys
import textwrap

import pytest

import trainrt
from trainrt.determinism.prove import ScriptFailed, prove
from trainrt.determinism.zoo import FAMILIES

ZOO = """
import sys, keras
from trainrt.determinism.zoo import FAMILIES
for name in sys.argv[2:]:
    keras.backend.clear_session()
    model, x, y = FAMILIES[name].make(int(sys.argv[1]))
    model.fit(x, y, batch_size=FAMILIES[name].batch, verbose=0)
"""

CROPPING = """
import keras, numpy as np, tensorflow as tf

class Crops(keras.layers.Layer):
    def call(self, x):
        boxes = tf.random.stateless_uniform([256, 2], (1, 2)) * 0.5
        boxes = tf.concat([boxes, boxes + 0.5], 1)
        rows = tf.range(256) % tf.shape(x)[0]
        return tf.reshape(tf.image.crop_and_resize(x, boxes, rows, (24, 24)), [16, -1])

keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(16, 3, padding="same", name="before"), Crops(),
                          keras.layers.Dense(2, name="after")])
model.compile("sgd", "mse")
rng = np.random.default_rng(0)
model.fit(rng.standard_normal((256, 32, 32, 3), "float32"), rng.standard_normal((256, 2)), batch_size=16, verbose=0)
"""

RACING_MAP = """
import keras, tensorflow as tf
keras.utils.set_random_seed(1)
noise = lambda i: (tf.random.normal([8], seed=1), tf.constant([1.0]))
data = tf.data.Dataset.range(512).map(noise, num_parallel_calls=4).batch(16)
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(data, verbose=0)
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def test_an_embedding_with_sgd_varies_in_the_fast_mode_is_located_and_is_fixed(script, tmp_path, capsys):
    path = script(ZOO)
    for attempt in range(4):  # threads race, and on a machine that is busy they may come in order once
        fast = prove(path, ["12", "embedding_sgd"], runs=2, fast=True, logdir=tmp_path / f"fast{attempt}")
        if not fast.identical:
            break
    assert not fast.identical
    found = fast.worst.difference
    assert found.stage == "variable"
    assert found.names[0].endswith("embedding/embeddings")
    assert found.exact
    assert "DIFFERS" in str(fast)

    fixed = prove(path, ["12", "embedding_sgd"], runs=2, logdir=tmp_path / "fixed")
    assert fixed.identical
    assert fixed.distinct == 1
    for paths in fixed.runs:
        run = trainrt.Run.open(paths[0])
        assert run.environment["certificate"]["identical"] is True
        assert run.environment["determinism"]["enforced"] is True
        assert run.end["how"] == "finished"
        assert not run.problems

    from trainrt import cli

    left, right = (str(paths[0]) for paths in fixed.runs)
    assert cli.main(["compare", "--bits", left, right]) == 0
    assert "Bit-identical" in capsys.readouterr().out
    left, right = (str(paths[0]) for paths in fast.runs)
    assert cli.main(["compare", "--bits", "--json", left, right]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["bits"][0]["difference"]["stage"] == "variable"
    assert cli.main(["report", right]) == 0
    assert cli.main(["report", str(fixed.runs[0][0])]) == 0
    assert "bit-identical in 2 processes" in capsys.readouterr().out


def test_a_script_that_fails_is_told_with_its_last_words(script, tmp_path):
    with pytest.raises(ScriptFailed, match="my own fault"):
        prove(script("raise SystemExit('my own fault')"), runs=2, logdir=tmp_path)


FIT = """
import sys, keras, numpy as np
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
x = np.ones((32, 4))
"""


@pytest.mark.parametrize("action", ["check", "prove", "bench"])
@pytest.mark.parametrize(
    ("text", "said", "unsaid"),
    [
        ("def f(:", ["SyntaxError", "def f(:"], "runpy"),
        ("print('nothing here')", ["called neither model.fit nor trainrt.fit"], "Traceback"),
        (FIT + "model.fit(x[:, :2], x)", ["ValueError", "model.fit(x[:, :2], x)"], "runpy"),
    ],
    ids=["syntax", "nothing", "fit"],
)
def test_a_script_that_cannot_be_looked_at_is_told_of_in_its_own_words(action, text, said, unsaid, script, tmp_path):
    path = script(text)
    rest = {
        "check": [path],
        "prove": ["--runs", "2", "--logdir", tmp_path, path],
        "bench": ["--rounds", "1", "--modes", "fast", "--logdir", tmp_path, "--script", path],
    }[action]
    command = [sys.executable, "-m", "trainrt", "determinism", action, *map(str, rest)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    answer = done.stdout if action == "bench" else done.stderr
    assert [words for words in (said[:1] if action == "bench" else said) if words not in answer] == [], answer
    assert unsaid not in done.stderr
    assert "trainrt.determinism" not in done.stderr


@pytest.mark.parametrize(
    "given",
    [{"runs": 1}, {"fast": True, "xla": True}, {"every": -1}, {"steps": 0}, {"seed": -1}],
    ids=lambda given: next(iter(given)),
)
def test_arguments_that_prove_nothing_are_refused(given, script, tmp_path):
    with pytest.raises(ValueError, match=rf"Received: {next(iter(given))}="):
        prove(script("raise SystemExit('was run')"), logdir=tmp_path, **given)


def test_a_proof_leaves_the_checkpoints_of_a_script_alone(script, tmp_path):
    place = tmp_path / "checkpoints"
    text = FIT + f"import trainrt\ntrainrt.fit(model, x, x[:, :1], verbose=0, checkpoint={str(place)!r})"
    proven = prove(script(text), runs=2, logdir=tmp_path / "prove")
    assert proven.identical
    assert proven.verdicts[0][0].lengths == (1, 1)
    assert not place.exists()


def test_runs_of_other_lengths_are_no_proof_and_told_with_both(script, tmp_path):
    count = tmp_path / "count"
    text = f"""{FIT}
from pathlib import Path
count = Path({str(count)!r})
count.write_text(count.read_text() + "x" if count.exists() else "x")
model.fit(x, x[:, :1], 8, epochs=len(count.read_text()), verbose=0)
"""
    certificate = prove(script(text), runs=2, logdir=tmp_path / "prove")
    assert not certificate.identical
    assert "One ran 4 steps, the other 8; in those that both ran all" in str(certificate)
    run = trainrt.Run.open(certificate.runs[1][0])
    assert run.environment["certificate"]["result"].startswith("One ran 4 steps, the other 8")


def test_check_looks_at_a_script_up_to_its_first_fit(script):
    path = script(
        """
        import keras, numpy as np
        layers = [keras.layers.Conv2D(2, 1), keras.layers.Resizing(9, 9, "nearest"), keras.layers.Flatten()]
        model = keras.Sequential([keras.Input((8, 8, 1)), *layers, keras.layers.Dense(1)])
        model.compile("adam", "mse")
        model.fit(np.ones((8, 8, 8, 1)), np.ones((8, 1)))
        raise SystemExit("the first fit is enough")
        """
    )
    command = [sys.executable, "-m", "trainrt", "determinism", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "ResizeNearestNeighborGrad" in done.stdout
    assert "UpSampling2D" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_bit_identical_in_six_processes(name, script, tmp_path):
    certificate = prove(script(ZOO), ["8", name], runs=6, logdir=tmp_path)
    assert [len(paths) for paths in certificate.runs] == [1] * 6
    assert certificate.identical, str(certificate)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "stage", "name"), [(CROPPING, "gradient", "before"), (RACING_MAP, "batch", "x")], ids=["crops", "map"]
)
def test_what_varies_in_the_fast_mode_is_located_and_is_fixed(text, stage, name, script, tmp_path):
    path = script(text)
    fast = prove(path, runs=4, fast=True, logdir=tmp_path / "fast")
    assert not fast.identical
    assert fast.worst.difference.stage == stage
    assert name in fast.worst.difference.names[0]
    assert prove(path, runs=3, logdir=tmp_path / "fixed").identical
