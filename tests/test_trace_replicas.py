"""Traces of several replicas: one a process, each with the steps and the phases that ran there."""

import json
from pathlib import Path

import pytest
import test_distribute
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from trainrt.device import trace_reading

STEPS = [4, 7]


def traces_below(logdir: Path) -> list[Path]:
    return sorted(logdir.rglob("*.xplane.pb"))


def holds_the_window(told: list[dict]) -> None:
    """One trace, of all steps that were asked for, whose phases are told."""
    (one,) = told
    json.dumps(one, allow_nan=False)
    assert one["steps"] == STEPS
    assert one["steps_seen"] == STEPS[1] - STEPS[0] + 1
    assert all(one["phase_s"][phase] > 0 for phase in ("forward", "backward", "clip", "update", "statistics"))
    assert 0 < one["share"]["compute"] <= 1


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("mirrored")
    return logdir, test_distribute._run(2, f"traced:{logdir}")[f"traced:{logdir}"]


def test_two_replicas_of_one_process_are_one_trace(mirrored):
    logdir, answer = mirrored
    holds_the_window(answer["told"])
    (file,) = traces_below(logdir)
    space = xplane_pb2.XSpace.FromString(file.read_bytes())
    host = next(plane for plane in space.planes if plane.name == trace_reading.HOST)
    rows = {line.name.split()[-1] for line in host.lines if line.name.startswith(trace_reading.ROW)}
    assert rows >= {"forward", "backward", "update"}


def test_tracing_replicas_leaves_their_training_as_it_is(mirrored):
    _, answer = mirrored
    assert answer["apart"] <= test_distribute.EQUAL


@pytest.mark.slow
def test_each_worker_traces_the_same_steps_into_a_place_of_its_own(tmp_path):
    case = f"traced:{tmp_path}"
    answers = [answer[case] for answer in test_distribute._workers(2, case)]
    for answer in answers:
        holds_the_window(answer["told"])
        assert answer["apart"] <= test_distribute.EQUAL
    files = traces_below(tmp_path)
    assert len(files) == 2
    assert len([file for file in files if tmp_path / "worker-1" in file.parents]) == 1
    assert all(answer["told"][0]["file"] for answer in answers)
