"""What each route answers. Every parameter comes from a stranger, and is checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trainrt.comparison.ranking import LIKELY, contrast
from trainrt.findings import SEVERITIES, Finding
from trainrt.findings.series import loss_trend
from trainrt.plugin import device, passports, summary, tables, wire
from trainrt.record.run import Run

MOST_COLUMNS, MOST_ROWS, MOST_STATISTICS = 2000, 12, 40
UNLIKE = 0.05
"""Relative difference of the loss that counts as a divergence one can see."""


class Refused(Exception):
    """A request that cannot be answered, with the words to show.

    Attributes:
      code: HTTP status.
    """

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def runs(plugin, experiment: str, asked: Mapping[str, str]) -> dict[str, Any]:
    return {"runs": plugin.source(experiment).names()}


def run(plugin, experiment: str, asked: Mapping[str, str]) -> dict[str, Any]:
    name = _text(asked, "run")
    try:
        found = plugin.opened(experiment, name)
    except Refused as refused:
        if refused.code != 409:
            raise
        return {"name": name, "unreadable": str(refused)}
    with found.tables.lock:
        recorded = found.tables.run
        findings = found.judge.findings(recorded)
        traced = found.source.traced(name)
        return {
            **summary.summary(name, recorded, findings, traced, found.judge.busy),
            "judged": found.judge.rounds,
        }


def first(plugin, experiment: str, asked: Mapping[str, str]) -> bytes:
    """All that the page draws first, in one answer: `runs`, `run`, and the answers of `map` and `scalars` as bytes.

    Of the newest run where none is named, and of what there is where the address asks for something that is not there;
    `view` says what was taken.
    """
    names = plugin.source(experiment).names()
    if not names:
        return wire.pack({"runs": names, "run": None, "view": {}}, {})
    view: dict[str, Any] = {"run": asked["run"] if asked.get("run") in names else names[0]}
    told = run(plugin, experiment, view)
    arrays = {}
    if told.get("windows"):
        known = [one["name"] for one in told["statistics"]]
        usual = "update_ratio" if "update_ratio" in known else known[0]
        view["group"] = asked["group"] if asked.get("group") in told["rows"] else "layers"
        view["statistic"] = asked["statistic"] if asked.get("statistic") in known else usual
        view["first"], view["last"] = (
            _number(asked, name, step) for name, step in zip(("first", "last"), told["steps"], strict=True)
        )
        columns = {"columns": asked["columns"]} if asked.get("columns") else {}
        query = {**{name: str(value) for name, value in view.items()}, **columns}
        parts = {"map": map_(plugin, experiment, query), "scalars": scalars(plugin, experiment, query)}
        arrays = {name: np.frombuffer(part, np.uint8) for name, part in parts.items()}
    return wire.pack({"runs": names, "run": told, "view": view}, arrays)


def read_ahead(kept: tables.Tables) -> None:
    """Reads what the first answer takes longest for. It leaves the rules alone: nobody has asked about the run yet."""
    with kept.lock:
        recorded = kept.run
        if len(recorded):
            steps = recorded.steps
            scalar_lines(kept, tables.columns(steps, int(steps[0, 0]), int(steps[-1, 1]), 1))
            kept.get("layers", ["update_ratio" if "update_ratio" in recorded.statistics else recorded.statistics[0]])


def pulse(plugin, experiment: str, asked: Mapping[str, str]) -> dict[str, Any]:
    try:
        found = plugin.opened(experiment, _text(asked, "run"))
    except Refused as refused:
        return {"windows": 0, "ended": False, "gone": str(refused)}
    recorded = found.tables.run
    return {"windows": len(recorded), "ended": recorded.end is not None, "judged": found.judge.rounds}


def map_(plugin, experiment: str, asked: Mapping[str, str]) -> bytes:
    found, group, cut = _view(plugin, experiment, asked)
    return picture(found.tables, group, _text(asked, "statistic"), cut)


def lines(plugin, experiment: str, asked: Mapping[str, str]) -> bytes:
    found, group, cut = _view(plugin, experiment, asked)
    names = [name for name in _text(asked, "statistics").split(",") if name]
    known = found.tables.run.statistics
    if not names or len(names) > MOST_STATISTICS or any(name not in known for name in names):
        raise Refused(400, f"`statistics` are up to {MOST_STATISTICS} of this run's. Received: {', '.join(names)}.")
    count = len(found.tables.rows(group))
    wanted = _text(asked, "rows").split(",")
    if len(wanted) > MOST_ROWS or not all(w.isdecimal() and int(w) < count for w in wanted):
        raise Refused(400, f"`rows` are up to {MOST_ROWS} numbers under {count}. Received: {_text(asked, 'rows')}.")
    rows = [int(w) for w in wanted]
    arrays = {}
    for name, table in zip(names, found.tables.get(group, names, rows), strict=True):
        low, mean, high, states = tables.reduce(table, cut, tables.kind(name) in ("ratio", "log"))
        planes = np.stack([low, mean, high])
        planes[:, (states == tables.MISSING)] = np.nan
        arrays[name] = planes.astype("<f4")
        arrays[f"{name}/states"] = states
    return wire.pack({"rows": rows, "edges": cut.edges}, {**arrays, "extents": cut.extents.astype("<f8")})


def scalars(plugin, experiment: str, asked: Mapping[str, str]) -> bytes:
    found, _, cut = _view(plugin, experiment, asked)
    with found.tables.lock:
        return scalar_lines(found.tables, cut)


def compare(plugin, experiment: str, asked: Mapping[str, str]) -> dict[str, Any]:
    left = plugin.opened(experiment, _text(asked, "run"))
    right = plugin.opened(experiment, _text(asked, "versus"))
    findings = [found.judge.findings(found.tables.run) for found in (left, right)]
    return compared(left.tables.run[:], right.tables.run[:], *findings)


ROUTES: dict[str, Callable] = {
    "first": first,
    "runs": runs,
    "run": run,
    "pulse": pulse,
    "map": map_,
    "lines": lines,
    "scalars": scalars,
    "compare": compare,
}


def picture(kept: tables.Tables, group: str, statistic: str, cut: tables.Columns) -> bytes:
    """A statistic of all rows as planes of codes: `low`, `mean`, `high` int16 and `states` uint8, each [C, R]."""
    try:
        [table] = kept.get(group, [statistic])
    except KeyError as error:
        raise Refused(400, str(error.args[0])) from error
    logarithmic = tables.kind(statistic) in ("ratio", "log")
    low, mean, high, states = tables.reduce(table, cut, logarithmic)
    factor: float | None = 1000.0
    if not logarithmic:
        _, factor = wire.quantise(np.stack([low, mean, high]))
    planes = {name: wire.quantise(plane, factor)[0] for name, plane in (("low", low), ("mean", mean), ("high", high))}
    header = {
        "statistic": statistic,
        "kind": tables.kind(statistic),
        "factor": factor,
        "edges": [float(cut.edges[0]), float(cut.edges[-1])],
        "columns": len(cut.low),
        "rows": table.values.shape[1],
    }
    return wire.pack(header, {**planes, "states": states, "extents": cut.extents.astype("<f8")})


def scalar_lines(kept: tables.Tables, cut: tables.Columns) -> bytes:
    """[3, C] float32 of each scalar, of the clipped share and of what the machine told: minimum, mean and maximum."""
    recorded, arrays = kept.run, {}
    if "clip_share" in recorded.statistics and clips(recorded):
        [table] = kept.get("weights", ["clip_share"])
        share = tables.mean_over_rows(table.values)
        mean, low, high = tables.reduce_scalar(np.repeat(share[:, None], 3, axis=1), cut).T
        arrays["clip_share"] = np.stack([low, mean, high]).astype("<f4")
    for name in recorded.roster.scalars:
        columns = np.stack([recorded.scalar(name, column) for column in ("mean", "min", "max")], axis=1)
        mean, low, high = tables.reduce_scalar(columns, cut).T
        arrays[name] = np.stack([low, mean, high]).astype("<f4")
    arrays |= device.lines(recorded, cut)
    return wire.pack({"edges": cut.edges}, {**arrays, "extents": cut.extents.astype("<f8")})


def clips(run: Run) -> bool:
    """Whether the passport says that the run clips; the page draws the share of clipped weights only where it does."""
    fit = run.environment.get("fit")
    return isinstance(fit, Mapping) and bool(fit.get("clip"))


def compared(left: Run, right: Run, *findings: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page says of two runs: `ranked` is what `trainrt compare` ranks, `good` which one it takes as good, the
    one with fewer faults or the lower loss: who looks at a bad run sets the good one beside it."""
    found = [[Finding.from_dict(each) for each in some] for some in findings]
    swapped = _faults(right, found[1]) < _faults(left, found[0])
    pair = [(left, found[0]), (right, found[1])][:: -1 if swapped else 1]
    told = contrast([pair[0][0]], pair[1][0], pair[0][1], pair[1][1]).to_dict()
    likely = [each for each in told["differences"] if each["likelihood"] >= LIKELY]
    fields = ("name", "good", "bad", "likelihood", "message", "support", "advice")
    return {
        "passport": passports.differences(left.environment, right.environment),
        "good": "versus" if swapped else "run",
        "ranked": [{name: each[name] for name in fields} for each in likely],
        "verdict": told["verdict"],
        "start": told["start"]["message"],
        "departures": [each["message"] for each in told["departures"][:5]],
        **divergence(left, right),
    }


