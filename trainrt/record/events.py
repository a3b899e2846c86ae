"""Records as TensorBoard event files: each function makes the bytes of one Event, `Reader` reads them back.

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

import dataclasses
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

from trainrt.record.vocabulary import EARLIER_JOINTS, JOINT, MOMENTS, SCALAR, VERSION, Document, Epoch, Record, Roster

PLUGIN = "trainrt"
SUFFIX = ".trainrt"
MAX_RECORD_BYTES = 1 << 28
"""A longer record is skipped unread: TensorBoard's data server refuses to serve so much, and no chunk comes near."""

_PREFIX = f"{PLUGIN}/"
_MARK = _PREFIX.encode()
_HEAD, _CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
_BLOCK_BYTES = 1 << 22
_MOST_PROBLEMS = 20
_TYPES = {
    np.dtype("<f4"): types_pb2.DT_FLOAT,
    np.dtype("<f8"): types_pb2.DT_DOUBLE,
    np.dtype("<i8"): types_pb2.DT_INT64,
}
_BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def file_name(start: float | None = None) -> str:
    """The name of the event file of a run that starts now, or at `start` seconds since the epoch."""
    start = time.time() if start is None else start
    return f"events.out.tfevents.{int(start):010d}.{socket.gethostname()}.{os.getpid()}{SUFFIX}"


# ---------------------------------------------------------------------------------------------------------- to bytes


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
    shapes = _shapes(roster, windows)
    values = []
    for name, (array, dtype) in arrays.items():
        if np.shape(array) != shapes[name]:
            raise ValueError(
                f"`{name}` of a chunk of {windows} windows has the shape {shapes[name]} by its roster. "
                f"Received: {np.shape(array)}. Build the record from the same roster."
            )
        wire = to_wire(array) if dtype == "<f4" else np.asarray(array, dtype)
        values.append(_value(_PREFIX + name, _tensor(wire), PLUGIN))
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
    costs a tenth of it: these are written for every window.
    """
    event = event_pb2.Event(step=step, wall_time=_now(wall_time))
    add = event.summary.value.add
    for tag, value in scalars.items():
        add(tag=tag, simple_value=value)
    return event.SerializeToString()


def encode_text(step: int, wall_time: float | None, tag: str, markdown: str) -> bytes:
    """A text for TensorBoard's own pages."""
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape, string_val=[markdown.encode()])
    return _event([_value(tag, tensor, "text")], step, wall_time)


def frame(event: bytes) -> bytes:
    """An event as it lies in a file: length, checksum of the length, event, checksum of the event."""
    length = struct.pack("<Q", len(event))
    return length + _CHECKSUM.pack(_masked(length)) + event + _CHECKSUM.pack(_masked(event))


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


def _shapes(roster: Roster, windows: int) -> dict[str, tuple[int, ...]]:
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
    return _event([_value(_PREFIX + name, tensor, PLUGIN)], step, wall_time)


def _plain(value: Any) -> Any:
    """What JSON does not know: NumPy scalars and arrays become numbers, anything else its text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _tensor(array: np.ndarray) -> tensor_pb2.TensorProto:
    shape = tensor_shape_pb2.TensorShapeProto(
        dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=size) for size in array.shape]
    )
    return tensor_pb2.TensorProto(dtype=_TYPES[array.dtype], tensor_shape=shape, tensor_content=array.tobytes())


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


def _masked(data: bytes) -> int:
    """The masked CRC-32C of a TFRecord."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# -------------------------------------------------------------------------------------------------------- from bytes


@dataclasses.dataclass(frozen=True)
class Opening:
    """The first of our events: who is recorded, and where it runs."""

    roster: Roster
    environment: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Findings:
    """Findings that were written at a step."""

    step: int
    findings: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class End:
    """How a run ended."""

    how: str
    detail: str
    wall_time: float
    weights_digest: str | None = None


