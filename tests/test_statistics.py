"""Every statistic of the package against an independent twin, computed from the tensors of each step."""

import numpy as np
import pytest

from trainrt.record import statistics
from trainrt.record.run import Run
from trainrt.record.vocabulary import JOINT, Moments, Parameter, Record, Roster

SHAPES = ((7, 3), (1,), (), (0,), (129,))
SUBJECTS = ("gradient", "update", "weight", "velocity", "momentum")
OUTSIDE, DECAY = 0.3, 0.01
WIDTH, STEPS = 3, 12
RNG = np.random.default_rng(4)


def _tensor(shape) -> np.ndarray:
    x = RNG.normal(size=shape) * RNG.exponential()
    x = np.where(RNG.random(shape) < 0.2, 0.0, x)
    return np.where(RNG.random(shape) < 0.05, RNG.choice([np.nan, np.inf, -np.inf]), x)


STEP = [{subject: [_tensor(shape) for shape in SHAPES] for subject in SUBJECTS} for _ in range(STEPS)]
SKIPPED = (RNG.random((STEPS, len(SHAPES))) < 0.3).astype(float)
HELD = np.arange(STEPS) % 4 != 1
"""Steps in which the gradient was held against the slots; some windows have none of the others, none has none."""

OF_SLOTS = JOINT[JOINT.index("gradient_momentum") :]
SCALE = np.where(RNG.random((STEPS, len(SHAPES))) < 0.5, 1.0, RNG.random((STEPS, len(SHAPES))))
RATE = RNG.random(STEPS)
CORRECTION = 1 - 0.9 ** np.arange(1, STEPS + 1)
PARAMETERS = tuple(Parameter(f"w{i}", f"w{i}", shape, "float32") for i, shape in enumerate(SHAPES))
ROSTER = Roster(PARAMETERS, SUBJECTS, ("learning_rate", "bias_correction"))


def _product(step, p) -> float:
    a, b = step["gradient"][p], step["update"][p]
    ok = np.isfinite(a) & np.isfinite(b)
    return float((a[ok] * b[ok]).sum())


def _with_momentum(step, p) -> float:
    a, b = step["gradient"][p], step["momentum"][p]
    ok = np.isfinite(a) & np.isfinite(b)
    return float((a[ok] * b[ok]).sum())


def _norms(step, p) -> float:
    a, b = (np.nan_to_num(step[s][p], nan=0.0, posinf=0.0, neginf=0.0) for s in ("gradient", "momentum"))
    return float(np.linalg.norm(a) * np.linalg.norm(b))


def _divisor(step, p) -> np.ndarray:
    """Of a second moment whose root is the velocity's magnitude."""
    return np.abs(np.nan_to_num(step["velocity"][p], nan=1.0, posinf=1.0, neginf=1.0)).reshape(-1) + OUTSIDE


def _normalized(step, p) -> np.ndarray:
    return np.nan_to_num(step["gradient"][p], nan=0.0, posinf=0.0, neginf=0.0).reshape(-1) / _divisor(step, p)


def _decayed(step, p) -> np.ndarray:
    return DECAY * np.nan_to_num(step["weight"][p], nan=0.0, posinf=0.0, neginf=0.0)


def _rounded(step, p) -> int:
    return int(((step["update"][p] == 0) & (step["gradient"][p] != 0)).sum())


