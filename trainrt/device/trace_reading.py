"""What a device trace says: where the time of a step went, by phase, op and layer; and the phases as rows of their own.

The profiler's file is an XSpace: planes (the host, each GPU) of lines (threads, streams) of events. Here each event of
a step gets its phase from the name of its op; under XLA that name stands in the metadata of the compiled module. A
phase's time is the length of the union of its events, so that two threads at work at once do not count twice; phases
overlap, and their times need not add up to the step's.

What is not measured is None, never 0: a trace of a CPU knows no idle device, no kernels and no utilisation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorflow.compiler.xla.service import hlo_pb2
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from trainrt.device.intervals import cut, length, merge, without
from trainrt.device.phases import PHASES, Scopes, bare

MARKER, INPUT = "train", "trainrt input"
"""Names of the events that `trace` puts around a step and around the wait for its batch."""

HOST = "/host:CPU"
ROW = "trainrt"
TOP_OPS = 12
PS = 1e-12

_OP = re.compile(r"^(?P<name>.+):(?P<type>[A-Za-z_]\w*)$")
_EAGER = "EagerLocalExecute: "
_WRAPPERS = frozenset(
    {"_XlaRun", "_XlaCompile", "XlaLaunch", "XlaLaunchV2", "While", "StatelessWhile", "If", "StatelessIf"}
    | {"PartitionedCall", "StatefulPartitionedCall", "_Send", "_Recv", "_HostSend", "_HostRecv"}
)
"""Ops whose events enclose those of others, or only wait for them."""


@dataclasses.dataclass
class _Events:
    """N events of one plane: [N] begin and end in picoseconds since the epoch of the trace, op name and type."""

    begin: list[int] = dataclasses.field(default_factory=list)
    end: list[int] = dataclasses.field(default_factory=list)
    name: list[str] = dataclasses.field(default_factory=list)
    kind: list[str] = dataclasses.field(default_factory=list)

    def add(self, begin: int, duration: int, name: str, kind: str) -> None:
        self.begin.append(begin)
        self.end.append(begin + duration)
        self.name.append(name)
        self.kind.append(kind)

    def extend(self, others: _Events, but: list[tuple[int, int]]) -> None:
        """Adds the events that do not begin in one of the intervals: what tf.data's own functions run is its affair."""
        begins = np.array([b for b, _ in but], np.int64)
        at = np.searchsorted(begins, np.array(others.begin, np.int64), side="right") - 1
        for i, hole in enumerate(at):
            if hole < 0 or others.begin[i] >= but[hole][1]:
                self.add(others.begin[i], others.end[i] - others.begin[i], others.name[i], others.kind[i])


def read(trace: bytes, scopes: Scopes, steps: Sequence[int] | None = None) -> tuple[dict[str, Any], bytes]:
    """Reads a trace, and adds a row for each phase to it.

    Args:
      trace: A serialized XSpace whose steps were marked as `trace.step` does.
      scopes: What the names of the step's ops are read with.
      steps: First and last step that ran; None: all that are marked. A marker beyond is one that found no batch.

    Returns:
      What it says, JSON-able, see `told`; and the trace with the rows, serialized.
    """
    space = xplane_pb2.XSpace.FromString(trace)
    host = next((plane for plane in space.planes if plane.name == HOST), None)
    devices = [
        p for p in space.planes if p.name.startswith("/device:GPU") and any(len(line.events) for line in p.lines)
    ]
    modules = _modules(space)
    markers, waits, ops, stages = (
        _host_events(host, modules, scopes.eager) if host is not None else ([], [], _Events(), {})
    )
    if steps is not None:
        markers = [m for m in markers if steps[0] <= m[0] <= steps[1]]
    kernels = [_device_events(plane, modules) for plane in devices]
    result = told(markers, waits, ops, kernels, stages, scopes)
    if devices:
        result["utilisation"] = _utilisation(trace)
    if host is not None and markers:
        _add_rows(host, _intervals(markers, waits, ops, kernels, scopes))
    return result, space.SerializeToString()


