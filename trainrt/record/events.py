"""Records as TensorBoard event files: each function makes the bytes of one Event, `reading` reads them back.

A run is one event file. Its first event names the format, its second the roster and the environment; then come chunks
of windows, one event each, so that a chunk is in the file whole or not at all. All our tags begin with `trainrt/`;
ordinary scalars and texts for TensorBoard's own pages lie between them and are skipped here.

Moments are stored as float32, each in the unit of the tensor's elements, because the square of a float32 overflows one:

  count, absmax       as they are
  sum, sumsq          mean and root mean square of the finite elements
  peak, trough        root of their mean over the finite elements of the window
  zeros, nonfinite    shares of the count; under 1 when one element is otherwise, over 0 when one is

They come back as float64 with a relative error under 2e-7, counts under four million exactly. NaN: not measured.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

from trainrt.record.vocabulary import JOINT, MOMENTS, SCALAR, VERSION, Document, Epoch, Record, Roster

PLUGIN = "trainrt"
SUFFIX = ".trainrt"
PREFIX = f"{PLUGIN}/"
HEAD, CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
TYPES = {
    np.dtype("<f4"): types_pb2.DT_FLOAT,
    np.dtype("<f8"): types_pb2.DT_DOUBLE,
    np.dtype("<i8"): types_pb2.DT_INT64,
}
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def file_name(start: float | None = None) -> str:
    """The name of the event file of a run that starts now, or at `start` seconds since the epoch."""
    start = time.time() if start is None else start
    return f"events.out.tfevents.{int(start):010d}.{socket.gethostname()}.{os.getpid()}{SUFFIX}"


def encode_header(wall_time: float | None = None) -> bytes:
    """The first event of any event file."""
    event = event_pb2.Event(wall_time=_now(wall_time), file_version="brain.Event:2")
    return event.SerializeToString()


def encode_restart(step: int, wall_time: float | None = None) -> bytes:
    """Tells TensorBoard that what it read of `step` and later steps is void: a run goes on from a checkpoint."""
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    return event_pb2.Event(wall_time=_now(wall_time), step=step, session_log=start).SerializeToString()


def encode_roster(roster: Roster, environment: Mapping[str, Any], wall_time: float | None = None) -> bytes:
    """The event that opens a run: the names along the axes of all later ones, and the run's passport."""
    content = {"version": VERSION, "roster": json.loads(roster.to_json()), "environment": dict(environment)}
    return _encode_json("roster", content, 0, wall_time)


def encode_record(record: Record, roster: Roster) -> bytes:
    """One chunk of T >= 1 windows, as one event.

    Raises:
      ValueError: The record is empty, or its arrays have not the shapes of the roster.
    """
    windows = len(record)
    if not windows:
        raise ValueError("A chunk needs at least one window. Received: an empty record. Write it once it has one.")
    arrays = {"steps": (record.steps, "<i8"), "wall_time": (record.wall_time, "<f8")}
    for subject in roster.subjects:
        if subject not in record.moments:
            raise ValueError(
                f"A record holds moments of every subject of its roster, {roster.subjects}. "
                f"Received: {tuple(record.moments)}. Give {subject!r} rows of NaN if it was not measured."
            )
        arrays[f"moments/{subject}"] = (record.moments[subject], "<f4")
    arrays |= {"joint": (record.joint, "<f8"), "scalars": (record.scalars, "<f8")}
    shapes = shapes_of(roster, windows)
    values = []
    for name, (array, dtype) in arrays.items():
        if np.shape(array) != shapes[name]:
            raise ValueError(
                f"`{name}` of a chunk of {windows} windows has the shape {shapes[name]} by its roster. "
                f"Received: {np.shape(array)}. Build the record from the same roster."
            )
        wire = to_wire(array) if dtype == "<f4" else np.asarray(array, dtype)
        values.append(_value(PREFIX + name, _tensor(wire), PLUGIN))
    return _event(values, int(record.steps[0, 0]), float(record.wall_time[-1]))


def encode_epoch(epoch: Epoch, wall_time: float | None = None) -> bytes:
    """What Keras reported at the end of an epoch."""
    logs = {name: float(value) for name, value in epoch.logs.items()}
    return _encode_json("epoch", {"epoch": epoch.epoch, "step": epoch.step, "logs": logs}, epoch.step, wall_time)


def encode_document(document: Document, wall_time: float | None = None) -> bytes:
    """A document, its kind, step and content."""
    content = {"kind": document.kind, "step": document.step, "content": document.content}  # `asdict` copies all of it
    return _encode_json("document", content, document.step, wall_time)


def encode_findings(findings: Sequence[Mapping[str, Any]], step: int, wall_time: float | None = None) -> bytes:
    """Findings made at `step`, in addition to those written before."""
    return _encode_json("findings", [dict(finding) for finding in findings], step, wall_time)


def encode_end(
    how: str,
    detail: str = "",
    *,
    step: int = 0,
    wall_time: float | None = None,
    weights_digest: str | None = None,
) -> bytes:
    """How the run ended: `finished`, `stopped`, `interrupted` or `exception`. Without one it still runs or was killed.

    Args:
      weights_digest: `digest.digest_all` of the model's weights; None: not known.
    """
    ended = _now(wall_time)
    content = {"how": how, "detail": detail, "wall_time": ended, "weights_digest": weights_digest}
    return _encode_json("end", content, step, ended)


def encode_scalars(step: int, wall_time: float | None, scalars: Mapping[str, float]) -> bytes:
    """Scalars for TensorBoard's own pages, tag -> value.

    As `simple_value`, which both of TensorBoard's readers take for a tensor with the metadata of a scalar, and which
    costs a tenth of it.
    """
    event = event_pb2.Event(step=step, wall_time=_now(wall_time))
    add = event.summary.value.add
    for tag, value in scalars.items():
        add(tag=tag, simple_value=value)
    return event.SerializeToString()


