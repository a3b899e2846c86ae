"""Writes the record as a TensorBoard event file, and what TensorBoard's own pages show of it without trainrt's.

These are a handful of scalars with a layout for Custom Scalars, the findings as text, the passport's numbers as HParams
with the metrics of the epochs, and a histogram of update over weight. Few tags: 200 layers make 2,400 curves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import summary as custom_scalars
from tensorboard.plugins.histogram import metadata as histograms
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import summary as sessions
from tensorboard.plugins.hparams import summary_v2 as hparams

from trainrt.record import events
from trainrt.record.vocabulary import JOINT, UPDATE, WEIGHT, Document, Epoch, Moments, Record, Roster

BUCKETS = 30
"""Of the histogram of update over weight; TensorBoard draws as many."""


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
        start = time.time()
        while (path := Path(directory) / events.file_name(start)).exists():
            start += 1  # a run that went on in the same second, in the same process
        self.path = path
        self._writer = tf.io.TFRecordWriter(str(self.path))
        self._put(events.encode_header())
        self._writer.flush()

    def open(self, roster: Roster, environment: Mapping[str, Any]) -> None:
        self._roster = roster
        self._hparams = hyperparameters(environment)
        self._metrics: set[str] = set()
        if "resumed" in environment:
            self._put(events.encode_restart(int(environment["resumed"]["step"])))
        self._put(events.encode_roster(roster, environment))
        self._put(_event(custom_scalars.pb(layout(roster)), 0))
        self._put(_event(hparams.hparams_pb(self._hparams, trial_id=self.path.parent.name), 0))
        self._writer.flush()

    def write(self, item: Record | Epoch | Document) -> None:
        if isinstance(item, Epoch):
            self._put(events.encode_epoch(item))
            scalars = {f"epoch/{name}": value for name, value in item.logs.items() if isinstance(value, int | float)}
            if not self._metrics:
                # Named, or HParams lists every scalar as a metric.
                self._metrics = set(scalars)
                metrics = [hparams.Metric(tag) for tag in scalars]
                self._put(_event(hparams.hparams_config_pb([hparams.HParam(n) for n in self._hparams], metrics), 0))
            self._put(events.encode_scalars(item.step, time.time(), scalars))
        elif isinstance(item, Document):
            self._put(events.encode_document(item))
        else:
            self._put(events.encode_record(item, self._roster))
            for event in events.encode_scalars_of(item.steps[:, 0], item.wall_time, dashboard(item, self._roster)):
                self._put(event)
            spread = _histogram(item[-1:], self._roster)
            if spread is not None:
                self._put(spread)
        self._writer.flush()

    def close(self, findings: Sequence[Mapping[str, Any]], end: Mapping[str, Any]) -> None:
        step = int(end.get("step", 0))
        self._put(events.encode_findings(findings, step))
        self._put(events.encode_text(step, time.time(), "findings", markdown(findings)))
        self._put(
            events.encode_end(end["how"], end.get("detail", ""), step=step, weights_digest=end.get("weights_digest"))
        )
        how = api_pb2.STATUS_SUCCESS if end["how"] in ("finished", "stopped") else api_pb2.STATUS_FAILURE
        self._put(_event(sessions.session_end_pb(how), step))
        self._writer.flush()
        self._writer.close()

    def _put(self, event: bytes) -> None:
        self._writer.write(event)


def dashboard(record: Record, roster: Roster) -> dict[str, np.ndarray]:
    """What stock TensorBoard shows of each window, tag -> [T].

    Tags: `train/loss` of the very step (not Keras's running mean), `train/learning_rate`, `train/steps_per_second`,
    `gradient/norm` over all weights before the clip, `gradient/norm_clipped`, `gradient/clip_share` (weights whose
    gradient was scaled down), `update_ratio/log10_{median,min,max}` over the weights of rank 2 and more.
    """
    column = {name: record.scalars[:, i, 0] for i, name in enumerate(roster.scalars)}
    joint = {name: record.joint[:, :, i] for i, name in enumerate(JOINT)}
    ratio = _log_update_ratio(record, roster)
    with np.errstate(divide="ignore", invalid="ignore"):
        tags = {
            "train/learning_rate": column["learning_rate"],
            "train/steps_per_second": 1 / column["step_s"],
            "gradient/norm": column["gradient_norm"],
            "gradient/norm_clipped": column["clipped_gradient_norm"],
            "gradient/clip_share": joint["clipped"].sum(1) / joint["steps"].sum(1),
            **ratio,
        }
        for part in ("loss", *_PARTS, "loss_scale"):
            if part in column:
                tags[f"train/{part}"] = column[part]
    return tags


def layout(roster: Roster) -> layout_pb2.Layout:
    """What the Custom Scalars page shows of those scalars."""

    def lines(title: str, *tags: str):
        return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{t}$" for t in tags]))

    ratio = layout_pb2.MarginChartContent.Series(
        value="update_ratio/log10_median", lower="update_ratio/log10_min", upper="update_ratio/log10_max"
    )
    charts = [
        lines("loss", "train/loss", *(f"train/{part}" for part in _PARTS if part in roster.scalars)),
        lines("learning rate", "train/learning_rate"),
        layout_pb2.Chart(
            title="log10 of update / weight: median, lowest and highest kernel; -4 to -1 is usual",
            margin=layout_pb2.MarginChartContent(series=[ratio]),
        ),
        lines("gradient norm, before and after the clip", "gradient/norm", "gradient/norm_clipped"),
        lines("share of clipped weights", "gradient/clip_share"),
        lines("steps per second", "train/steps_per_second"),
    ]
    return layout_pb2.Layout(category=[layout_pb2.Category(title="trainrt", chart=charts)])


def hyperparameters(environment: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The plain values of a passport that one run is set apart from another by.

    >>> hyperparameters({"optimizer": {"class": "SGD", "config": {"name": "sgd", "momentum": 0.9}}, "replicas": 1})
    {'replicas': 1, 'optimizer': 'SGD', 'optimizer.momentum': 0.9}
    """
    found = {name: environment.get(name) for name in ("precision", "strategy", "replicas", "seed")}
    optimizer = environment.get("optimizer") or {}
    found["optimizer"] = optimizer.get("class")
    parts = {"optimizer": optimizer.get("config"), "compile": environment.get("compile"), "fit": environment.get("fit")}
    for part, values in parts.items():
        if isinstance(values, Mapping):
            prefix = "optimizer." if part == "optimizer" else ""
            found |= {f"{prefix}{name}": value for name, value in values.items() if name not in _NOT_HYPER}
    found["model"] = (environment.get("model") or {}).get("name")
    return {name: value for name, value in found.items() if isinstance(value, bool | int | float | str)}


_NOT_HYPER = frozenset(
    """
    name logdir verbose x y callbacks validation_data sinks run_eagerly steps_per_execution initial_epoch observe
    on_nonfinite trace validation_freq validation_steps validation_batch_size use_ema ema_momentum
    """.split()  # noqa: SIM905 - twenty lines of quotes say no more
)
_PARTS = ("data_loss", "added_loss", "regularization_loss")


def _event(summary, step: int) -> bytes:
    """An event of a summary of TensorBoard's plugins, which may be a message of TensorFlow's own class."""
    same = summary_pb2.Summary.FromString(summary.SerializeToString())
    return event_pb2.Event(wall_time=time.time(), step=step, summary=same).SerializeToString()


def _histogram(record: Record, roster: Roster) -> bytes | None:
    """log10 of update over weight across the kernels, of one window; None where no kernel moved."""
    ratio = _kernel_ratios(record, roster)[0]
    ratio = ratio[np.isfinite(ratio)]
    if not len(ratio):
        return None
    counts, edges = np.histogram(ratio, BUCKETS)
    rows = np.stack([edges[:-1], edges[1:], counts], axis=1).astype("<f8")
    dims = [tensor_shape_pb2.TensorShapeProto.Dim(size=size) for size in rows.shape]
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_DOUBLE,
        tensor_shape=tensor_shape_pb2.TensorShapeProto(dim=dims),
        tensor_content=rows.tobytes(),
    )
    metadata = histograms.create_summary_metadata("log10 of update / weight, over kernels", "")
    value = summary_pb2.Summary.Value(tag="update_ratio/log10", tensor=tensor, metadata=metadata)
    return event_pb2.Event(
        wall_time=float(record.wall_time[-1]), step=int(record.steps[-1, 0]), summary=summary_pb2.Summary(value=[value])
    ).SerializeToString()


def _kernel_ratios(record: Record, roster: Roster) -> np.ndarray:
    """[T, kernels] log10 of update over weight; NaN where it is zero or was not measured."""
    kernels = [i for i, p in enumerate(roster.parameters) if len(p.shape) > 1] or list(range(len(roster.parameters)))
    update, weight = (Moments(record.moments[s][:, kernels]) for s in (UPDATE, WEIGHT))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log10(update.rms / weight.rms)
    ratio[~np.isfinite(ratio)] = np.nan
    return ratio


def _log_update_ratio(record: Record, roster: Roster) -> dict[str, np.ndarray]:
    ratio = np.sort(_kernel_ratios(record, roster))  # NaN last
    rows, measured = np.arange(len(ratio)), (~np.isnan(ratio)).sum(1)
    last = np.maximum(measured - 1, 0)
    return {
        "update_ratio/log10_median": (ratio[rows, last // 2] + ratio[rows, measured // 2]) / 2,
        "update_ratio/log10_min": ratio[:, 0],
        "update_ratio/log10_max": ratio[rows, last],
    }


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