def _record(width: int) -> Record:
    joint = np.array(
        [
            [
                [
                    {
                        "steps": 1.0,
                        "scale": SCALE[t, p],
                        "clipped": float(SCALE[t, p] < 1),
                        "gradient_update": _product(step, p),
                        "rounded": _rounded(step, p),
                        "skipped": SKIPPED[t, p],
                        "decay": np.square(_decayed(step, p)).sum(),
                        "slot_steps": HELD[t],
                        "gradient_momentum": _with_momentum(step, p),
                        "momentum_norms": _norms(step, p),
                        "normalized_gradient": np.square(_normalized(step, p)).sum(),
                        "under_epsilon": (_divisor(step, p) < 2 * OUTSIDE).sum(),
                        "rates": (RATE[t] / _divisor(step, p)).sum(),
                        "largest_rate": (RATE[t] / _divisor(step, p)).max(initial=-np.inf),
                        "smallest_rate": (RATE[t] / _divisor(step, p)).min(initial=np.inf),
                    }[name]
                    if HELD[t] or name not in OF_SLOTS
                    else np.nan
                    for name in JOINT
                ]
                for p in range(len(SHAPES))
            ]
            for t, step in enumerate(STEP)
        ]
    )
    numbers = np.arange(STEPS)
    record = Record(
        np.stack([numbers, numbers], 1),
        numbers.astype(float),
        {s: np.array([[Moments.of(x).array for x in step[s]] for step in STEP]) for s in SUBJECTS},
        joint,
        np.repeat(np.stack([RATE, CORRECTION], axis=1)[:, :, None], 3, axis=2),
    )
    return Record.concatenate([record[at : at + width].merge() for at in range(0, STEPS, width)])


class Window:
    """The tensors of one weight in the steps of one window."""

    def __init__(self, steps: list[int], p: int):
        self.numbers, self.p = steps, p

    def all(self, subject: str) -> np.ndarray:
        return np.concatenate([STEP[t][subject][self.p].reshape(-1) for t in self.numbers])

    def finite(self, subject: str) -> np.ndarray:
        x = self.all(subject)
        return x[np.isfinite(x)]

    def norms(self, subject: str) -> np.ndarray:
        return np.array([np.linalg.norm(x[np.isfinite(x)]) for x in (STEP[t][subject][self.p] for t in self.numbers)])

    def norm(self, subject: str) -> float:
        return np.sqrt(np.mean(self.norms(subject) ** 2))

    def rms(self, subject: str) -> float:
        x = self.finite(subject)
        return np.sqrt(np.mean(x**2)) if x.size else np.nan

    @property
    def scale(self) -> np.ndarray:
        return SCALE[self.numbers, self.p]

    def each(self, of) -> np.ndarray:
        """What `of` gives for each step, one behind the other."""
        return np.concatenate([np.ravel(of(STEP[t], self.p)) for t in self.numbers])

    def held(self, of) -> np.ndarray:
        """The same of the steps in which the gradient was held against the slots."""
        return np.concatenate([[], *(np.ravel(of(STEP[t], self.p)) for t in self.numbers if HELD[t])])

    def extreme(self, reduce, nothing: float) -> float:
        """The largest or smallest rate; NaN if no step of the window was held against the slots."""
        return reduce.reduce(self.rates, initial=nothing) if HELD[self.numbers].any() else np.nan

    @property
    def rates(self) -> np.ndarray:
        return np.concatenate([[], *(RATE[t] / _divisor(STEP[t], self.p) for t in self.numbers if HELD[t])])

    @property
    def product(self) -> float:
        return sum(_product(STEP[t], self.p) for t in self.numbers)


def _share(condition: np.ndarray) -> float:
    return np.mean(condition) if condition.size else np.nan


QUANTITY_TWINS = {
    "norm": lambda w, s: w.norm(s),
    "rms": lambda w, s: w.rms(s),
    "mean": lambda w, s: np.mean(w.finite(s)) if w.finite(s).size else np.nan,
    "absmax": lambda w, s: np.max(np.abs(w.finite(s)), initial=0.0),
    "zero_share": lambda w, s: _share(w.all(s) == 0),
    "nonfinite_share": lambda w, s: _share(~np.isfinite(w.all(s))),
    "nonfinite": lambda w, s: (~np.isfinite(w.all(s))).sum() / len(w.numbers),
    "peak_norm": lambda w, s: w.norms(s).max(),
    "trough_norm": lambda w, s: w.norms(s).min(),
}

