"""Records whose statistics are given numbers: what the examples and tests of rules are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainrt.record.vocabulary import GRADIENT, JOINT, MOMENTS, SCALAR, UPDATE, WEIGHT, Parameter, Record, Roster

JOINT_VALUES = (
    "clip_scale",
    "clip_share",
    "skipped_share",
    "rounded_share",
    "gradient_update_cosine",
    "gradient_momentum_cosine",
    "decay_ratio",
    "normalized_gradient_rms",
    "epsilon_share",
    "element_rate",
)
TENSOR_VALUES = ("norm", "rms", "mean", "absmax", "zero_share", "nonfinite_share", "nonfinite")


def names(slots: Sequence[str] = ()) -> list[str]:
    """The names of the values that `build` takes."""
    subjects = (GRADIENT, UPDATE, WEIGHT, *slots)
    tensors = [f"{subject}_{value}" for subject in subjects for value in TENSOR_VALUES]
    joint = [name for name in JOINT_VALUES if name != "gradient_momentum_cosine" or "momentum" in slots]
    return ["loss", "learning_rate", "update_ratio", *joint, *tensors]


def build(
    steps: int,
    parameters: int | Sequence[str | Parameter],
    size: int,
    dtype: str,
    slots: tuple[str, ...],
    scalars: Mapping[str, Any],
    values: Mapping[str, Any],
) -> tuple[Roster, Record]:
    """Builds the record that `Run.synthetic` describes."""
    unknown = sorted(set(values) - set(names(slots)))
    if unknown:
        raise TypeError(f"A synthetic run takes {', '.join(names(slots))}. Received: {', '.join(unknown)}.")
    if isinstance(parameters, int):
        parameters = ["dense/kernel", *(f"dense_{i}/kernel" for i in range(1, parameters))][:parameters]
    weights = tuple(
        one if isinstance(one, Parameter) else Parameter(one, one.rpartition("/")[0] or one, (size,), dtype)
        for one in parameters
    )
    sizes = np.array([float(weight.size) for weight in weights])
    shape = (steps, len(weights))
    given = {
        name: _spread(name, value, shape) for name, value in values.items() if name not in ("loss", "learning_rate")
    }

    moments = {WEIGHT: _moments(WEIGHT, given, sizes, shape, 1.0)}
    moments[GRADIENT] = _moments(GRADIENT, given, sizes, shape, 1.0)
    unreached = np.isnan(moments[GRADIENT][..., 0])
    if "update_ratio" in given:
        if "update_norm" in given or "update_rms" in given:
            raise ValueError("`update_ratio` and the norm of the update say the same. Received: both. Give one.")
        given["update_rms"] = given["update_ratio"] * _rms(moments[WEIGHT])
    if "rounded_share" in given and "update_zero_share" not in given:
        given["update_zero_share"] = given["rounded_share"]
    moments[UPDATE] = _moments(UPDATE, given, sizes, shape, np.where(unreached, np.nan, 1e-3 * _norm(moments[WEIGHT])))
    moments |= {slot: _moments(slot, given, sizes, shape, 0.0) for slot in slots}
    subjects = (GRADIENT, UPDATE, WEIGHT, *slots)

    scale = given.get("clip_scale", np.ones(shape))
    clipped = given.get("clip_share", (scale < 1).astype(float))
    product = given.get("gradient_update_cosine", -np.ones(shape)) * _norm(moments[GRADIENT]) * _norm(moments[UPDATE])
    rounded = given.get("rounded_share", np.zeros(shape)) * sizes
    rate = given.get("element_rate", np.broadcast_to(_rates(scalars, values, steps), shape))
    products = _norm(moments[GRADIENT]) * (_norm(moments["momentum"]) if "momentum" in moments else np.zeros(shape))
    joint = {
        "steps": np.ones(shape),
        "skipped": given.get("skipped_share", np.zeros(shape)),
        "decay": (given.get("decay_ratio", np.zeros(shape)) * _norm(moments[UPDATE])) ** 2,
        "slot_steps": np.ones(shape),
        "gradient_momentum": given.get("gradient_momentum_cosine", np.ones(shape)) * products,
        "momentum_norms": products,
        "normalized_gradient": given.get("normalized_gradient_rms", np.ones(shape)) ** 2 * sizes,
        "under_epsilon": given.get("epsilon_share", np.zeros(shape)) * sizes,
        "rates": rate * sizes,
        "largest_rate": rate,
        "smallest_rate": rate,
        "scale": scale,
        "clipped": clipped,
        "gradient_update": product,
        "rounded": rounded,
    }
    measured = ~np.isnan(moments[UPDATE][..., :1])

    rows = {"loss": np.geomspace(2.0, 1.0, steps), "learning_rate": 1e-3} | dict(scalars)
    rows |= {name: values[name] for name in ("loss", "learning_rate") if name in values}
    table = np.stack([np.broadcast_to(np.asarray(row, np.float64), steps) for row in rows.values()], axis=1)
    record = Record(
        np.repeat(np.arange(steps, dtype=np.int64)[:, None], 2, axis=1),
        1.7e9 + 0.01 * np.arange(1, steps + 1),
        {subject: moments[subject] for subject in subjects},
        np.where(measured, np.stack([joint[name] for name in JOINT], axis=-1), np.nan),
        np.repeat(table[:, :, None], len(SCALAR), axis=2),
    )
    return Roster(weights, subjects, tuple(rows)), record


def _rates(scalars: Mapping[str, Any], values: Mapping[str, Any], steps: int) -> np.ndarray:
    """[T, 1] the learning rate: what each element's own is unless told."""
    rate = values.get("learning_rate", scalars.get("learning_rate", 1e-3))
    return np.broadcast_to(np.asarray(rate, np.float64), steps)[:, None]