def _faults(run: Run, findings: list[Finding]) -> tuple[int, float]:
    """Sorts runs, the better one first."""
    worst = max((SEVERITIES.index(each.severity) for each in findings), default=0)
    last = loss_trend(run).last if len(run) else math.nan
    return worst, last if math.isfinite(last) else math.inf


def divergence(left: Run, right: Run) -> dict[str, Any]:
    """The first step at which the losses are not the same bits, and the first at which one can see it."""
    result: dict[str, Any] = {"differs": None, "diverges": None, "common": 0}
    if not (len(left) and len(right) and "loss" in left.roster.scalars and "loss" in right.roster.scalars):
        return result
    _, mine, yours = np.intersect1d(left.steps[:, 0], right.steps[:, 0], return_indices=True)
    same = (left.steps[mine] == right.steps[yours]).all(axis=1)
    mine, yours = mine[same], yours[same]
    a, b = left.scalar("loss")[mine], right.scalar("loss")[yours]
    unequal = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    far = unequal & ~(np.abs(a - b) <= UNLIKE * np.maximum(np.abs(a), np.abs(b)))
    for name, where in (("differs", unequal), ("diverges", far)):
        if where.any():
            result[name] = int(left.steps[mine[np.argmax(where)], 0])
    return {**result, "common": len(mine)}