TWINS = {
    "update_ratio": lambda w: w.rms("update") / w.rms("weight"),
    "gradient_ratio": lambda w: w.rms("gradient") / w.rms("weight"),
    "norm_share": lambda w: (
        w.norm("gradient") ** 2 / sum(Window(w.numbers, p).norm("gradient") ** 2 for p in range(len(SHAPES)))
    ),
    "clip_scale": lambda w: w.scale.mean(),
    "clip_share": lambda w: (w.scale < 1).mean(),
    "clipped_gradient_norm": lambda w: w.norm("gradient") * w.scale.mean(),
    "clipped_gradient_rms": lambda w: w.rms("gradient") * w.scale.mean(),
    "clipped_gradient_mean": lambda w: QUANTITY_TWINS["mean"](w, "gradient") * w.scale.mean(),
    "clipped_gradient_absmax": lambda w: QUANTITY_TWINS["absmax"](w, "gradient") * w.scale.mean(),
    "unchanged_share": lambda w: _share(w.all("update") == 0),
    "unpushed_share": lambda w: _share((w.all("update") == 0) & (w.all("gradient") == 0)),
    "rounded_share": lambda w: _share((w.all("update") == 0) & (w.all("gradient") != 0)),
    "gradient_update_cosine": lambda w: (
        w.product / (np.linalg.norm(w.norms("gradient")) * np.linalg.norm(w.norms("update")))
    ),
    "gradient_momentum_cosine": lambda w: w.held(_with_momentum).sum() / w.held(_norms).sum(),
    "normalized_gradient_rms": lambda w: np.sqrt(_share(w.held(_normalized) ** 2)),
    "epsilon_share": lambda w: _share(w.held(_divisor) < 2 * OUTSIDE),
    "element_rate": lambda w: _share(w.rates),
    "element_rate_max": lambda w: w.extreme(np.fmax, -np.inf),
    "element_rate_min": lambda w: w.extreme(np.fmin, np.inf),
    "decay_norm": lambda w: np.linalg.norm(w.each(_decayed)) / np.sqrt(len(w.numbers)),
    "decay_ratio": lambda w: np.linalg.norm(w.each(_decayed)) / np.linalg.norm(w.norms("update")),
    "second_moment_age": lambda w: -np.log(1 - CORRECTION[w.numbers].mean()),
    "skipped_share": lambda w: SKIPPED[w.numbers, w.p].mean(),
    "predicted_decrease": lambda w: -w.product / len(w.numbers),
    "effective_learning_rate": lambda w: w.rms("update") / w.rms("gradient"),
    "unit_update": lambda w: w.rms("update") / RATE[w.numbers].mean(),
}


def _twin(name: str):
    if name in TWINS:
        return TWINS[name]
    subject = next(s for s in SUBJECTS if name.startswith(f"{s}_"))
    quantity = QUANTITY_TWINS[name.removeprefix(f"{subject}_")]
    return lambda window: quantity(window, subject)


@pytest.mark.parametrize("width", [1, WIDTH])
@pytest.mark.parametrize("name", statistics.names(SUBJECTS))
def test_a_statistic_is_what_the_tensors_say(name, width):
    values = Run(ROSTER, _record(width))[name]
    with np.errstate(all="ignore"):
        windows = [list(range(at, at + width)) for at in range(0, STEPS, width)]
        expected = [[_twin(name)(Window(steps, p)) for p in range(len(SHAPES))] for steps in windows]
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("norm", np.linalg.norm),
        ("rms", lambda x: np.sqrt(np.mean(x**2)) if x.size else np.nan),
        ("mean", lambda x: np.mean(x) if x.size else np.nan),
        ("absmax", lambda x: np.abs(x).max(initial=0.0)),
    ],
)
def test_the_gradient_after_the_clip_is_exact_in_windows_of_one_step(name, twin):
    values = Run(ROSTER, _record(1))[f"clipped_gradient_{name}"]
    tensors = [[step["gradient"][p] * SCALE[t, p] for p in range(len(SHAPES))] for t, step in enumerate(STEP)]
    expected = [[twin(x[np.isfinite(x)]) for x in row] for row in tensors]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_what_did_not_change_was_not_pushed_or_was_rounded_away():
    run = Run(ROSTER, _record(WIDTH))
    np.testing.assert_allclose(run["unpushed_share"] + run["rounded_share"], run["unchanged_share"], rtol=1e-12)