def _moments(subject: str, given: Mapping[str, np.ndarray], sizes: np.ndarray, shape, norm) -> np.ndarray:
    """[T, P, M] of tensors whose elements that are neither zero nor non-finite have one magnitude, unless told."""

    def value(name: str) -> np.ndarray | None:
        return given.get(f"{subject}_{name}")

    count = np.broadcast_to(sizes, shape)
    share, number = value("nonfinite_share"), value("nonfinite")
    nonfinite = share * count if share is not None else number if number is not None else np.zeros(shape)
    finite = count - nonfinite
    asked, rms = value("norm"), value("rms")
    if rms is not None:
        if asked is not None:
            raise ValueError(f"The norm and the rms of the {subject} say the same. Received: both. Give one.")
        asked = rms * np.sqrt(finite)
    zero_share = value("zero_share")
    if zero_share is not None:
        zeros = zero_share * count
        norm = np.where(finite > zeros, norm, 0.0 * norm) if asked is None else asked
    else:
        norm = np.where(finite > 0, norm, 0.0 * norm) if asked is None else asked
        zeros = np.where(norm == 0, finite, 0.0)
    live = finite - zeros
    if (live < 0).any() or ((live == 0) & (norm > 0)).any() or ((live > 0) & (norm == 0)).any():
        raise ValueError(
            f"A norm is zero just when every finite element is. Received: norm and shares of the {subject} that "
            "contradict each other. Leave one out."
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        absmax = np.where(live > 0, norm / np.sqrt(live), 0.0)
    absmax = absmax if (told := value("absmax")) is None else told
    mean = np.zeros(shape) if (told := value("mean")) is None else told
    sumsq = norm**2
    columns = (count, mean * finite, sumsq, absmax, zeros, nonfinite, sumsq, sumsq)
    assert len(columns) == len(MOMENTS)
    return np.where(np.isnan(sumsq)[..., None], np.nan, np.stack(np.broadcast_arrays(*columns), axis=-1))


def _norm(moments: np.ndarray) -> np.ndarray:
    return np.sqrt(moments[..., MOMENTS.index("sumsq")])


def _rms(moments: np.ndarray) -> np.ndarray:
    return _norm(moments) / np.sqrt(moments[..., 0] - moments[..., MOMENTS.index("nonfinite")])


def _spread(name: str, value: Any, shape: tuple[int, int]) -> np.ndarray:
    array = np.asarray(value, np.float64)
    try:
        return np.broadcast_to(array[:, None] if array.ndim == 1 else array, shape).copy()
    except ValueError:
        raise ValueError(
            f"A value of a synthetic run is a number, [T] or [T, P], here [{shape[0]}] or {list(shape)}. "
            f"Received: {name} of shape {list(array.shape)}."
        ) from None
