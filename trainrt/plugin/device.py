"""What the machine did, by the step: the samples of the documents "telemetry" on the columns of a picture.

Legend:  S samples   C columns
"""

from __future__ import annotations

import numpy as np

from trainrt.plugin.tables import Columns
from trainrt.record.run import Run

PREFIX = "device/"
PROCESS = ("cpu_cores", "machine_cpu", "rss_bytes")
CARD = ("utilisation", "memory_bytes", "power_w", "temperature_c", "sm_mhz")
"""What is drawn of the process and of each GPU, in this order; `static/numbers.js` has their titles and units."""


def samples(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps [S], never falling, and name -> values [S], NaN where nothing was told; of nonsense in a record nothing.

    >>> from trainrt.record.vocabulary import Document
    >>> told = {"samples": {"step": [3, 9], "cpu_cores": [1.5, None], "gpu1/power_w": [200, 210], "time": [0, 1]}}
    >>> steps, values = samples(Run.synthetic(documents=[Document("telemetry", 9, told)]))
    >>> steps.tolist(), {name: v.tolist() for name, v in values.items()}
    ([3, 9], {'cpu_cores': [1.5, nan], 'gpu1/power_w': [200.0, 210.0]})
    """
    try:
        return _samples([d.content["samples"] for d in run.documents if d.kind == "telemetry"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return np.zeros(0, np.int64), {}


def _samples(parts: list[dict]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    parts = [part for part in parts if part.get("step")]
    if not parts:
        return np.zeros(0, np.int64), {}
    steps = np.concatenate([np.array(part["step"], np.int64) for part in parts])
    order = np.argsort(steps, kind="stable")  # a run that went on after a death told some steps twice
    told = {name for part in parts for name in part}
    cards = sorted({int(name.partition("/")[0][3:]) for name in told if name.startswith("gpu")})
    names = [*PROCESS, *(f"gpu{card}/{name}" for card in cards for name in CARD)]
    if any(len(part.get(name, part["step"])) != len(part["step"]) for part in parts for name in names):
        raise ValueError("samples of one document that are not as many of each")
    values = {}
    for name in (name for name in names if name in told):
        rows = [np.array(part.get(name, [None] * len(part["step"])), np.float64) for part in parts]
        values[name] = np.concatenate(rows)[order]
    return steps[order], values


def lines(run: Run, cut: Columns) -> dict[str, np.ndarray]:
    """Name -> [3, C] float32: minimum, mean and maximum of the samples of each column.

    A sample stands for the steps since the one before it. Behind the last one there is nothing: NaN.
    """
    steps, values = samples(run)
    if not values:
        return {}
    first = np.searchsorted(steps, np.ceil(cut.edges[:-1]), side="left")
    last = np.ceil(cut.edges[1:]) - 1
    stop = np.maximum(np.searchsorted(steps, last, side="right"), np.searchsorted(steps, last, side="left") + 1)
    known = first < len(steps)
    at = np.minimum(np.stack([first, np.maximum(stop, first + 1)], axis=1).ravel(), len(steps))
    found = {}
    for name, row in values.items():
        padded, there = np.append(row, np.nan), np.append(~np.isnan(row), False)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.add.reduceat(np.where(there, padded, 0.0), at)[::2] / np.add.reduceat(there * 1.0, at)[::2]
        low, high = np.fmin.reduceat(padded, at)[::2], np.fmax.reduceat(padded, at)[::2]
        found[PREFIX + name] = np.where(known, np.stack([low, mean, high]), np.nan).astype("<f4")
    return found