class _File:
    """An open file, closed with its last reader: a run stays readable when its directory is moved or deleted."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)


@dataclasses.dataclass(frozen=True, slots=True)
class _Region:
    """An array that lies in a file."""

    file: _File
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def read(self) -> np.ndarray:
        length = self._row_bytes * self.shape[0]
        data = self.file.read(self.offset, length)
        if len(data) < length:
            raise OSError(f"{self.file.path} was cut short after it had been opened. Open the run again.")
        return np.frombuffer(data, self.dtype).reshape(self.shape)

    def rows(self, first: int, stop: int) -> _Region:
        shape = (max(stop - first, 0), *self.shape[1:])
        return _Region(self.file, self.offset + first * self._row_bytes, self.dtype, shape)


class _StoredMoments(Mapping[str, np.ndarray]):
    """Subject -> [T, P, M] float64, read from the file each time it is asked for."""

    def __init__(self, regions: dict[str, _Region]):
        self.regions = regions

    def __getitem__(self, subject: str) -> np.ndarray:
        return from_wire(self.regions[subject].read())

    def __iter__(self) -> Iterator[str]:
        return iter(self.regions)

    def __len__(self) -> int:
        return len(self.regions)


class StoredRecord:
    """A chunk of windows that stays in its file: a `Record` whose moments and joint sums are read when asked for."""

    def __init__(self, steps, wall_time, scalars, joint: _Region, moments: dict[str, _Region]):
        self.steps = steps
        self.wall_time = wall_time
        self.scalars = scalars
        self._joint = joint
        self._moments = moments

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, windows: slice) -> StoredRecord:
        first, stop, stride = windows.indices(len(self))
        assert stride == 1, "windows of a chunk are taken in one piece"
        moments = {subject: region.rows(first, stop) for subject, region in self._moments.items()}
        steps, wall_time, scalars = self.steps[windows], self.wall_time[windows], self.scalars[windows]
        return StoredRecord(steps, wall_time, scalars, self._joint.rows(first, stop), moments)

    @property
    def joint(self) -> np.ndarray:
        stored = self._joint.read()
        if stored.shape[-1] == len(JOINT):
            return stored
        joint = np.full((*stored.shape[:-1], len(JOINT)), np.nan)
        joint[..., [JOINT.index(name) for name in EARLIER_JOINTS[stored.shape[-1]]]] = stored
        return joint

    @property
    def moments(self) -> Mapping[str, np.ndarray]:
        return _StoredMoments(self._moments)

    def load(self) -> Record:
        """The same in memory."""
        return Record(self.steps, self.wall_time, dict(self.moments), self.joint, self.scalars)


Item = Opening | StoredRecord | Epoch | Document | Findings | End


class Reader:
    """Reads an event file that may be damaged, and that may still be written to.

    A record whose event fails its checksum is skipped; behind a damaged length nothing can be found, so reading stops
    there. Neither raises: what was lost is in `problems`.

    Args:
      path: The file.
      offset: Where to begin; `reader.offset` of an earlier reader goes on where that one stopped.
      roster: Needed when `offset` is behind the roster.

    Attributes:
      offset: End of the last whole record that was read.
      pending: Bytes behind `offset` that are not a whole record yet.
      roster: That of the file; None until it was read.
    """

    def __init__(self, path: str | os.PathLike, offset: int = 0, roster: Roster | None = None):
        self.path = Path(path)
        self.offset = offset
        self.pending = 0
        self.roster = roster
        self.skipped = 0
        self._file = _File(self.path)
        self._skips: list[str] = []
        self._stop: str | None = None

    @property
    def problems(self) -> list[str]:
        """What could not be read, a line each."""
        if not self._stop and self.pending:
            return [
                *self.damage,
                f"The last {self.pending} bytes are no whole record: it is being written or was cut off.",
            ]
        return self.damage

    @property
    def damage(self) -> list[str]:
        """What could not be read and is whole, a line each."""
        damage = list(self._skips)
        if self.skipped > len(damage):
            damage.append(f"{self.skipped - len(damage)} more records were skipped.")
        return [*damage, self._stop] if self._stop else damage

    def read(self) -> Iterator[Item]:
        """Yields what has become readable since the last call.

        Raises:
          ValueError: The file is of a newer version of the record than this package reads.
        """
        self._stop = None
        block, start = b"", self.offset
        while True:
            at = self.offset - start
            if at + 12 > len(block):
                block, start, at = self._file.read(self.offset, _BLOCK_BYTES), self.offset, 0
                if len(block) < 12:
                    break
            length, checksum = _HEAD.unpack_from(block, at)
            if _masked(block[at : at + 8]) != checksum:
                lost = self._file.size - self.offset
                self._stop = f"Byte {self.offset}: the length of a record is damaged; {lost} bytes from there are lost."
                break
            whole, item = length + 16, None
            if at + whole > len(block):
                if self._file.size - self.offset < whole:
                    break
                if length <= MAX_RECORD_BYTES:
                    block, start, at = self._file.read(self.offset, max(whole, _BLOCK_BYTES)), self.offset, 0
                    if len(block) < whole:
                        break
            if length > MAX_RECORD_BYTES:
                self._skip(f"a record claims {length} bytes")
            else:
                event = block[at + 12 : at + 12 + length]
                if _masked(event) != _CHECKSUM.unpack_from(block, at + 12 + length)[0]:
                    self._skip("the checksum of a record is wrong")
                elif _MARK in event:
                    item = self._decode(event)
            self.offset += whole
            if item is not None:
                yield item
        self.pending = max(self._file.size - self.offset, 0)

    def _skip(self, why: str) -> None:
        self.skipped += 1
        if len(self._skips) < _MOST_PROBLEMS:
            self._skips.append(f"Byte {self.offset}: {why}; it was skipped.")

    def _decode(self, data: bytes) -> Item | None:
        try:
            event = event_pb2.Event.FromString(data)
            tensors = {
                value.tag[len(_PREFIX) :]: value.tensor
                for value in event.summary.value
                if value.tag.startswith(_PREFIX) and value.metadata.plugin_data.plugin_name in ("", PLUGIN)
            }
            if "steps" in tensors:
                return self._record(data, tensors)
            for name, decode in (
                ("roster", self._opening),
                ("epoch", _epoch),
                ("document", _document),
                ("findings", lambda content: _findings(event.step, content)),
                ("end", _end),
            ):
                if name in tensors:
                    return decode(_json(tensors[name]))
        except _NewerVersion:
            raise
        except _NONSENSE as error:
            self._skip(f"a record makes no sense ({type(error).__name__}: {str(error)[:200]})")
        return None

    def _opening(self, content: dict) -> Opening | None:
        version = content["version"]
        if type(version) is not int or version < 1:
            raise ValueError(f"no version of a record: {version!r}")
        if version > VERSION:
            raise _NewerVersion(
                f"This trainrt reads records up to version {VERSION}. Received: version {version}, in {self.path}. "
                "Update it: pip install --upgrade trainrt."
            )
        roster = Roster.from_json(json.dumps(content["roster"]))
        for parameter in roster.parameters:
            _check(all(type(size) is int and size >= 0 for size in parameter.shape), "the shape of a weight")
            _check(all(isinstance(s, str) for s in (parameter.path, parameter.layer, parameter.dtype)), "a weight")
        _check(all(isinstance(name, str) for name in (*roster.subjects, *roster.scalars)), "the names of a roster")
        _check(isinstance(content["environment"], dict), "the environment")
        if self.roster is not None:
            _check(roster == self.roster, "a second roster that differs from the first")
            return None
        self.roster = roster
        return Opening(roster, content["environment"])

    def _record(self, data: bytes, tensors: dict[str, tensor_pb2.TensorProto]) -> StoredRecord:
        _check(self.roster is not None, "windows without a roster before them")
        assert self.roster is not None
        dims = tensors["steps"].tensor_shape.dim
        windows = dims[0].size if len(dims) == 2 else 0
        _check(windows >= 1, "the shape of steps")
        arrays, regions, at = {}, {}, 0
        shapes = _shapes(self.roster, windows)
        dims = tensors["joint"].tensor_shape.dim
        if len(dims) == 3 and dims[2].size in EARLIER_JOINTS:
            shapes["joint"] = (*shapes["joint"][:2], dims[2].size)
        for name, shape in shapes.items():
            dtype = "<f4" if name.startswith("moments/") else "<i8" if name == "steps" else "<f8"
            tensor = tensors[name]
            content = tensor.tensor_content
            _check(tensor.dtype == _TYPES[np.dtype(dtype)], f"the dtype of {name}")
            _check(tuple(dim.size for dim in tensor.tensor_shape.dim) == shape, f"the shape of {name}")
            # In Python's integers, which do not overflow as a hostile shape may want them to.
            size = np.dtype(dtype).itemsize
            for length in shape:
                size *= length
            _check(len(content) == size, f"the length of {name}")
            if name in ("steps", "wall_time", "scalars"):
                arrays[name] = np.frombuffer(content, dtype).reshape(shape)
            else:
                at = _find(data, content, at)
                regions[name] = _Region(self._file, self.offset + 12 + at, dtype, shape)
                at += size
        steps = arrays["steps"]
        _check(bool((steps[:, 0] <= steps[:, 1]).all() and (steps[1:, 0] > steps[:-1, 1]).all()), "the order of steps")
        joint = regions.pop("joint")
        moments = {name.removeprefix("moments/"): region for name, region in regions.items()}
        return StoredRecord(steps, arrays["wall_time"], arrays["scalars"], joint, moments)


class _NewerVersion(ValueError):
    pass


_NONSENSE = (DecodeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)
"""What parsing raises when a record passes its checksum and yet is not what its tag promises."""


def _find(data: bytes, content: bytes, start: int) -> int:
    """Where the content of a tensor begins in the event that it was parsed from."""
    length, varint = len(content), bytearray()
    while length > 127:
        varint.append(length & 127 | 128)
        length >>= 7
    key = b"\x22" + bytes((*varint, length))  # field 4 of TensorProto, of so many bytes
    if not content:
        return start
    for begin in (start, 0):
        at = begin
        for _ in range(16):  # a key that occurs more often by chance is no work of ours
            at = data.find(key + content[:64], at) + len(key)
            if at < len(key):
                break
            if data.startswith(content, at):
                return at
    raise ValueError("a tensor that is not in one piece")


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"unexpected: {what}")


def _json(tensor: tensor_pb2.TensorProto) -> Any:
    _check(tensor.dtype == types_pb2.DT_STRING and len(tensor.string_val) == 1, "not one string")
    return json.loads(tensor.string_val[0])


def _epoch(content: dict) -> Epoch:
    _check(type(content["epoch"]) is int and type(content["step"]) is int, "the epoch")
    return Epoch(content["epoch"], content["step"], {str(k): float(v) for k, v in content["logs"].items()})


def _document(content: dict) -> Document:
    kind, step, inner = content["kind"], content["step"], content["content"]
    _check(isinstance(kind, str) and type(step) is int and isinstance(inner, dict), "the document")
    return Document(kind, step, inner)


def _findings(step: int, content: list) -> Findings:
    _check(isinstance(content, list) and all(isinstance(finding, dict) for finding in content), "the findings")
    return Findings(step, content)


def _end(content: dict) -> End:
    digest = content.get("weights_digest")
    _check(digest is None or isinstance(digest, str), "the digest of the weights")
    return End(str(content["how"]), str(content["detail"]), float(content["wall_time"]), digest)