def encode_scalars_of(steps: np.ndarray, wall_times: np.ndarray, scalars: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """`encode_scalars` of many steps, tag -> [T] values. Only the numbers differ, so the rest is encoded once."""
    parts = [encode_scalars(0, 0.0, {tag: 0.0}) for tag in scalars]
    parts = [event_pb2.Event.FromString(part).summary.SerializeToString() for part in parts]  # each ends in its number
    summary = b"".join(parts)
    ends = np.cumsum([len(part) for part in parts])
    event = event_pb2.Event(summary=summary_pb2.Summary.FromString(summary)).SerializeToString()
    rows = np.tile(np.frombuffer(event, np.uint8), (len(steps), 1))
    for end, values in zip(len(event) - len(summary) + ends, scalars.values(), strict=True):
        with np.errstate(over="ignore"):
            rows[:, end - 4 : end] = np.asarray(values, "<f4")[:, None].view(np.uint8)
    for step, wall_time, row in zip(steps.tolist(), wall_times.tolist(), rows, strict=True):
        yield event_pb2.Event(step=step, wall_time=wall_time).SerializeToString() + row.tobytes()


def encode_text(step: int, wall_time: float | None, tag: str, markdown: str) -> bytes:
    """A text for TensorBoard's own pages."""
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape, string_val=[markdown.encode()])
    return _event([_value(tag, tensor, "text")], step, wall_time)


def frame(event: bytes) -> bytes:
    """An event as it lies in a file: length, checksum of the length, event, checksum of the event."""
    length = struct.pack("<Q", len(event))
    return length + CHECKSUM.pack(masked(length)) + event + CHECKSUM.pack(masked(event))


def to_wire(moments: np.ndarray) -> np.ndarray:
    """[..., M] float64 moments as float32, as the head of this module says."""
    count, total, sumsq, absmax, zeros, nonfinite, peak, trough = np.moveaxis(np.asarray(moments, np.float64), -1, 0)
    wire = np.empty((*count.shape, len(MOMENTS)), "<f4")
    with np.errstate(all="ignore"):
        wire[..., 0] = count
        wire[..., 3] = absmax
        for column, part in ((4, zeros), (5, nonfinite)):
            share = np.where(count == 0, 0.0, part / count).astype(np.float32)
            wire[..., column] = np.where(part < count, np.minimum(share, _BELOW_ONE), share)
        # Divided by what the reader will multiply with, so that the rounding of the counts does not reach the sums.
        finite = _finite(wire[..., 0].astype(np.float64), wire[..., 5])
        wire[..., 1] = np.where(finite == 0, 0.0, total / finite)
        for column, part in ((2, sumsq), (6, peak), (7, trough)):
            wire[..., column] = np.where(finite == 0, 0.0, np.sqrt(part / finite))
    return wire


def from_wire(wire: np.ndarray) -> np.ndarray:
    """[..., M] float64 moments from what `to_wire` made of them."""
    moments = wire.astype(np.float64)
    with np.errstate(all="ignore"):
        count = moments[..., 0]
        finite = _finite(count, wire[..., 5])
        moments[..., 1] *= finite
        for column in (2, 6, 7):
            part = moments[..., column]
            part *= part
            part *= finite
        for column in (4, 5):
            part = moments[..., column]
            part *= count
            np.rint(part, out=part)
    return moments


def _finite(count: np.ndarray, nonfinite_share: np.ndarray) -> np.ndarray:
    return count - np.rint(nonfinite_share.astype(np.float64) * count)


def shapes_of(roster: Roster, windows: int) -> dict[str, tuple[int, ...]]:
    parameters = len(roster.parameters)
    shapes: dict[str, tuple[int, ...]] = {"steps": (windows, 2), "wall_time": (windows,)}
    shapes |= {f"moments/{subject}": (windows, parameters, len(MOMENTS)) for subject in roster.subjects}
    shapes |= {"joint": (windows, parameters, len(JOINT)), "scalars": (windows, len(roster.scalars), len(SCALAR))}
    return shapes


def _encode_json(name: str, content: Any, step: int, wall_time: float | None) -> bytes:
    text = json.dumps(content, default=_plain)
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_STRING, tensor_shape=tensor_shape_pb2.TensorShapeProto(), string_val=[text.encode()]
    )
    return _event([_value(PREFIX + name, tensor, PLUGIN)], step, wall_time)


def _plain(value: Any) -> Any:
    """What JSON does not know: NumPy scalars and arrays become numbers, anything else its text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _tensor(array: np.ndarray) -> tensor_pb2.TensorProto:
    shape = tensor_shape_pb2.TensorShapeProto(
        dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=size) for size in array.shape]
    )
    return tensor_pb2.TensorProto(dtype=TYPES[array.dtype], tensor_shape=shape, tensor_content=array.tobytes())


def _value(tag: str, tensor: tensor_pb2.TensorProto, plugin: str, data_class: int = summary_pb2.DATA_CLASS_TENSOR):
    # Without a data class both of TensorBoard's loaders drop the value in silence.
    metadata = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=plugin), data_class=data_class
    )
    return summary_pb2.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)


def _event(values: list, step: int, wall_time: float | None) -> bytes:
    event = event_pb2.Event(wall_time=_now(wall_time), step=int(step), summary=summary_pb2.Summary(value=values))
    return event.SerializeToString()


def _now(wall_time: float | None) -> float:
    return time.time() if wall_time is None else float(wall_time)


def masked(data: bytes) -> int:
    """The masked CRC-32C of a TFRecord."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