def told(markers, waits, ops: _Events, kernels: list[_Events], stages, scopes: Scopes) -> dict[str, Any]:
    """What the events of a trace say.

    Args:
      markers: (step, begin, end) of each step, in picoseconds.
      waits: (begin, end) of each wait for a batch.
      ops: Those of the host.
      kernels: Those of each GPU.
      stages: tf.data stage -> seconds of its own.
      scopes: As for `read`.

    Returns:
      `step_s`: medians and spread of a step, marker to marker; `phase_s`: phase -> seconds a step; `share`: of a step's
      time: input (waiting for a batch), compute (at least one op ran), host (none did: Python, callbacks, the call),
      and idle (of a GPU; None without one); `ops`: those that take most, with their layers; `layers`: the same by
      layer; `kernels`: kernels a step and their median length, None without a GPU; `data`: tf.data's stages, seconds of
      their own a step; `named`: share of the ops' time that could be named; `notes`: what could not be told.
    """
    if not markers:
        return {"device": bool(kernels), "steps_seen": 0, "notes": ["The trace holds no marked step."]}
    begins, ends = np.array([m[1] for m in markers], float), np.array([m[2] for m in markers], float)
    spans = np.append(begins[1:] - begins[:-1], ends[-1] - begins[-1]) * PS
    # What lies between the steps belongs to the one before; an epoch's end in there is no part of any step.
    usual = float(np.median(spans))
    count = len(markers)
    by_phase = _intervals(markers, waits, ops, kernels, scopes)
    phase_s = {name: length(intervals) * PS / count for name, intervals in by_phase.items()}
    busy = [_union([(b, e) for b, e in zip(k.begin, k.end, strict=True)], markers) for k in kernels]
    work = _union([i for name, each in by_phase.items() if name not in ("input", "host") for i in each], markers)
    work = _union([*work, *_clipped(ops, markers)], markers)
    total = float(spans.sum())
    waited = by_phase.get("input", [])
    alone = max(0.0, 1 - length(merge([*work, *waited])) * PS / total)
    share: dict[str, float | None] = {
        "input": length(waited) * PS / total,
        "compute": length(work) * PS / total,
        "host": alone,
        "idle": max(0.0, 1 - float(np.mean([length(b) for b in busy])) * PS / total) if busy else None,
    }
    phase_s["host"] = alone * total / count
    source = kernels if kernels else [ops]
    rows, layers, named = _by_op(source, markers, scopes, count)
    notes = []
    if scopes.eager:
        notes.append("The step runs eagerly: its ops bear no names, and phases and layers cannot be told.")
    if kernels and not sum(len(k.begin) for k in kernels):
        notes.append("The GPU's part of the trace is empty.")
    return {
        "device": bool(kernels),
        "steps_seen": count,
        "step_s": {"median": usual, "min": float(spans.min()), "max": float(spans.max())},
        "phase_s": {name: phase_s.get(name, 0.0) for name in PHASES},
        "share": share,
        "ops": rows,
        "layers": layers,
        "kernels": _launches(kernels, count),
        "data": {name: seconds / count for name, seconds in sorted(stages.items(), key=lambda s: -s[1])[:TOP_OPS]},
        "named": named,
        "notes": notes,
    }


def _host_events(plane, modules, eager: bool):
    """Markers, waits and ops of the host, and the seconds that each stage of tf.data took for itself."""
    markers, waits, ops = [], [], _Events()
    stages: dict[str, float] = {}
    names: dict[int, tuple[str, str, str]] = {}
    for line in plane.lines:
        start = line.timestamp_ns * 1000
        data: list[tuple[int, int, str]] = []
        here = _Events()
        for event in line.events:
            known = names.get(event.metadata_id)
            if known is None:
                known = names[event.metadata_id] = _kind(plane.event_metadata[event.metadata_id], eager)
            kind, name, op = known
            begin = start + event.offset_ps
            if kind == "op":
                if op not in _WRAPPERS and not op.startswith("__"):
                    here.add(begin, event.duration_ps, name, op)
            elif kind == "data":
                data.append((begin, begin + event.duration_ps, name))
            elif kind == "marker":
                number = next((_value(plane, s) for s in event.stats if _name(plane, s) == "step_num"), None)
                if number is not None:
                    markers.append((int(number), begin, begin + event.duration_ps))
            elif kind == "input":
                waits.append((begin, begin + event.duration_ps))
            elif event.stats and not name.startswith("end: "):
                _hlo(plane, event, begin, modules, here, name)
        _own_times(data, stages)
        if not line.name.startswith("tf_data"):
            ops.extend(here, merge((begin, end) for begin, end, _ in data))
    return sorted(markers, key=lambda m: m[1]), waits, ops, stages


def _kind(metadata, eager: bool) -> tuple[str, str, str]:
    name = metadata.name
    if name.startswith(f"{MARKER}#") or name == MARKER:
        return "marker", name, ""
    if name.startswith(INPUT):
        return "input", name, ""
    if name.startswith("Iterator::"):
        return "data", name.partition("#")[0], ""
    if eager and name.startswith(_EAGER):
        kind = name.removeprefix(_EAGER)
        return "op", f"?/{kind}", kind
    match = _OP.match(name) if metadata.display_name else None
    return ("op", match["name"], match["type"]) if match else ("", name, "")