@pytest.mark.parametrize("name", sorted({**statistics.STATISTICS, **statistics.QUANTITIES}))
def test_a_statistic_says_its_unit_and_shows_an_example(name):
    known = {**statistics.STATISTICS, **statistics.QUANTITIES}[name]
    assert known.unit
    assert ">>>" in known.doc


@pytest.mark.parametrize("name", statistics.names(SUBJECTS))
def test_a_weight_that_was_not_measured_has_no_statistics(name):
    run = Run.synthetic(
        steps=2,
        parameters=2,
        slots=("velocity", "momentum"),
        scalars={"bias_correction": 0.5},
        **{f"{s}_norm": [[np.nan, 1.0]] * 2 for s in SUBJECTS},
    )
    assert np.isnan(run[name][:, 0]).all()
    assert not np.isnan(run[name][:, 1]).any()


def test_no_statistic_warns_about_what_is_zero_empty_or_not_finite():
    zero = {f"{s}_norm": 0.0 for s in SUBJECTS}
    slots = ("velocity", "momentum")
    for run in (
        Run.synthetic(steps=2, slots=slots, **zero),
        Run.synthetic(steps=2, size=0, slots=slots),
        Run.synthetic(steps=2, slots=slots, **{f"{s}_nonfinite_share": 1.0 for s in SUBJECTS}),
    ):
        for name in run.statistics:
            run[name]


@pytest.fixture
def registered():
    before = dict(statistics.STATISTICS)
    yield statistics.STATISTICS
    statistics.STATISTICS.clear()
    statistics.STATISTICS.update(before)


def test_a_statistic_of_the_user_reads_any_run_with_its_arguments(registered):
    @statistics.statistic(unit="1/loss")
    def momentum_over_loss(velocity, loss):
        "Velocity over loss."
        return velocity.rms / loss

    run = Run.synthetic(steps=3, parameters=2, slots=("velocity",), velocity_norm=10.0, loss=[1.0, 2.0, 4.0])
    np.testing.assert_allclose(run["momentum_over_loss"], [[1.0, 1.0], [0.5, 0.5], [0.25, 0.25]])
    assert momentum_over_loss.__doc__ == registered["momentum_over_loss"].doc
    assert "momentum_over_loss" in run.statistics
    without = Run.synthetic()
    assert "momentum_over_loss" not in without.statistics
    with pytest.raises(KeyError, match="needs 'velocity'"):
        without["momentum_over_loss"]


def test_a_statistic_may_be_defined_again_by_its_user_but_not_one_of_the_package(registered):
    for factor in (1.0, 2.0):

        @statistics.statistic
        def mine(steps, factor=factor):
            return steps * factor

    np.testing.assert_array_equal(Run.synthetic(steps=2)["mine"], [[2.0], [2.0]])
    with pytest.raises(ValueError, match="Give yours another name"):

        @statistics.statistic
        def update_ratio(update):
            return update.rms


def test_arguments_without_a_name_are_refused():
    with pytest.raises(TypeError, match="Name each argument"):

        @statistics.statistic
        def everything(*args):
            return args


def test_a_wrong_name_lists_those_like_it():
    with pytest.raises(KeyError, match="update_ratio"):
        Run.synthetic()["updat_ratio"]
    with pytest.raises(KeyError, match=r"run\.scalar\('loss'\)"):
        Run.synthetic()["loss"]


def test_a_statistic_of_another_shape_is_refused(registered):
    @statistics.statistic
    def total(gradient):
        return gradient.norm[:1, :].repeat(7, axis=0)

    with pytest.raises(ValueError, match="Reduce no axis"):
        Run.synthetic(steps=3)["total"]
