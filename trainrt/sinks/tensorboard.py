"""Writes the record as a TensorBoard event file, and a handful of plain scalars for the standard dashboards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainrt import events
from trainrt.record import GRADIENT, UPDATE, WEIGHT, Epoch, Moments, Record, Roster, JOINT


def run_directory(logdir: str | Path) -> Path:
    """A new directory for one run below `logdir`, named by the time: two runs never share an event file's directory.

    Raises:
      OSError: It cannot be made or written; the message names the directory.
    """
    name = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        path = Path(logdir) / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not path.is_dir():
                raise
            continue
        return path
    raise FileExistsError(f"There are a thousand runs of this second in {logdir!s}.")


class TensorBoard:
    """A sink that writes one event file into a directory of its own.

    Raises:
      OSError: On construction, when the directory cannot be written.
    """

    def __init__(self, directory: str | Path):
        self.path = Path(directory) / events.file_name()
        self._writer = tf.io.TFRecordWriter(str(self.path))
        self._put(events.encode_header())
        self._writer.flush()

    def open(self, roster: Roster, environment: Mapping[str, Any]) -> None:
        self._roster = roster
        self._put(events.encode_roster(roster, environment))
        self._writer.flush()

    def write(self, item: Record | Epoch) -> None:
        if isinstance(item, Epoch):
            self._put(events.encode_epoch(item))
            scalars = {f"epoch/{name}": value for name, value in item.logs.items() if np.isscalar(value)}
            self._put(events.encode_scalars(item.step, time.time(), scalars))
        else:
            self._put(events.encode_record(item, self._roster))
            for step, wall_time, scalars in dashboard(item, self._roster):
                self._put(events.encode_scalars(step, wall_time, scalars))
        self._writer.flush()

    def close(self, findings: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> None:
        step = int(end.get("step", 0))
        self._put(events.encode_findings(findings, step))
        self._put(events.encode_text(step, time.time(), "findings", markdown(findings)))
        self._put(events.encode_end(end["how"], end.get("detail", ""), step=step))
        self._writer.flush()
        self._writer.close()

    def _put(self, event: bytes) -> None:
        self._writer.write(event)


def dashboard(record: Record, roster: Roster):
    """What stock TensorBoard shows of each window: (step, wall time, {tag: value}).

    Tags: `train/loss` of the very step (not Keras's running mean), `train/learning_rate`, `train/steps_per_second`,
    `gradient/norm` over all weights before the clip, `gradient/norm_clipped`, `gradient/clip_share` (weights whose
    gradient was scaled down), `update_ratio/log10_{median,min,max}` over the weights of rank 2 and more.
    """
    column = {name: record.scalars[:, i, 0] for i, name in enumerate(roster.scalars)}
    joint = {name: record.joint[:, :, i] for i, name in enumerate(JOINT)}
    ratio = _log_update_ratio(record, roster)
    with np.errstate(divide="ignore", invalid="ignore"):
        tags = {
            "train/loss": column["loss"],
            "train/learning_rate": column["learning_rate"],
            "train/steps_per_second": 1 / column["step_s"],
            "gradient/norm": column["gradient_norm"],
            "gradient/norm_clipped": column["clipped_gradient_norm"],
            "gradient/clip_share": joint["clipped"].sum(1) / joint["steps"].sum(1),
            **ratio,
        }
        for part in ("data_loss", "added_loss", "regularization_loss", "loss_scale"):
            if part in column:
                tags[f"train/{part}"] = column[part]
    for t in range(len(record)):
        yield int(record.steps[t, 0]), float(record.wall_time[t]), {tag: float(value[t]) for tag, value in tags.items()}


def _log_update_ratio(record: Record, roster: Roster) -> dict[str, np.ndarray]:
    kernels = [i for i, p in enumerate(roster.parameters) if len(p.shape) > 1] or list(range(len(roster.parameters)))
    update, weight = (Moments(record.moments[s][:, kernels]) for s in (UPDATE, WEIGHT))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log10(update.rms / weight.rms)
    ratio[~np.isfinite(ratio)] = np.nan
    measured = ~np.isnan(ratio).all(1)
    result = {}
    for name, reduce in (("median", np.nanmedian), ("min", np.nanmin), ("max", np.nanmax)):
        values = np.full(len(ratio), np.nan)
        values[measured] = reduce(ratio[measured], axis=1)
        result[f"update_ratio/log10_{name}"] = values
    return result


def markdown(findings: Sequence[Mapping[str, Any]]) -> str:
    """The findings for TensorBoard's Text page."""
    if not findings:
        return "No findings."
    blocks = []
    for finding in findings:
        where = ", ".join(f"`{name}`" for name in finding["where"][:8]) or "the run"
        first, last = finding["steps"]
        advice = "".join(f"\n- {line}" for line in finding["advice"])
        blocks.append(
            f"### {finding['severity']}: {finding['rule']}\n\n{finding['message']}\n\n"
            f"Where: {where}. Steps {first} to {last}.\n{advice}"
        )
    return "\n\n".join(blocks)
