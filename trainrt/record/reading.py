"""Reads the event files that `events` describes, also while they are being written, or when they are damaged."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import event_pb2, tensor_pb2, types_pb2

from trainrt.record import events
from trainrt.record.vocabulary import EARLIER_JOINTS, JOINT, VERSION, Document, Epoch, Record, Roster

MAX_RECORD_BYTES = 1 << 28
"""A longer record is skipped unread: TensorBoard's data server refuses to serve so much, and no chunk comes near."""

_MARK = events.PREFIX.encode()
_BLOCK_BYTES = 1 << 22
_MOST_PROBLEMS = 20


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
        return events.from_wire(self.regions[subject].read())

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
            length, checksum = events.HEAD.unpack_from(block, at)
            if events.masked(block[at : at + 8]) != checksum:
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
                if events.masked(event) != events.CHECKSUM.unpack_from(block, at + 12 + length)[0]:
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
                value.tag[len(events.PREFIX) :]: value.tensor
                for value in event.summary.value
                if value.tag.startswith(events.PREFIX) and value.metadata.plugin_data.plugin_name in ("", events.PLUGIN)
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
        shapes = events.shapes_of(self.roster, windows)
        dims = tensors["joint"].tensor_shape.dim
        if len(dims) == 3 and dims[2].size in EARLIER_JOINTS:
            shapes["joint"] = (*shapes["joint"][:2], dims[2].size)
        for name, shape in shapes.items():
            dtype = "<f4" if name.startswith("moments/") else "<i8" if name == "steps" else "<f8"
            tensor = tensors[name]
            content = tensor.tensor_content
            _check(tensor.dtype == events.TYPES[np.dtype(dtype)], f"the dtype of {name}")
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