def _hlo(plane, event, begin: int, modules, events: _Events, name: str) -> None:
    """An op that XLA compiled, by the name that it had before."""
    stats = {_name(plane, stat): stat for stat in event.stats}
    if "hlo_op" not in stats:
        return
    op = str(_value(plane, stats["hlo_op"]))
    module = str(_value(plane, stats["hlo_module"])) if "hlo_module" in stats else ""
    before = modules.get((module, op)) or modules.get(("", op), "")
    events.add(begin, event.duration_ps, before or f"?/{op}", op.rstrip("0123456789").rstrip("."))


def _device_events(plane, modules) -> _Events:
    """Kernels and copies on the streams of a GPU."""
    events = _Events()
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue
        start = line.timestamp_ns * 1000
        for event in line.events:
            metadata = plane.event_metadata[event.metadata_id]
            stats = {_name(plane, stat): stat for stat in (*metadata.stats, *event.stats)}
            before = len(events.begin)
            begin = start + event.offset_ps
            _hlo(plane, event, begin, modules, events, metadata.name)
            if len(events.begin) > before:
                continue
            op = str(_value(plane, stats["tf_op"])) if "tf_op" in stats else ""
            match = _OP.match(op)
            events.add(begin, event.duration_ps, match["name"] if match else op or f"?/{metadata.name}", metadata.name)
    return events


def _modules(space) -> dict[tuple[str, str], str]:
    """(module, instruction) of XLA -> the name of the TensorFlow op that it comes from; module "" is any of them."""
    found: dict[tuple[str, str], str] = {}
    for plane in space.planes:
        if plane.name != "/host:metadata":
            continue
        for metadata in plane.event_metadata.values():
            for stat in metadata.stats:
                if stat.WhichOneof("value") == "bytes_value":
                    with contextlib.suppress(Exception):  # a newer XLA's metadata only costs the names
                        module = hlo_pb2.HloProto.FromString(stat.bytes_value).hlo_module
                        _instructions(module, found)
    return found


def _instructions(module, found: dict[tuple[str, str], str]) -> None:
    computations = {c.id: c for c in module.computations}
    named = {c.id: {i.id: i.metadata.op_name for i in c.instructions} for c in module.computations}
    for computation in module.computations:
        for instruction in computation.instructions:
            name = instruction.metadata.op_name
            if not name:  # a fusion is its root; a copy belongs to what it copies
                called = [i for i in instruction.called_computation_ids if i in computations]
                name = named[called[0]].get(computations[called[0]].root_id, "") if called else ""
                name = name or next((n for i in instruction.operand_ids if (n := named[computation.id].get(i))), "")
            if name:
                found[module.name, instruction.name] = name
                found.setdefault(("", instruction.name), name)


def _intervals(markers, waits, ops: _Events, kernels: list[_Events], scopes: Scopes) -> dict[str, list]:
    """Phase -> merged (begin, end) within the steps; where there is a GPU, the phases are those of its kernels."""
    found: dict[str, list[tuple[int, int]]] = {phase: [] for phase in PHASES if phase != "host"}
    known: dict[str, str] = {}
    for events in kernels or [ops]:
        for begin, end, name in zip(events.begin, events.end, events.name, strict=True):
            if name not in known:
                known[name] = "" if name.startswith("?/") else scopes.phase(name)
            if known[name]:
                found[known[name]].append((begin, end))
    if not kernels and waits:  # what runs while a batch is waited for is input, whatever its name
        found = {phase: without(intervals, waits) for phase, intervals in found.items()}
    found["input"] += waits
    return {phase: _union(intervals, markers) for phase, intervals in found.items()}


def _by_op(source: list[_Events], markers, scopes: Scopes, count: int):
    """The ops that take most, the layers that do, and the share of the time whose ops have a name."""
    ops: dict[str, list] = {}
    layers: dict[str, float] = {}
    total = unnamed = 0.0
    for events in source:
        inside = _inside(events, markers)
        for i in np.flatnonzero(inside):
            name, seconds = events.name[i], (events.end[i] - events.begin[i]) * PS
            total += seconds
            if name.startswith("?/"):
                unnamed += seconds
            row = ops.setdefault(bare(name), [events.kind[i], 0, 0.0, name])
            row[1] += 1
            row[2] += seconds
    for _, _, seconds, name in ops.values():
        layer = scopes.layer(name)
        if layer:
            layers[layer] = layers.get(layer, 0.0) + seconds / count
    rows = [
        {
            "op": op,
            "kind": kind,
            "layer": scopes.layer(name),
            "phase": "" if name.startswith("?/") else scopes.phase(name),
            "s": seconds / count,
            "share": seconds / total if total else 0.0,
            "times": number / count,
        }
        for op, (kind, number, seconds, name) in sorted(ops.items(), key=lambda item: -item[1][2])[:TOP_OPS]
    ]
    top = dict(sorted(layers.items(), key=lambda item: -item[1])[:TOP_OPS])
    return rows, top, 1 - unnamed / total if total else 0.0