def _view(plugin, experiment: str, asked: Mapping[str, str]):
    """The run, the group and the columns that a request is about."""
    found = plugin.opened(experiment, _text(asked, "run"))
    group = asked.get("group") or "layers"
    if group not in tables.GROUPS:
        raise Refused(400, f"`group` is one of {', '.join(tables.GROUPS)}. Received: {group!r}.")
    with found.tables.lock:
        steps = found.tables.run.steps
    if not len(steps):
        raise Refused(409, "No steps are recorded yet.")
    first, last = _number(asked, "first", int(steps[0, 0])), _number(asked, "last", int(steps[-1, 1]))
    if not asked.get("exact"):  # a comparison asks for the steps of the other run
        first = min(max(first, int(steps[0, 0])), int(steps[-1, 1]))
        last = min(last, int(steps[-1, 1]))
    last = max(last, first)
    count = min(max(_number(asked, "columns", 600), 1), MOST_COLUMNS)
    return found, group, tables.columns(steps, first, last, count)


def _text(asked: Mapping[str, str], name: str) -> str:
    value = asked.get(name)
    if not value:
        raise Refused(400, f"The request needs `{name}`.")
    return value


def _number(asked: Mapping[str, str], name: str, default: int) -> int:
    value = asked.get(name)
    if not value:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) < 16):
        raise Refused(400, f"`{name}` is a whole number. Received: {value!r}.")
    return int(value)