def _launches(kernels: list[_Events], count: int) -> dict[str, float] | None:
    lengths = [
        (e - b) * PS
        for k in kernels
        for b, e, kind in zip(k.begin, k.end, k.kind, strict=True)
        if not kind.lower().startswith(("memcpy", "memset"))
    ]
    if not lengths:
        return None
    return {"a_step": len(lengths) / count, "median_s": float(np.median(lengths)), "busy_s": sum(lengths) / count}


def _utilisation(trace: bytes) -> dict[str, float]:
    """Shares of the card's peak that xprof tells of a GPU: floating-point rate and memory bandwidth."""
    found: dict[str, float] = {}
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory(prefix="trainrt-xprof-") as place:
        from xprof.convert import raw_to_tool_data

        file = Path(place) / "host.xplane.pb"
        file.write_bytes(trace)
        body, _ = raw_to_tool_data.xspace_to_tool_data([str(file)], "overview_page", {})
        for table in json.loads(body):
            for key, name in (
                ("flop_rate_utilization_relative_to_roofline", "flops"),
                ("memory_bw_utilization_relative_to_hw_limit", "memory_bandwidth"),
            ):
                value = float(str(table.get("p", {}).get(key, "0")).rstrip("%") or 0) / 100
                if value > 0:
                    found[name] = value
    return found


def _add_rows(plane, intervals: dict[str, list]) -> None:
    """A line for each phase: rows of their own in the trace viewer, above the threads."""
    taken = {line.id for line in plane.lines}
    ids = iter(i for i in range(1, 1 << 20) if i not in taken)
    metadata_id = max(plane.event_metadata, default=0)
    for number, (phase, spans) in enumerate(intervals.items()):
        if not spans:
            continue
        metadata_id += 1
        plane.event_metadata[metadata_id].id = metadata_id
        plane.event_metadata[metadata_id].name = phase
        line = plane.lines.add(id=next(ids), name=f"{ROW} {number} {phase}")
        line.timestamp_ns = int(min(begin for begin, _ in spans) // 1000)
        for begin, end in spans:
            line.events.add(
                metadata_id=metadata_id, offset_ps=int(begin - line.timestamp_ns * 1000), duration_ps=int(end - begin)
            )


def _own_times(events: list[tuple[int, int, str]], stages: dict[str, float]) -> None:
    """Adds to each stage the time in its events that lies in no event of a stage below it, on the same thread."""
    open_events: list[tuple[int, str]] = []
    for begin, end, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while open_events and open_events[-1][0] <= begin:
            open_events.pop()
        stages[name] = stages.get(name, 0.0) + (end - begin) * PS
        if open_events:
            stages[open_events[-1][1]] -= (min(end, open_events[-1][0]) - begin) * PS
        open_events.append((end, name))


def _union(intervals, markers) -> list[tuple[int, int]]:
    """The intervals merged, and cut to where steps run: from a marker to the next, the last one to its end."""
    if not intervals:
        return []
    return merge(cut(intervals, _windows(markers)))


def _windows(markers) -> list[tuple[int, int]]:
    """From each step's marker to the next: kernels may end after the call that launched them."""
    begins = [m[1] for m in markers]
    return list(zip(begins, [*begins[1:], markers[-1][2]], strict=True))


def _clipped(events: _Events, markers) -> list[tuple[int, int]]:
    return list(cut(zip(events.begin, events.end, strict=True), [(m[1], m[2]) for m in markers]))


def _inside(events: _Events, markers) -> np.ndarray:
    """[N] whether an event begins within a step."""
    begin = np.array(events.begin, np.int64)
    windows = _windows(markers)
    i = np.searchsorted(np.array([w[0] for w in windows], np.int64), begin, side="right") - 1
    ends = np.array([w[1] for w in windows], np.int64)
    return (i >= 0) & (begin < ends[np.maximum(i, 0)])


def _name(plane, stat) -> str:
    return plane.stat_metadata[stat.metadata_id].name


def _value(plane, stat):
    field = stat.WhichOneof("value")
    return plane.stat_metadata[stat.ref_value].name if field == "ref_value" else getattr(stat, field)
